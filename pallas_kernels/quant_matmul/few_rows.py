"""FP8 products with few rows on Hopper: the weights are read once, at the speed of device memory.

The product is transposed, so that the weights are the large operand of the matrix units: D^T[weight rows, tokens] =
W[weight rows, 128 of K] X[tokens, 128 of K]^T. Both lie in shared memory as they lie in device memory. Each 128 of K
give a fresh product, which is scaled and added up in float32 registers (`few_rows_tile.py`).

An item is a strip of weight rows times one tile of tokens, over all of K (`weight_stream.py`). No item is split, so
there is nothing to merge, and results are the same from run to run.

The dense product is that with one tile; the grouped one has an expert a tile, and stops after the tiles in use.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tuning
from pallas_kernels.quant_matmul import few_rows_tile as device
from pallas_kernels.quant_matmul.few_rows_tile import BLOCK, GROUP
from pallas_kernels.quant_matmul.weight_stream import stream
from pallas_kernels.wgmma import SWIZZLE

TILES = (8, 16, 32, 64, 128)
"""Tokens that a tile can have."""


def body(*refs, config, rows, columns, grouped, interpret):
    """See the module. `refs`: the tiles' experts and how many are in use (if grouped), the operands, output, scratch.

    rows, columns: N and K of the weights.
    """
    plan, refs = (refs[:2], refs[2:]) if grouped else ((), refs)
    x, x_scales, weights, scales, out, w_s, x_s, x_scale_s, scale_s, full, free = refs
    scale_rows = -(-rows // BLOCK)
    tile_of = (device.tile_twin if interpret else device.tile_function)(config)
    store = (device.store_twin if interpret else device.store_function)(config, *out.shape, out.dtype)

    def load(slot, expert, token, row, step):
        block = step * config.blocks
        for i in range(config.blocks):
            k = pl.ds((block + i) * BLOCK, BLOCK)
            at = pl.ds(i * config.rows, config.rows)
            plgpu.copy_gmem_to_smem(
                weights.at[pl.ds(expert * rows + row, config.rows), k], w_s.at[slot, at], full.at[slot]
            )
            at = pl.ds(i * config.tile, config.tile)
            plgpu.copy_gmem_to_smem(x.at[pl.ds(token, config.tile), k], x_s.at[slot, at], full.at[slot])
        group = pl.ds(lax.div(block, jnp.int32(GROUP)) * GROUP, GROUP)
        plgpu.copy_gmem_to_smem(x_scales.at[pl.ds(token, config.tile), group], x_scale_s.at[slot], full.at[slot])
        at = pl.ds(expert * scale_rows + lax.div(row, jnp.int32(BLOCK)), config.scale_rows)
        plgpu.copy_gmem_to_smem(scales.at[at, group], scale_s.at[slot, pl.ds(0, config.scale_rows)], full.at[slot])

    def add(sums, slot, step, warpgroup):
        place = lax.rem(step * config.blocks, jnp.int32(GROUP))
        return tile_of(w_s, x_s, x_scale_s, scale_s, sums, slot, place, warpgroup)

    stream(
        config,
        strips=rows // config.rows,
        steps=columns // (BLOCK * config.blocks),
        plan=plan,
        load=load,
        start=lambda: device.zeros(config),
        add=add,
        store=functools.partial(store, out),
        barriers=(full, free),
    )


def unsupported(x: jax.Array, values: jax.Array, tile: int | None = None) -> str | None:
    """What the kernel does not take of these arguments; None if it takes all.

    Args:
      x: [M, K], quantised or not.
      values: float8_e4m3fn [..., N, K].
      tile: rows of a tile of the grouped product; None for the dense one.
    """
    rows, columns = values.shape[-2:]
    if values.dtype != jnp.float8_e4m3fn:
        return f"weights of dtype {values.dtype}; it takes float8_e4m3fn"
    if rows % 64 or columns % (BLOCK * GROUP):
        return f"weights of shape {values.shape}; it takes N in multiples of 64 and K in multiples of {BLOCK * GROUP}"
    if tile is None and not 1 <= x.shape[0] <= TILES[-1]:
        return f"x of shape {x.shape}; it takes 1 to {TILES[-1]} rows"
    if tile is not None and tile not in TILES:
        return f"tiles of {tile} rows; it takes {', '.join(map(str, TILES))}"
    return None


def matmul(
    x: jax.Array,
    x_scales: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    *,
    dtype: Any = jnp.bfloat16,
    interpret: Any = None,
    config: tuning.FewRows | None = None,
) -> jax.Array:
    """x W^T of FP8 values, summed in float32 with both scales of each 128 of K; for what is not `unsupported`.

    Args:
      x: float8_e4m3fn [M, K].
      x_scales: float32 [M, K / 128].
      values: float8_e4m3fn [N, K].
      scales: float32 [ceil(N / 128), K / 128].
      dtype: of the result, bfloat16 or float32.
      interpret: parameters of the interpreter.
      config: for measurements; the default is the choice of `tuning`.

    Returns:
      [M, N].
    """
    tokens = x.shape[0]
    tile = next(tile for tile in TILES if tile >= tokens)
    config = config or tuning.few_rows(tile, values.shape[0], 1)
    if interpret is not None:  # rows past the end of x: zeros from the copies, which the interpreter would not take
        x, x_scales = (jnp.pad(a, ((0, config.tile - tokens), (0, 0))) for a in (x, x_scales))
    return call((), x, x_scales, values[None], scales[None], dtype, interpret, config)[:tokens]


def grouped_matmul(
    x: jax.Array,
    x_scales: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    tile_expert: jax.Array,
    used_tiles: jax.Array,
    *,
    dtype: Any = jnp.bfloat16,
    interpret: Any = None,
    config: tuning.FewRows | None = None,
) -> jax.Array:
    """`matmul` of each tile of rows with the weights of its expert; reads no others.

    Args:
      x: float8_e4m3fn [P, K], in the order of a `RoutingPlan`.
      x_scales: float32 [P, K / 128].
      values: float8_e4m3fn [E, N, K].
      scales: float32 [E, ceil(N / 128), K / 128].
      tile_expert: int32 [tiles], the expert of each tile of P / tiles rows.
      used_tiles: int32 [], see `used_tiles`.

    Returns:
      [P, N]; tiles from `used_tiles` on are not written, whatever is in the memory stays there.
    """
    tile = x.shape[0] // tile_expert.shape[0]
    config = config or tuning.few_rows(tile, values.shape[1], tile_expert.shape[0])
    plan = (tile_expert, jnp.asarray(used_tiles, jnp.int32).reshape(1))
    return call(plan, x, x_scales, values, scales, dtype, interpret, config)


def used_tiles(row_token: jax.Array, tiles: int) -> jax.Array:
    """int32 []: how many tiles of a `RoutingPlan` hold a row; they come first, and so does the row in each."""
    return jnp.sum(row_token.reshape(tiles, -1)[:, 0] >= 0, dtype=jnp.int32)


def call(plan, x, x_scales, values, scales, dtype, interpret, config) -> jax.Array:
    """The kernel, with or without a plan (experts of the tiles, how many are used)."""
    experts, rows, columns = values.shape
    if rows % config.rows:
        raise ValueError(f"strips of {config.rows} rows do not fit into weights of shape {values.shape}")
    kernel = plgpu.kernel(
        functools.partial(
            body, config=config, rows=rows, columns=columns, grouped=bool(plan), interpret=interpret is not None
        ),
        out_type=jax.ShapeDtypeStruct((x.shape[0], rows), dtype),
        scratch_types=(
            plgpu.SMEM((config.stages, config.blocks * config.rows, BLOCK), values.dtype, transforms=SWIZZLE),
            plgpu.SMEM((config.stages, config.blocks * config.tile, BLOCK), x.dtype, transforms=SWIZZLE),
            plgpu.SMEM((config.stages, config.tile, GROUP), jnp.float32),
            plgpu.SMEM((config.stages, 8, GROUP), jnp.float32),
            plgpu.Barrier(num_arrivals=2 * config.blocks + 2, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
        ),
        grid=(config.ctas,),
        grid_names=("cta",),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )
    return kernel(
        *plan,
        x,
        x_scales,
        values.reshape(experts * rows, columns),
        scales.reshape(experts * scales.shape[1], scales.shape[2]),
    )
