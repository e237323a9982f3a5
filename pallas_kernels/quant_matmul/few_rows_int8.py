"""int8 products with few rows on Hopper: the weights are read once, at the speed of device memory.

As `few_rows.py`, with whole numbers: sums over all of K are exact, and the scales (one a token, one a weight row) come
at an item's end.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import mosaic, tuning
from pallas_kernels.mosaic import REF, SCALAR, Float, Word
from pallas_kernels.quant_matmul.few_rows import TILES
from pallas_kernels.quant_matmul.few_rows_tile import (
    BLOCK,
    first_column,
    layout_of,
    pack,
    store_number,
    unpack,
)
from pallas_kernels.quant_matmul.weight_stream import stream
from pallas_kernels.wgmma import SWIZZLE, SWIZZLED, descriptor, first_row


def start_product(left: ir.Value, right: ir.Value, columns: int) -> list[Word]:
    """Starts D[64, columns] = left[64, 128] right[columns, 128]^T of int8 (descriptors), int32."""
    count = columns // 2
    names = "{" + ", ".join(f"${i}" for i in range(count)) + "}"
    text = (
        "{ .reg .b64 a, b; .reg .pred first, later; setp.ne.b32 first, 0, 0; setp.ne.b32 later, 1, 0;\n"
        "wgmma.fence.sync.aligned;\n"
    )
    for k in range(BLOCK // 32):
        text += (
            f"add.s64 a, ${count}, {2 * k}; add.s64 b, ${count + 1}, {2 * k};\n"
            f"wgmma.mma_async.sync.aligned.m64n{columns}k32.s32.s8.s8 {names}, a, b, {'later' if k else 'first'};\n"
        )
    return mosaic.ptx_words(text + "wgmma.commit_group.sync.aligned; }", count, left, right)


def finish(product: list[Word], flying: int) -> list[Word]:
    """Waits until no more than `flying` younger products are under way."""
    mosaic.ptx(f"wgmma.wait_group.sync.aligned {flying};")
    # The registers become new values here, so that no use of them moves before the wait.
    count, word = len(product), mosaic.integer(32)
    tie = ",".join(["=r"] * count + [str(i) for i in range(count)])
    values = [x.value for x in product]
    found = llvm.inline_asm(llvm.StructType.get_literal([word] * count), values, "", tie, has_side_effects=True)
    return [Word(llvm.extractvalue(word, found, [i])) for i in range(count)]


def stage_function(config: tuning.FewRows):
    """`stage(weights, x, sums, slot, warpgroup)`: the sums and the products of a stage; see `few_rows_tile`."""
    layout = layout_of(config)

    @plgpu.inline_mgpu(
        arg_types=(SWIZZLED, SWIZZLED, layout, SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct((64 * config.tile,), jnp.int32, layout=layout),
    )
    def stage(ctx, weights, x, sums, slot, warpgroup):
        del ctx
        sums = unpack(sums, Word)
        slot, warpgroup = map(mosaic.scalar, (slot, warpgroup))
        row = slot * (config.blocks * config.rows) + (warpgroup << 6)
        left = descriptor(mosaic.shared_address(weights) + row * BLOCK)
        right = descriptor(mosaic.shared_address(x) + slot * (config.blocks * config.tile * BLOCK))

        def start(block):
            a = arith.addi(left, mosaic.i64(block * config.rows * BLOCK >> 4))
            b = arith.addi(right, mosaic.i64(block * config.tile * BLOCK >> 4))
            return start_product(a, b, config.tile)

        flying = start(0)
        for block in range(config.blocks):
            product, more = flying, block + 1 < config.blocks
            if more:
                flying = start(block + 1)
            sums = [a + b for a, b in zip(sums, finish(product, flying=1 if more else 0), strict=True)]
        return pack(sums, layout)

    return stage


def stage_twin(config: tuning.FewRows):
    """`stage_function` for the interpreter."""
    own = min(64, config.rows)

    def stage(weights, x, sums, slot, warpgroup):
        left = [
            weights[slot, pl.ds(i * config.rows + warpgroup * own, own), :].astype(jnp.int32)
            for i in range(config.blocks)
        ]
        right = x[slot].astype(jnp.int32)
        # Ordinary loads, which the next copy into the slot must not overtake.
        plgpu.commit_smem()
        sums = sums.reshape(64, config.tile)
        for i in range(config.blocks):
            part = jnp.dot(left[i], right[i * config.tile : (i + 1) * config.tile].T)
            sums = sums + jnp.pad(part, ((0, 64 - own), (0, 0)))
        return sums.reshape(-1)

    return stage


def store_function(config: tuning.FewRows, tokens: int, rows: int, dtype: Any):
    """`store(out [tokens, rows], x_scales [tokens], scales [rows], sums, token, row, warpgroup)`."""
    layout = layout_of(config)
    size = jnp.dtype(dtype).itemsize

    @plgpu.inline_mgpu(arg_types=(REF, REF, REF, layout, SCALAR, SCALAR, SCALAR))
    def store(ctx, out, x_scales, scales, sums, token, row, warpgroup):
        del ctx
        token, row, warpgroup = map(mosaic.scalar, (token, row, warpgroup))
        thread = mosaic.thread_index() & 127
        own = first_row(thread)
        token, row = token + first_column(thread), row + (warpgroup << 6) + own
        base = mosaic.offset(mosaic.offset(mosaic.global_address(out), token, rows * size), row, size)

        def scale(ref, index, last):
            at = mosaic.offset(mosaic.global_address(ref), index.min(last), 4)
            return Float.of_bits(mosaic.load_read_only(at)[0])

        row_scales = [scale(scales, row + 8 * i, rows - 1) for i in range(2)]
        token_scales = [
            scale(x_scales, token + (8 * i + j), tokens - 1) for i in range(config.tile // 8) for j in range(2)
        ]
        for i, x in enumerate(unpack(sums, Word)):
            column, below = 8 * (i // 4) + i % 2, 8 * (i // 2 % 2)
            factor = token_scales[2 * (i // 4) + i % 2] * row_scales[i // 2 % 2]
            number = Float(arith.sitofp(ir.F32Type.get(), x.value)) * factor
            there = (token + column < tokens) & (own + below < config.rows)
            at = arith.addi(base, mosaic.i64((column * rows + below) * size))
            store_number(at, number, there, dtype)

    return store


def store_twin(config: tuning.FewRows, tokens: int, rows: int, dtype: Any):
    """`store_function` for the interpreter; whole tiles only."""
    del tokens, rows
    own = min(64, config.rows)

    def store(out, x_scales, scales, sums, token, row, warpgroup):
        at, of = pl.ds(token, config.tile), pl.ds(row + warpgroup * own, own)
        part = sums.reshape(64, config.tile)[:own].T.astype(jnp.float32)
        out[at, of] = (part * (x_scales[at][:, None] * scales[of][None])).astype(dtype)

    return store


def body(x, x_scales, weights, scales, out, w_s, x_s, full, free, *, config, interpret):
    """See the module."""
    rows, columns = weights.shape
    add = (stage_twin if interpret else stage_function)(config)
    write = (store_twin if interpret else store_function)(config, *out.shape, out.dtype)

    def load(slot, expert, token, row, step):
        del expert
        for i in range(config.blocks):
            k = pl.ds((step * config.blocks + i) * BLOCK, BLOCK)
            at = pl.ds(i * config.rows, config.rows)
            plgpu.copy_gmem_to_smem(weights.at[pl.ds(row, config.rows), k], w_s.at[slot, at], full.at[slot])
            at = pl.ds(i * config.tile, config.tile)
            plgpu.copy_gmem_to_smem(x.at[pl.ds(token, config.tile), k], x_s.at[slot, at], full.at[slot])

    stream(
        config,
        strips=rows // config.rows,
        steps=columns // (BLOCK * config.blocks),
        plan=(),
        load=load,
        start=lambda: plgpu.layout_cast(jnp.zeros((64 * config.tile,), jnp.int32), layout_of(config)),
        add=lambda sums, slot, step, warpgroup: add(w_s, x_s, sums, slot, warpgroup),
        store=functools.partial(write, out, x_scales, scales),
        barriers=(full, free),
    )


def unsupported(x: jax.Array, values: jax.Array) -> str | None:
    """What the kernel does not take of x [M, K], quantised or not, and values [N, K]; None if it takes all."""
    rows, columns = values.shape
    if values.dtype != jnp.int8:
        return f"weights of dtype {values.dtype}; it takes int8"
    if rows % 64 or columns % (4 * BLOCK):
        return f"weights of shape {values.shape}; it takes N in multiples of 64 and K in multiples of {4 * BLOCK}"
    if not 1 <= x.shape[0] <= TILES[-1]:
        return f"x of shape {x.shape}; it takes 1 to {TILES[-1]} rows"
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
    config = config or tuning.few_rows(next(tile for tile in TILES if tile >= tokens), values.shape[0], 1)
    if values.shape[0] % config.rows:
        raise ValueError(f"strips of {config.rows} rows do not fit into weights of shape {values.shape}")
    if interpret is not None:  # rows past the end of x: zeros from the copies, which the interpreter would not take
        x, x_scales = jnp.pad(x, ((0, config.tile - tokens), (0, 0))), jnp.pad(x_scales, (0, config.tile - tokens))
    kernel = plgpu.kernel(
        functools.partial(body, config=config, interpret=interpret is not None),
        out_type=jax.ShapeDtypeStruct((x.shape[0], values.shape[0]), dtype),
        scratch_types=(
            plgpu.SMEM((config.stages, config.blocks * config.rows, BLOCK), values.dtype, transforms=SWIZZLE),
            plgpu.SMEM((config.stages, config.blocks * config.tile, BLOCK), x.dtype, transforms=SWIZZLE),
            plgpu.Barrier(num_arrivals=2 * config.blocks, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
        ),
        grid=(config.ctas,),
        grid_names=("cta",),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )
    return kernel(x, x_scales, values, scales)[:tokens]
