"""A warpgroup's part of a stage of `few_rows`: scaled products of 128 of K each, added up in registers.

The sums of a warpgroup are [64 weight rows, its tokens of the tile]; a thread has, for each 8 tokens, 2 of them for 2
weight rows, which is how wgmma leaves them. A warpgroup whose own rows are fewer uses a part of that: the product reads
rows past them, whatever is there, and nobody looks at the result.
"""

import math
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import mosaic, tuning
from pallas_kernels.mosaic import REF, SCALAR, Float, SharedWords, Word
from pallas_kernels.mosaic.wgmma import SWIZZLED, descriptor, finish, first_row, start_product

BLOCK = 128
"""K of a scale."""
GROUP = 4
"""Scales along K that are copied together: 16 bytes, the least that TMA takes."""


def straddles(rows: int) -> bool:
    """Whether a strip of so many rows may begin or end within the rows of a scale."""
    return BLOCK % rows != 0 and rows % BLOCK != 0


def scale_rows(rows: int) -> int:
    """How many rows of scales a strip of so many rows may need."""
    return (BLOCK - math.gcd(rows, BLOCK) + rows - 1) // BLOCK + 1


def layout_of(config: tuning.FewRows | tuning.FewRowsInt4) -> Any:
    """Of a warpgroup's sums: an array that gives each thread its own."""
    return plgpu.Layout.WG_STRIDED((64 * config.own_tokens,), vec_size=4)


def zeros(config: tuning.FewRows | tuning.FewRowsInt4, dtype: Any = jnp.float32) -> Any:
    """Sums of nothing."""
    return plgpu.layout_cast(jnp.zeros((64 * config.own_tokens,), dtype), layout_of(config))


def part_of(config: tuning.FewRows | tuning.FewRowsInt4, warpgroup: Any) -> tuple[Any, Any]:
    """A warpgroup's first row of a strip, and its first token of a tile."""
    if config.token_parts == 1:
        return warpgroup * config.own, 0
    return warpgroup // config.token_parts * config.own, warpgroup % config.token_parts * config.own_tokens


def unpack(array: Any, kind: Any = Float) -> list[Any]:
    """A thread's numbers: `Float`s, or `Word`s of an int32 array."""
    return [kind(llvm.extractelement(x, mosaic.i32(i))) for x in array.registers.flat for i in range(4)]


def pack(numbers: list[Any], layout: Any) -> Any:
    """The inverse of `unpack`."""
    registers = []
    for i in range(0, len(numbers), 4):
        register = llvm.mlir_undef(ir.VectorType.get((4,), numbers[i].value.type))
        for j in range(4):
            register = llvm.insertelement(register, numbers[i + j].value, mosaic.i32(j))
        registers.append(register)
    return mgpu.FragmentedArray(
        _registers=np.array(registers, dtype=object),
        _layout=layout.to_mgpu(),
        _is_signed=True if isinstance(numbers[0], Word) else None,
    )


def first_column(thread: Word) -> Word:
    """Of each 8 tokens, the first of the thread's two."""
    return (thread & 3) << 1


def tile_function(config: tuning.FewRows, matrices: int = 1):
    """A function of a warpgroup: the sums, and the products of one stage.

    matrices: whose weights share a strip, 1 or 2.

    Its arguments:
      weights, x: e4m3 [stages, blocks, rows, 128] and [stages, blocks, tile, 128] in shared memory.
      x_scales, scales: float32 [stages, tile, 4] and [stages, 8 * matrices, 4] there. A row of `scales` is for 128
        weight rows, the first of them for those that the strip's first row is one of; those of the second matrix begin
        at the eighth.
      sums: as `layout_of`.
      slot: the stage; place: of its first block in the groups of 4 scales; row: the strip's first of the weight;
      warpgroup: its number.
    """
    layout = layout_of(config)

    @plgpu.inline_mgpu(
        arg_types=(SWIZZLED, SWIZZLED, REF, REF, layout, SCALAR, SCALAR, SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct((64 * config.own_tokens,), jnp.float32, layout=layout),
    )
    def tile(ctx, weights, x, x_scales, scales, sums, slot, place, row, warpgroup):
        del ctx
        sums = unpack(sums)
        slot, place, row, warpgroup = map(mosaic.scalar, (slot, place, row, warpgroup))
        own, own_token = part_of(config, warpgroup)
        left = descriptor(mosaic.shared_address(weights) + (slot * (config.blocks * config.rows) + own) * BLOCK)
        # Whole eights of tokens further, which the swizzle does not notice.
        right = descriptor(mosaic.shared_address(x) + (slot * (config.blocks * config.tile) + own_token) * BLOCK)
        column = slot * config.tile + own_token + first_column(mosaic.thread_index())
        own_x_scales = SharedWords(x_scales).part((column << 2) + place)
        if matrices == 2:
            # A warp has 16 of the strip's rows, if any; and no more of a matrix than 128 are in a strip.
            which = [((mosaic.thread_index() >> 5) // (config.rows // 32)).min(1) << 3]
        elif not straddles(config.rows):
            which = [own // BLOCK]
        else:
            # Of a warp's 16 rows, the first eight have one scale, and the others may have the next.
            first = (row & (BLOCK - 1)) + own + first_row(mosaic.thread_index() & 127)
            together = config.rows % 16 == 0 and config.own % 16 == 0
            which = [(first + below) // BLOCK for below in ((0,) if together else (0, 8))]
        own_scales = [SharedWords(scales).part((slot * (8 * matrices) + i) * GROUP + place) for i in which]

        def start(block):
            a = arith.addi(left, mosaic.i64(block * config.rows * BLOCK >> 4))
            b = arith.addi(right, mosaic.i64(block * config.tile * BLOCK >> 4))
            return start_product(a, b, config.own_tokens)

        flying = start(0)
        for block in range(config.blocks):
            product, more = flying, block + 1 < config.blocks
            if more:
                flying = start(block + 1)
            of_rows = [Float.of_bits(own_scale.load(block)) for own_scale in own_scales]
            of_tokens = [
                Float.of_bits(own_x_scales.load(GROUP * (8 * i + j) + block))
                for i in range(config.own_tokens // 8)
                for j in range(2)
            ]
            if len(of_rows) == 1:
                of_tokens, of_rows = [x * of_rows[0] for x in of_tokens], []
            product = finish(product, flying=1 if more else 0)
            # A thread's numbers, for each 8 tokens: two tokens of one weight row, then of the row 8 below.
            for i, x in enumerate(product):
                factor = of_tokens[2 * (i // 4) + i % 2]
                sums[i] = Float(x).times_plus(factor * of_rows[i // 2 % 2] if of_rows else factor, sums[i])
        return pack(sums, layout)

    return tile


def tile_twin(config: tuning.FewRows, matrices: int = 1):
    """`tile_function` for the interpreter."""
    own = config.own

    def tile(weights, x, x_scales, scales, sums, slot, place, row, warpgroup):
        sums = sums.reshape(64, config.own_tokens)
        first, own_token = part_of(config, warpgroup)
        tokens = pl.ds(own_token, config.own_tokens)
        left = [weights[slot, i, pl.ds(first, own), :].astype(jnp.float32) for i in range(config.blocks)]
        right, token_scales = x[slot, :, tokens, :].astype(jnp.float32), x_scales[slot, tokens, :]
        of_strip = first + jnp.arange(own)
        if matrices == 1:
            which, choices = (of_strip + row % BLOCK) // BLOCK, list(range(scale_rows(config.rows)))
        else:
            which, choices = jnp.where(of_strip >= config.rows // 2, 8, 0), [0, 8]
        by_row = sum(jnp.where(which[:, None] == i, scales[slot, pl.ds(i, 1), :], 0) for i in choices)
        # Ordinary loads, which the next copy into the slot must not overtake.
        plgpu.commit_smem()
        for i in range(config.blocks):
            part = jnp.dot(left[i], right[i].T, precision="highest")
            here = jnp.arange(GROUP) == place + i
            column = jnp.where(here, by_row, 0).sum(axis=1)[:, None] * jnp.where(here, token_scales, 0).sum(axis=1)
            sums = sums + jnp.pad(part * column, ((0, 64 - own), (0, 0)))
        return sums.reshape(-1)

    return tile


def store_number(address: ir.Value, x: Float, predicate: Word, dtype: Any) -> None:
    """A float32 or bfloat16 in device memory."""
    text = "{ .reg .pred p; setp.ne.b32 p, $2, 0; "
    if dtype == jnp.float32:
        text += "@p st.global.f32 [$0], $1; }"
    else:
        text += ".reg .b16 h; cvt.rn.bf16.f32 h, $1; @p st.global.b16 [$0], h; }"
    mosaic.ptx(text, address, x.value, predicate.to_word())


def store_function(config: tuning.FewRows | tuning.FewRowsInt4, tokens: int, rows: int, dtype: Any):
    """`store(out [tokens, rows], sums, token, row, warpgroup)`: of a strip and a tile that start there, in `dtype`.

    Nothing of a strip's rows past the end.
    """
    layout = layout_of(config)
    size = jnp.dtype(dtype).itemsize

    @plgpu.inline_mgpu(arg_types=(REF, layout, SCALAR, SCALAR, SCALAR))
    def store(ctx, out, sums, token, row, warpgroup):
        del ctx
        token, row, warpgroup = map(mosaic.scalar, (token, row, warpgroup))
        thread = mosaic.thread_index() & 127
        own = first_row(thread)
        first, own_token = part_of(config, warpgroup)
        row = row + first + own
        token = token + own_token + first_column(thread)
        address = mosaic.offset(mosaic.global_address(out), token, rows * size)
        address = mosaic.offset(address, row, size)
        exists = [(own + below < config.own) & (row + below < rows) for below in (0, 8)]
        for i, x in enumerate(unpack(sums)):
            column, below = 8 * (i // 4) + i % 2, i // 2 % 2
            at = arith.addi(address, mosaic.i64((column * rows + 8 * below) * size))
            store_number(at, x, (token + column < tokens) & exists[below], dtype)

    return store


def store_twin(config: tuning.FewRows | tuning.FewRowsInt4, tokens: int, rows: int, dtype: Any):
    """`store_function` for the interpreter; whole tiles and strips only."""
    del tokens, rows
    own, own_tokens = config.own, config.own_tokens

    def store(out, sums, token, row, warpgroup):
        first, own_token = part_of(config, warpgroup)
        part = sums.reshape(64, own_tokens)[:own].T.astype(dtype)
        out[pl.ds(token + own_token, own_tokens), pl.ds(row + first, own)] = part

    return store
