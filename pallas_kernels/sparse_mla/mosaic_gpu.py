"""Sparse latent attention on Hopper: the launch of the kernel (`kernel.py`) and what goes into it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.paging import BLOCK_SIZE
from pallas_kernels.sparse_mla.combine import combine
from pallas_kernels.sparse_mla.config import Config, choose_config
from pallas_kernels.sparse_mla.dequantise import DequantisingGather
from pallas_kernels.sparse_mla.gather import (
    BIAS,
    KEYS,
    LATENT,
    RECORD,
    ROPE,
    TILED,
    WIDTH,
    CopyingGather,
    InterpretedGather,
)
from pallas_kernels.sparse_mla.kernel import HEADS, PAIR, Kernel, Problem
from pallas_kernels.sparse_mla.products import DeviceProducts, InterpretedProducts


def attention(
    queries: jax.Array,
    kv: jax.Array,
    first_row: jax.Array,
    slots: jax.Array,
    lengths: jax.Array,
    problem: Problem,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Computes attention over each split of the keys.

    Args:
      queries: bf16 [T, groups * 64, 576].
      kv: [rows, 576] bf16 or [rows, 656] uint8, all layers.
      first_row: int32 [1], that of the layer.
      slots: int32 [T, K'], K' a multiple of 128 and at least `problem.keys`.
      lengths: int32 [T]: no key at or after it is present.

    Returns:
      out bf16 [T, H, 512] and lse float32 [T, H]; with splits [T, splits, H, 512] and [T, splits, H], where lse is -inf
      and out undefined for a split without keys.
    """
    config = problem.config
    form: Any = DequantisingGather if kv.dtype == jnp.uint8 else CopyingGather
    gather: Any = InterpretedGather(form, problem.masked) if interpret else form(problem.masked, config.prefetch)
    products = InterpretedProducts() if interpret else DeviceProducts()
    tokens, heads, _ = queries.shape
    shape = (tokens, heads) if config.splits == 1 else (tokens, config.splits, heads)
    bf16, f32 = jnp.bfloat16, jnp.float32
    return plgpu.kernel(
        lambda *refs: Kernel(problem, gather, products, *refs).run(),
        out_type=(
            jax.ShapeDtypeStruct((*shape, LATENT), bf16),
            jax.ShapeDtypeStruct(shape, f32),
        ),
        scratch_types=(
            plgpu.SMEM((1, HEADS, WIDTH), bf16, transforms=TILED),  # q_smem: queries, then outputs
            plgpu.SMEM((2, KEYS, WIDTH), bf16, transforms=TILED),  # k_smem: keys, and then probabilities
            plgpu.SMEM((BIAS + 2, KEYS), f32),  # stat_smem
            gather.scratch(),  # ready_bar: parts of the keys have arrived
            plgpu.Barrier(),  # q_ready_bar: the queries have arrived
            plgpu.Barrier(num_arrivals=2),  # q_free_bar: they may be overwritten
            plgpu.Barrier(num_barriers=4),  # k_free_bar: parts of the keys may be overwritten
            plgpu.Barrier(num_barriers=2),  # p_ready_bar: the probabilities are stored
            plgpu.Barrier(num_arrivals=2),  # sum_ready_bar: the sums are stored
        ),
        grid=(problem.ctas,),
        grid_names=("cta",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=interpret,
        kernel_name="sparse_mla",
    )(queries, kv, slots, lengths, first_row)


def unsupported(queries: jax.Array, kv: jax.Array, slots: jax.Array, scale: Any, rope_dim: int) -> str | None:
    """Says which arguments the kernel does not take, and which it does; None if it takes all."""
    record = RECORD if kv.dtype == jnp.uint8 else WIDTH
    keys = slots.shape[1]
    if slots.dtype != jnp.int32:
        return f"slots of {slots.dtype}; it takes int32"
    if queries.dtype != jnp.bfloat16:
        return f"queries of {queries.dtype}; it takes bfloat16"
    if kv.dtype not in (jnp.bfloat16, jnp.uint8):
        return f"a cache of {kv.dtype}; it takes bfloat16 rows and uint8 records"
    if rope_dim != ROPE or queries.shape[2] != WIDTH or kv.shape[3] != record:
        return (
            f"queries {queries.shape}, rope_dim {rope_dim} and cache {kv.shape}; it takes {LATENT} latent and {ROPE} "
            f"rope columns: queries [T, H, {WIDTH}], bf16 rows of {WIDTH} or records of {RECORD} bytes"
        )
    if kv.shape[2] != BLOCK_SIZE:
        return f"a cache {kv.shape}; it takes blocks of {BLOCK_SIZE}: [layers, blocks, {BLOCK_SIZE}, {record}]"
    if not 1 <= queries.shape[1] <= 2 * HEADS:
        return f"queries {queries.shape} of {queries.shape[1]} heads; it takes 1 to {2 * HEADS}"
    if not 1 <= keys <= 2048:
        return f"slots {slots.shape} with {keys} keys a token; it takes 1 to 2048"
    if kv.shape[0] * kv.shape[1] * BLOCK_SIZE >= 2**31:
        return f"a cache {kv.shape} of {kv.shape[0] * kv.shape[1] * BLOCK_SIZE} rows; it takes less than 2^31"
    if isinstance(scale, jax.core.Tracer) or not scale > 0:
        return f"scale {scale}; it takes a positive number that is known when tracing"
    return None


@functools.partial(jax.jit, static_argnames=("scale", "config", "interpret"))
def sparse_mla(
    queries: jax.Array,
    kv: jax.Array,
    layer: jax.Array,
    slots: jax.Array,
    lengths: jax.Array | None,
    scale: float,
    *,
    config: Config | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs the op on a GPU; the public op has checked the arguments. `config` None: that of `choose_config`."""
    tokens, heads, _ = queries.shape
    keys = slots.shape[1]
    if tokens == 0:
        return jnp.zeros((0, heads, LATENT), queries.dtype), jnp.zeros((0, heads), jnp.float32)
    groups = -(-heads // HEADS)
    config = config or choose_config(tokens, groups, keys, fp8=kv.dtype == jnp.uint8)
    problem = Problem(tokens, groups, keys, lengths is None, float(scale), config)
    if lengths is None:
        lengths = jnp.max(jnp.where(slots >= 0, lax.broadcasted_iota(jnp.int32, slots.shape, 1) + 1, 0), axis=1)
    if heads != groups * HEADS:
        queries = jnp.pad(queries, ((0, 0), (0, groups * HEADS - heads), (0, 0)))
    if keys % PAIR:
        slots = jnp.pad(slots, ((0, 0), (0, -keys % PAIR)), constant_values=-1)
    # The layer is data, and the cache is handed over whole: no slice of it, and one kernel for all layers.
    first_row = (jnp.asarray(layer, jnp.int32) * (kv.shape[1] * BLOCK_SIZE)).reshape(1)
    rows = kv.reshape(-1, kv.shape[-1])
    out, lse = attention(queries, rows, first_row, slots, lengths.astype(jnp.int32), problem, interpret)
    if config.splits > 1:
        out, lse = combine(out, lse, queries.dtype, interpret=interpret)
    return out[:, :heads], lse[:, :heads]
