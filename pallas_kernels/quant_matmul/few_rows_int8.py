"""int8 products with few rows on Hopper: the weights are read once, at the speed of device memory.

As `few_rows.py`, also in the grouped form, with whole numbers: the matrix units add up all of K exactly, and the scales
(one a token, one a weight row) come at an item's end.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import mosaic, tuning
from pallas_kernels.mosaic import REF, SCALAR, Float, Word
from pallas_kernels.mosaic.wgmma import SWIZZLE, SWIZZLED, descriptor, finish, first_row, start_product
from pallas_kernels.quant_matmul import few_rows_tile as device
from pallas_kernels.quant_matmul.few_rows import collective, sharing, tile_for, unsupported_rows, whole_strips
from pallas_kernels.quant_matmul.few_rows_tile import BLOCK, first_column, layout_of, pack, part_of, unpack
from pallas_kernels.quant_matmul.weight_stream import copy_lines, in_lines, plan_of, stream


def stage_function(config: tuning.FewRows):
    """`stage(weights, x, sums, slot, warpgroup)`: the sums and the products of a stage; see `few_rows_tile`."""
    layout = layout_of(config)

    @plgpu.inline_mgpu(
        arg_types=(SWIZZLED, SWIZZLED, layout, SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct((64 * config.own_tokens,), jnp.int32, layout=layout),
    )
    def stage(ctx, weights, x, sums, slot, warpgroup):
        del ctx
        slot, warpgroup = map(mosaic.scalar, (slot, warpgroup))
        first, own_token = part_of(config, warpgroup)
        row = slot * (config.blocks * config.rows) + first
        left = descriptor(mosaic.shared_address(weights) + row * BLOCK)
        right = descriptor(mosaic.shared_address(x) + (slot * (config.blocks * config.tile) + own_token) * BLOCK)
        numbers = [word.value for word in unpack(sums, Word)]
        for block in range(config.blocks):
            a = arith.addi(left, mosaic.i64(block * config.rows * BLOCK >> 4))
            b = arith.addi(right, mosaic.i64(block * config.tile * BLOCK >> 4))
            numbers = start_product(a, b, config.own_tokens, numbers, int8=True, add=True)
        return pack([Word(x) for x in finish(numbers, flying=0)], layout)

    return stage


def stage_twin(config: tuning.FewRows):
    """`stage_function` for the interpreter."""
    own = config.own

    def stage(weights, x, sums, slot, warpgroup):
        first, own_token = part_of(config, warpgroup)
        left = [weights[slot, i, pl.ds(first, own), :].astype(jnp.int32) for i in range(config.blocks)]
        right = x[slot, :, pl.ds(own_token, config.own_tokens), :].astype(jnp.int32)
        # Ordinary loads, which the next copy into the slot must not overtake.
        plgpu.commit_smem()
        sums = sums.reshape(64, config.own_tokens)
        for i in range(config.blocks):
            part = jnp.dot(left[i], right[i].T)
            sums = sums + jnp.pad(part, ((0, 64 - own), (0, 0)))
        return sums.reshape(-1)

    return stage


def scale_function(config: tuning.FewRows, tokens: int, rows: int):
    """`scaled(x_scales [tokens], scales [rows], sums, token, row, warpgroup)`: float32 sums of a strip at `row`.

    rows: of all experts; those past the end, and a strip's past its expert's end, get the scale of another.
    """
    layout = layout_of(config)

    @plgpu.inline_mgpu(
        arg_types=(REF, REF, layout, SCALAR, SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct((64 * config.own_tokens,), jnp.float32, layout=layout),
    )
    def scaled(ctx, x_scales, scales, sums, token, row, warpgroup):
        del ctx
        token, row, warpgroup = map(mosaic.scalar, (token, row, warpgroup))
        thread = mosaic.thread_index() & 127
        first, own_token = part_of(config, warpgroup)
        token, row = token + own_token + first_column(thread), row + first + first_row(thread)

        def scale(ref, index, count):
            at = mosaic.offset(mosaic.global_address(ref), index.min(count - 1), 4)
            return Float.of_bits(mosaic.load_read_only(at)[0])

        of_rows = [scale(scales, row + 8 * i, rows) for i in range(2)]
        of_tokens = [
            scale(x_scales, token + (8 * i + j), tokens) for i in range(config.own_tokens // 8) for j in range(2)
        ]
        numbers = [
            Float(arith.sitofp(ir.F32Type.get(), x.value)) * (of_tokens[2 * (i // 4) + i % 2] * of_rows[i // 2 % 2])
            for i, x in enumerate(unpack(sums, Word))
        ]
        return pack(numbers, layout)

    return scaled


def scale_twin(config: tuning.FewRows, tokens: int, rows: int):
    """`scale_function` for the interpreter; whole tiles and strips only."""
    del tokens, rows
    own = config.own

    def scaled(x_scales, scales, sums, token, row, warpgroup):
        first, own_token = part_of(config, warpgroup)
        of_tokens, of_rows = x_scales[pl.ds(token + own_token, config.own_tokens)], scales[pl.ds(row + first, own)]
        factors = jnp.pad(of_tokens[None] * of_rows[:, None], ((0, 64 - own), (0, 0)))
        return sums.astype(jnp.float32) * factors.reshape(-1)

    return scaled


def body(*refs, config, rows, columns, grouped, interpret):
    """See the module. `refs`: the tiles' experts and how many are in use (if grouped), the operands, output, scratch.

    rows, columns: N and K of the weights.
    """
    plan, refs = (refs[:2], refs[2:]) if grouped else ((), refs)
    x, x_scales, weights, scales, out, w_s, x_s, full, free = refs
    add = (stage_twin if interpret else stage_function)(config)
    scaled = (scale_twin if interpret else scale_function)(config, x.shape[0], weights.shape[0])
    together = collective(config, interpret)
    write = (device.store_twin if interpret else device.store_function)(config, *out.shape, out.dtype)

    def load(slot, expert, token, row, step):
        block = step * config.blocks
        copy_lines(weights, expert * rows + row, block, w_s.at[slot], full.at[slot])
        copy_lines(x, token, block, x_s.at[slot], full.at[slot], collective_axes=together)

    def store(sums, token, row, warpgroup):
        first = plan[0][lax.div(token, jnp.int32(config.tile))] * rows if plan else 0
        write(out, scaled(x_scales, scales, sums, token, row + first, warpgroup), token, row, warpgroup)

    stream(
        config,
        strips=-(-rows // (config.rows * config.cluster)) * config.cluster,
        steps=columns // (BLOCK * config.blocks),
        plan=plan,
        load=load,
        start=lambda: device.zeros(config, jnp.int32),
        add=lambda sums, slot, step, row, warpgroup: add(w_s, x_s, sums, slot, warpgroup),
        store=store,
        barriers=(full, free),
        tiles=-(-x.shape[0] // config.tile),
        cluster=config.cluster,
    )


def unsupported(x: jax.Array, values: jax.Array, tile: int | None = None) -> str | None:
    """What the kernel does not take of these arguments; None if it takes all.

    Args:
      x: [M, K], before it is quantised.
      values: int8 [..., N, K].
      tile: rows of a tile of the grouped product; None for the dense one.
    """
    rows, columns = values.shape[-2:]
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x of dtype {x.dtype}; it takes bfloat16 and float32"
    if rows % 64 or columns % (4 * BLOCK):
        return f"weights of shape {values.shape}; it takes N in multiples of 64 and K in multiples of {4 * BLOCK}"
    return unsupported_rows(x, tile)


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
    """x W^T of int8 values, summed exactly, times both scales; for what is not `unsupported`.

    Args:
      x: int8 [M, K].
      x_scales: float32 [M].
      values: int8 [N, K].
      scales: float32 [N].
      dtype: of the result, bfloat16 or float32.
      interpret: parameters of the interpreter.
      config: for measurements; the default is the choice of `tuning`.

    Returns:
      [M, N].
    """
    tokens = x.shape[0]
    config = config or tuning.few_rows(tile_for(tokens), values.shape[0], 1, x.shape[1])
    if interpret is not None:  # rows past the end of x: zeros from the copies, which the interpreter would not take
        pad = 0, -tokens % config.tile
        x, x_scales = jnp.pad(x, (pad, (0, 0))), jnp.pad(x_scales, pad)
    how = {"dtype": dtype, "interpret": interpret, "config": config}
    return call((), x, x_scales, values[None], scales[None], **how)[:tokens]


def grouped_matmul(
    x: jax.Array,
    x_scales: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    tile_expert: jax.Array,
    used_tiles: jax.Array | None,
    *,
    dtype: Any = jnp.bfloat16,
    interpret: Any = None,
    config: tuning.FewRows | None = None,
) -> jax.Array:
    """`matmul` of each tile of rows with the weights of its expert; reads no others.

    Args:
      x: int8 [P, K], in the order of a `RoutingPlan`.
      x_scales: float32 [P].
      values: int8 [E, N, K].
      scales: float32 [E, N].
      tile_expert: int32 [tiles], the expert of each tile of P / tiles rows.
      used_tiles: int32 [], how many tiles hold a row: the first ones; None: all.

    Returns:
      [P, N]; tiles from `used_tiles` on are not written, whatever is in the memory stays there.
    """
    tiles = tile_expert.shape[0]
    config = config or tuning.few_rows(x.shape[0] // tiles, values.shape[1], tiles, x.shape[1])
    plan = plan_of(tile_expert, used_tiles)
    return call(plan, x, x_scales, values, scales, dtype=dtype, interpret=interpret, config=config)


@functools.partial(jax.jit, static_argnames=("dtype", "interpret", "config"))
def call(plan, x, x_scales, values, scales, *, dtype, interpret, config) -> jax.Array:
    """The kernel, with or without a plan (experts of the tiles, how many are used)."""
    existing = values.shape[1]
    if interpret is not None:  # rows past the end of an expert's, which a strip may have
        values, scales = whole_strips(values, config), whole_strips(scales, config)
    experts, rows, columns = values.shape
    free, axes = sharing(config)
    kernel = plgpu.kernel(
        functools.partial(
            body, config=config, rows=rows, columns=columns, grouped=bool(plan), interpret=interpret is not None
        ),
        out_type=jax.ShapeDtypeStruct((x.shape[0], rows), dtype),
        scratch_types=(
            plgpu.SMEM((config.stages, config.blocks, config.rows, BLOCK), values.dtype, transforms=SWIZZLE),
            plgpu.SMEM((config.stages, config.blocks, config.tile, BLOCK), x.dtype, transforms=SWIZZLE),
            plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            free,
        ),
        grid=(config.ctas // config.cluster,),
        grid_names=("cta",),
        **axes,
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=interpret,
        kernel_name="few_rows_int8",
    )
    values = in_lines(values.reshape(experts * rows, columns))
    out = kernel(*plan, in_lines(x), x_scales, values, scales.reshape(experts * rows))
    return out[:, :existing]
