"""Gate and up as one product of few rows: SwiGLU, and quantisation, at the end of a strip.

A strip is the same rows of the gate and of up, half and half, so the products of one token for both are in several
warps, or warpgroups. They meet in shared memory, rounded to bfloat16, a token's in a row; then a warp takes the tokens
one by one, if their columns are a whole quantisation group, or each thread takes pairs of columns.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir import ir

from pallas_kernels import mosaic
from pallas_kernels.matmul import few_rows, reference
from pallas_kernels.matmul.config import FewRowsSwiGLU
from pallas_kernels.matmul.few_rows import Problem
from pallas_kernels.matmul.few_rows_tile import first_column, layout_of, unpack
from pallas_kernels.matmul.swiglu import Epilogue, Result, silu_product, store_reference
from pallas_kernels.matmul.weight_stream import plan_of
from pallas_kernels.mosaic import REF, SCALAR, Float, SharedWords, Word, fp8
from pallas_kernels.mosaic.wgmma import first_row
from pallas_kernels.quantize import quantize
from pallas_kernels.quantize.reference import GROUP


def stage_sums(config: FewRowsSwiGLU, address: Word, sums: Sequence[Float], warpgroup: Word) -> None:
    """Stores a thread's sums in bfloat16 at an address in shared memory of [tokens, rows of the strip, and 8 more]."""
    thread = mosaic.thread_index() & 127
    row = first_row(thread) + (warpgroup << 6)
    first = address + (first_column(thread) * config.staged_columns + row) * 2
    exists = row < config.rows  # of a warp's 16 rows, all or none
    for i, x in enumerate(sums):
        column, below = 8 * (i // 4) + i % 2, 8 * (i // 2 % 2)
        (word,) = mosaic.pack_bf16([x, x])
        place = first + (column * config.staged_columns + below) * 2
        # A whole register: of a store of 16 bits, its lower ones.
        mosaic.ptx("st.shared.u16 [$0], $1;", place, word, predicate=exists)


def device_stage(config: FewRowsSwiGLU):
    """Returns `stage(staged_smem, sums, warpgroup)`: `stage_sums` of a warpgroup."""

    @plgpu.inline_mgpu(arg_types=(REF, layout_of(config), SCALAR))
    def stage(ctx, staged_smem, sums, warpgroup):
        del ctx
        stage_sums(config, mosaic.shared_address(staged_smem), unpack(sums), mosaic.scalar(warpgroup))

    return stage


def interpreted_stage(config: FewRowsSwiGLU):
    """Returns the twin of `device_stage`."""
    rows = min(64, config.rows)

    def stage(staged_smem, sums, warpgroup):
        part = sums.reshape(64, config.tile)[:rows].T.astype(jnp.bfloat16)
        staged_smem[:, pl.ds(warpgroup * rows, rows)] = part

    return stage


def store_groups(
    config: FewRowsSwiGLU,
    shape: tuple[int, int],
    result: Result,
    staged: SharedWords,
    outputs: Sequence[ir.Value],
    token: Word,
    column: Word,
) -> None:
    """Stores a strip's result, quantised, at the outputs' addresses. A warp takes single tokens. shape: of it all."""
    (tokens, width), thread = shape, mosaic.thread_index()
    lane, warp = thread & 31, thread >> 5

    def one(which: Word) -> None:
        # A pair of words is 4 columns. The gate's 128 are first.
        at = which * (config.staged_columns // 4) + lane
        hidden = silu_product(staged.load_pair(at), staged.load_pair(at + config.rows // 8))
        packed, scale = fp8.quantize(hidden, 32, result.scale_fmt)
        row, group = token + which, column >> 7
        exists = row < tokens
        place = mosaic.offset(mosaic.offset(outputs[0], row, width), column + (lane << 2), 1)
        mosaic.store_global(place, packed, predicate=exists)
        at = group * tokens + row if result.scales_by_group else row * (width // GROUP) + group
        mosaic.store_global(mosaic.offset(outputs[1], at, 4), [scale.bits()], predicate=exists & lane.equals(0))

    for i in range(0, config.tile, 4 * config.warpgroups):
        mosaic.when(warp + i < config.tile, functools.partial(one, warp + i))


def store_pairs(
    config: FewRowsSwiGLU,
    shape: tuple[int, int],
    result: Result,
    staged: SharedWords,
    outputs: Sequence[ir.Value],
    token: Word,
    column: Word,
) -> None:
    """Stores the same in bfloat16. A thread takes two columns at a time."""
    del result
    (tokens, width), thread, pairs = shape, mosaic.thread_index(), config.rows // 4
    for i in range(0, config.tile * pairs, 128 * config.warpgroups):
        which, pair = (thread + i) // pairs, (thread + i) % pairs
        at = which.min(config.tile - 1) * (config.staged_columns // 2) + pair
        hidden = silu_product([staged.load(at)], [staged.load(at + pairs)])
        exists = (which < config.tile) & (token + which < tokens)
        place = mosaic.offset(mosaic.offset(outputs[0], token + which, 2 * width), column + (pair << 1), 2)
        mosaic.store_global(place, hidden, predicate=exists)


def device_store(problem: Problem, result: Result):
    """Returns `store(staged_smem, outputs, token, column)`: a strip's result, by all warpgroups together."""
    store_all = store_groups if result.quantized else store_pairs

    @plgpu.inline_mgpu(arg_types=(REF, (REF,) * (1 + result.quantized), SCALAR, SCALAR))
    def store(ctx, staged_smem, outputs, *place):
        del ctx
        addresses = [mosaic.global_address(ref) for ref in outputs]
        staged, shape = SharedWords(staged_smem), (problem.tokens, problem.rows)
        store_all(problem.config, shape, result, staged, addresses, *map(mosaic.scalar, place))

    return store


def interpreted_store(problem: Problem, result: Result):
    """Returns the twin of `device_store`, by the references; of the first warpgroup alone, and whole tiles."""
    config = problem.config
    half = config.rows // 2

    def store(staged_smem, outputs, token, column):
        @pl.when(lax.axis_index("warpgroup") == 0)
        def _():
            both = staged_smem[...]
            values = reference.silu_product(both[:, :half], both[:, half : config.rows])
            group = lax.div(column, jnp.int32(GROUP))
            store_reference(result, outputs, values, pl.ds(token, config.tile), pl.ds(column, half), group)

    return store


class SwiGLU(Epilogue):
    """The epilogue of `few_rows`: see the module."""

    @property
    def scratch(self) -> tuple[Any, ...]:
        config = self.problem.config
        return (
            plgpu.SMEM((config.tile, config.staged_columns), jnp.bfloat16),
            plgpu.Barrier(num_arrivals=config.warpgroups),  # all sums are staged
            plgpu.Barrier(num_arrivals=config.warpgroups),  # all have been read
        )

    def store(self, refs: tuple[Any, ...], sums: Any, token: Any, row: Any, warpgroup: Any) -> None:
        """Stores a strip."""
        *outputs, staged_smem, staged_bar, read_bar = refs
        interpret = self.problem.interpret
        stage = (interpreted_stage if interpret else device_stage)(self.problem.config)
        store = (interpreted_store if interpret else device_store)(self.problem, self.result)
        plgpu.barrier_wait(read_bar)
        stage(staged_smem, sums, warpgroup)
        plgpu.barrier_arrive(staged_bar)
        plgpu.barrier_wait(staged_bar)
        store(staged_smem, tuple(outputs), token, row)
        plgpu.barrier_arrive(read_bar)


@functools.partial(jax.jit, static_argnames=("stage", "config", "result", "interpret"))
def swiglu(
    x: jax.Array,
    x_scales: jax.Array,
    weights: tuple[jax.Array, jax.Array],
    weight_scales: tuple[jax.Array, ...],
    tile_expert: jax.Array | None,
    used_tiles: jax.Array | None,
    *,
    stage: Any,
    config: FewRowsSwiGLU,
    result: Result,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """silu(x gate^T) * (x up^T), each product rounded to bfloat16 first.

    Strips of less than 128 columns (see `config.few_rows_swiglu`) hold no whole quantisation group; `quantize` follows.

    Args:
      x, x_scales, tile_expert, used_tiles, stage, config, interpret: see `few_rows.matmul`; without experts, up to 64
        rows.
      weights: gate and up, float8_e4m3fn, each [W, K], or [E, W, K] with `tile_expert`; W a multiple of 128.
      weight_scales: theirs, float32 [..., W / 128, K / 128].
      result: what becomes of it.

    Returns:
      values [M, W] and, if quantised, scales.
    """
    count, width = x.shape[0], weights[0].shape[-2]
    plan: tuple[jax.Array, ...] = ()
    if tile_expert is None:
        x, x_scales = few_rows.padded(x, x_scales, config, interpret)
        weights, weight_scales = ((a[None], b[None]) for a, b in (weights, weight_scales))
    else:
        plan = plan_of(tile_expert, used_tiles)
    quantises = result.quantized and config.rows // 2 == GROUP
    problem = Problem(x.shape[0], width, x.shape[1], config, interpret is not None, weights=2)
    epilogue = SwiGLU(problem, dataclasses.replace(result, quantized=quantises))
    values, *scales = few_rows.launch(stage(problem), epilogue, plan, x, x_scales, weights, weight_scales, interpret)
    values = values[:count]
    if result.quantized and not quantises:
        values, by_row = quantize(values, result.scale_fmt, backend="auto" if interpret else "mosaic_gpu")
        return values, by_row.T if result.scales_by_group else by_row
    if result.scales_by_group:
        return values, *(each[:, :count] for each in scales)
    return values, *(each[:count] for each in scales)
