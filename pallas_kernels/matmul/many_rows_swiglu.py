"""Gate and up as one product of many rows: SwiGLU, and quantisation, where a tile's sums are.

A tile's 256 columns are 128 of the gate, in warpgroup 0, and the same 128 of up, in warpgroup 1. At a tile's end each
rounds its sums to bfloat16, keeps those of half of the rows, and hands the others over through shared memory: a thread
of one warpgroup has the same places of its matrix as that thread of the other. Then each has both for its rows.

The 128 columns are one quantisation group of a row, and the four lanes of a quad have all of them. The quad sorts its
values by shuffles, so that a lane stores 16 bytes, a quad 64 in a row: no shared memory is needed on the way out.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from pallas_kernels import mosaic
from pallas_kernels.matmul import reference
from pallas_kernels.matmul.config import ManyRows
from pallas_kernels.matmul.many_rows import BLOCK, MATH, PART, Problem, launch, whole_tiles
from pallas_kernels.matmul.many_rows_fp8 import MATRIX
from pallas_kernels.matmul.swiglu import (
    Epilogue,
    Result,
    high_halves,
    low_halves,
    silu_product,
    store_reference,
    transpose_in_quad,
)
from pallas_kernels.mosaic import REF, SCALAR, Float, Word, fp8
from pallas_kernels.mosaic.wgmma import first_row, numbers_of
from pallas_kernels.quantize.reference import GROUP

WORDS = 16
"""A thread's packed values of a row: 32 of the 128 columns."""


def half_of(rows: int) -> Any:
    """Returns the layout of a warpgroup's half of a tile's rows: a thread has 8 values in a row, then the next one."""
    return plgpu.Layout.WG_STRIDED((rows // 2 * BLOCK,), vec_size=8)


def to_array(words: list[Word], layout: Any) -> Any:
    """Returns a thread's packed bfloat16 values as an array."""
    registers = []
    eight = ir.VectorType.get((8,), ir.BF16Type.get())
    for i in range(0, len(words), 4):
        four = vector.from_elements(ir.VectorType.get((4,), mosaic.integer(32)), [x.value for x in words[i : i + 4]])
        registers.append(vector.bitcast(eight, four))
    return mgpu.FragmentedArray(_registers=np.array(registers, object), _layout=layout.to_mgpu(), _is_signed=None)


def to_words(array: Any) -> list[Word]:
    """Returns a thread's packed values of an array: the inverse of `to_array`."""
    four = ir.VectorType.get((4,), mosaic.integer(32))
    parts = [vector.bitcast(four, x) for x in array.registers.flat]
    return [Word(llvm.extractelement(x, mosaic.i32(i))) for x in parts for i in range(4)]


def halves(sums: list[list[Float]], warpgroup: Word) -> tuple[list[Word], list[Word]]:
    """Returns a thread's sums, of each 64 rows as wgmma leaves them, packed by row: those it keeps and the others."""
    words = []
    for numbers in sums:
        packed = mosaic.pack_bf16(numbers)
        words += packed[::2] + packed[1::2]  # two columns of the first row, then of the one 8 below, and so on
    half = len(words) // 2
    pairs = list(zip(words[:half], words[half:], strict=True))
    takes_first = warpgroup.equals(0)
    return [takes_first.where(x, y) for x, y in pairs], [takes_first.where(y, x) for x, y in pairs]


def device_split(rows: int):
    """Returns `split(sums, warpgroup) -> (kept, others)`: bfloat16, of its own half of the rows and of the other's.

    Of 128 rows, a half is 64 of them. Of 64, it is 8 of each 16: one of a thread's two rows.
    """
    layout = half_of(rows)
    half = plgpu.ShapeDtypeStruct((rows // 2 * BLOCK,), jnp.bfloat16, layout=layout)

    @plgpu.inline_mgpu(arg_types=((MATRIX,) * (rows // PART), SCALAR), return_type=(half, half))
    def split(ctx, sums, warpgroup):
        del ctx
        numbers = [[Float(x) for x in numbers_of(matrix)] for matrix in sums]
        return tuple(to_array(words, layout) for words in halves(numbers, mosaic.scalar(warpgroup)))

    return split


def interpreted_split(rows: int):
    """Returns the twin of `device_split`; a half is in the order of its rows."""

    def split(sums, warpgroup):
        if rows == PART:
            first, second = jnp.swapaxes(sums[0].reshape(4, 2, 8, BLOCK), 0, 1).reshape(2, -1).astype(jnp.bfloat16)
        else:
            first, second = (x.reshape(-1).astype(jnp.bfloat16) for x in sums)
        return jnp.where(warpgroup == 0, first, second), jnp.where(warpgroup == 0, second, first)

    return split


def store_bf16(values: ir.Value, packed: Sequence[Word], lane: Word) -> None:
    """Stores a row's 128 columns from a quad's lanes, which have two of each 8."""
    for i in range(0, WORDS, 4):
        mosaic.store_global(mosaic.offset(values, lane + i, 16), transpose_in_quad(packed[i : i + 4], lane))


def store_fp8(values: ir.Value, packed: Sequence[Word], lane: Word) -> None:
    """Stores the same of a byte each: of each 16 columns, a lane has two of the first 8 and two of the others."""
    for i in range(0, WORDS // 2, 4):
        words = transpose_in_quad(packed[i : i + 4], lane)
        pairs = (words[:2], words[2:])
        words = [half(*pair) for half in (low_halves, high_halves) for pair in pairs]
        mosaic.store_global(mosaic.offset(values, lane + i, 16), words)


def store_half(
    problem: Problem,
    result: Result,
    kept: Sequence[Word],
    received: Sequence[Word],
    outputs: Sequence[ir.Value],
    row: Word,
    column: Word,
    warpgroup: Word,
) -> None:
    """Stores a thread's rows of a tile at the outputs' addresses."""
    rows, width = problem.config.rows, problem.columns
    is_gate, parts = warpgroup.equals(0), rows // PART
    gate = [is_gate.where(x, y) for x, y in zip(kept, received, strict=True)]
    up = [is_gate.where(y, x) for x, y in zip(kept, received, strict=True)]
    thread = mosaic.thread_index() & 127
    lane = thread & 3
    first = row * rows + first_row(thread) + warpgroup * (PART if parts == 2 else 8)
    for i in range(parts):
        words, row = slice(WORDS * i, WORDS * (i + 1)), first + 8 * i
        hidden = silu_product(gate[words], up[words])
        if not result.quantized:
            store_bf16(mosaic.offset(mosaic.offset(outputs[0], row, 2 * width), column, 2 * BLOCK), hidden, lane)
            continue
        packed, scale = fp8.quantize(hidden, 4, result.scale_fmt)
        store_fp8(mosaic.offset(mosaic.offset(outputs[0], row, width), column, BLOCK), packed, lane)
        at = column * problem.rows + row if result.scales_by_group else row * (width // GROUP) + column
        mosaic.store_global(mosaic.offset(outputs[1], at, 4), [scale.bits()], predicate=lane.equals(0))


def device_store(problem: Problem, result: Result):
    """Returns `store(kept, received, outputs, row, column, warpgroup)`; row and column are numbers of tiles."""
    layout = half_of(problem.config.rows)

    @plgpu.inline_mgpu(arg_types=(layout, layout, (REF,) * (1 + result.quantized), SCALAR, SCALAR, SCALAR))
    def store(ctx, kept, received, outputs, *place):
        del ctx
        addresses = [mosaic.global_address(ref) for ref in outputs]
        store_half(problem, result, to_words(kept), to_words(received), addresses, *map(mosaic.scalar, place))

    return store


def interpreted_store(problem: Problem, result: Result):
    """Returns the twin of `device_store`, by the references."""
    rows = problem.config.rows
    # Of 64 rows, a half is 4 times 8 of them.
    pieces, height, distance = (4, 8, 16) if rows == PART else (1, PART, rows)

    def store(kept, received, outputs, row, column, warpgroup):
        gate = jnp.where(warpgroup == 0, kept, received).reshape(-1, BLOCK)
        up = jnp.where(warpgroup == 0, received, kept).reshape(-1, BLOCK)
        hidden = reference.silu_product(gate, up)
        for i in range(pieces):
            tokens = pl.ds(row * rows + i * distance + warpgroup * height, height)
            values = hidden[i * height : (i + 1) * height]
            store_reference(result, outputs, values, tokens, pl.ds(column * BLOCK, BLOCK), column)

    return store


class SwiGLU(Epilogue):
    """The epilogue of `many_rows`: see the module."""

    @property
    def scratch(self) -> tuple[Any, ...]:
        return (
            plgpu.SMEM((MATH, self.problem.config.rows // 2 * BLOCK), jnp.bfloat16),  # what each receives
            plgpu.Barrier(num_arrivals=MATH),  # both have handed over
            plgpu.Barrier(num_arrivals=MATH),  # both have read
        )

    def store(self, refs: tuple[Any, ...], sums: Any, row: Any, column: Any) -> None:
        """Stores a tile."""
        *outputs, received_smem, written_bar, read_bar = refs
        interpret, rows, warpgroup = self.problem.interpret, self.problem.config.rows, lax.axis_index("warpgroup")
        split = (interpreted_split if interpret else device_split)(rows)
        store = (interpreted_store if interpret else device_store)(self.problem, self.result)
        kept, others = split(tuple(sums), warpgroup)
        plgpu.barrier_wait(read_bar)
        received_smem.at[1 - warpgroup][...] = others
        plgpu.barrier_arrive(written_bar)
        plgpu.barrier_wait(written_bar)
        own_smem = received_smem.at[warpgroup]
        received = received_smem[warpgroup] if interpret else plgpu.load(own_smem, layout=half_of(rows))
        plgpu.barrier_arrive(read_bar)
        store(kept, received, tuple(outputs), row, column, warpgroup)


@functools.partial(jax.jit, static_argnames=("stage", "config", "result", "interpret"))
def swiglu(
    x: jax.Array,
    row_scales: jax.Array | None,
    weights: tuple[jax.Array, jax.Array],
    weight_scales: tuple[jax.Array, ...],
    tile_expert: jax.Array | None,
    used_tiles: jax.Array | None,
    *,
    stage: Any,
    config: ManyRows,
    result: Result,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """silu(x gate^T) * (x up^T), each product rounded to bfloat16 first.

    Args:
      x, row_scales, tile_expert, used_tiles, stage, config, interpret: see `many_rows.matmul`.
      weights: gate and up, of x's dtype, each [W, K], or [E, W, K] with `tile_expert`; W a multiple of 128.
      weight_scales: theirs, float32 [..., W / 128, K / 128]; empty for bfloat16.
      result: what becomes of it.

    Returns:
      values [M, W] and, if quantised, scales.
    """
    count, depth = x.shape
    width = weights[0].shape[-2]
    x, row_scales, experts, used = whole_tiles(x, row_scales, tile_expert, used_tiles, config)
    if tile_expert is None:
        weights, weight_scales = jax.tree.map(lambda array: array[None], (weights, weight_scales))
    problem = Problem(x.shape[0], width, depth, x.dtype, config, interpret is not None, weights=2)
    epilogue = SwiGLU(problem, result)
    values, *scales = launch(stage(problem), epilogue, experts, used, x, row_scales, weights, weight_scales, interpret)
    if result.scales_by_group:
        return values[:count], *(x[:, :count] for x in scales)
    return values[:count], *(x[:count] for x in scales)
