"""FP8 in products of many rows: each step of K is a fresh product, scaled and added to sums in registers.

Weights have a scale for each block of 128 x 128, rows one for each 128 of K. So each step of K is a fresh product on
the tensor cores, 64 rows at a time, which a warpgroup multiplies by both scales and adds to its float32 sums, while
the product of the other warpgroup runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels import mosaic
from pallas_kernels.matmul.many_rows import BLOCK, COLUMNS, PART, Refs, Stage, slot_of
from pallas_kernels.mosaic import REF, SCALAR, Float, SharedWords
from pallas_kernels.mosaic.wgmma import (
    DIM,
    SWIZZLE,
    SWIZZLED,
    descriptor,
    finish,
    first_row,
    floats,
    numbers_of,
    start_product,
)

MATRIX = plgpu.Layout.WGMMA


def matrix_of(numbers: list[ir.Value], like: Any) -> Any:
    """Returns the array of a thread's numbers, in the layout of `like`: the inverse of `numbers_of`."""
    registers, at = np.empty(like.registers.shape, dtype=object), 0
    for index, register in np.ndenumerate(like.registers):
        size = ir.VectorType(register.type).shape[0]
        registers[index] = vector.from_elements(register.type, numbers[at : at + size])
        at += size
    return mgpu.FragmentedArray(_registers=registers, _layout=like.layout, _is_signed=None)


def device_accumulate(rows: int):
    """Returns `accumulate(left_smem, right_smem, row_scales_smem, sums, weight_scale, slot, warpgroup) -> sums`.

    It is a function of a warpgroup. Its arguments:
      left_smem, right_smem: e4m3 [stages, rows, 128] and [stages, 256, 128].
      row_scales_smem: float32 [stages, rows].
      sums: float32 [64, 128] in registers for each 64 rows.
      weight_scale: float32, of the warpgroup's 128 columns.
      slot: which stage.
      warpgroup: 0 or 1.
    """
    parts = rows // PART
    result = plgpu.ShapeDtypeStruct((PART, BLOCK), jnp.float32, layout=MATRIX)

    @plgpu.inline_mgpu(
        arg_types=(SWIZZLED, SWIZZLED, REF, (MATRIX,) * parts, SCALAR, SCALAR, SCALAR),
        return_type=(result,) * parts,
    )
    def accumulate(ctx, left_smem, right_smem, row_scales_smem, sums, weight_scale, slot, warpgroup):
        del ctx
        weight_scale = Float(weight_scale.registers.item())
        slot, warpgroup = mosaic.scalar(slot), mosaic.scalar(warpgroup)
        a = descriptor(mosaic.shared_address(left_smem) + slot * (rows * DIM))
        b = descriptor(mosaic.shared_address(right_smem) + slot * (COLUMNS * DIM) + warpgroup * (BLOCK * DIM))
        thread = mosaic.thread_index() & 127
        row = first_row(thread)  # and the row 8 further on
        scales_at = SharedWords(row_scales_smem).part(slot * rows + row)
        product: list[ir.Value] | None = None
        added = []
        for part in range(parts):
            product = start_product(arith.addi(a, mosaic.i64(part * PART * DIM >> 4)), b, BLOCK, into=product)
            at = [scales_at.address(part * PART + i) for i in (0, 8)]
            scales = [Float(floats("ld.shared.f32 $0, [$1];", 1, x)[0]) * weight_scale for x in at]
            product = finish(product, flying=0)
            total = [
                Float(x).times_plus(scales[(i >> 1) & 1], Float(before)).value
                for i, (x, before) in enumerate(zip(product, numbers_of(sums[part]), strict=True))
            ]
            added.append(matrix_of(total, sums[part]))
        return tuple(added)

    return accumulate


def interpreted_accumulate(rows: int):
    """Returns the twin of `device_accumulate`."""

    def accumulate(left_smem, right_smem, row_scales_smem, sums, weight_scale, slot, warpgroup):
        a = left_smem[slot].astype(jnp.float32)
        b = right_smem[slot, pl.ds(warpgroup * BLOCK, BLOCK), :].astype(jnp.float32)
        scales = row_scales_smem[slot] * weight_scale
        # Ordinary loads, which the next copy into the slot must not overtake.
        plgpu.commit_smem()
        product = jnp.dot(a, b.T, precision="highest") * scales[:, None]
        return tuple(x + product[i * PART : (i + 1) * PART] for i, x in enumerate(sums))

    return accumulate


@dataclasses.dataclass(frozen=True)
class Fp8Stage(Stage):
    """The stage of `many_rows`."""

    copies = 1
    transforms = SWIZZLE

    def __post_init__(self) -> None:
        if self.problem.config.by_rows:
            raise ValueError(f"FP8 products take no tiles by rows: {self.problem.config}")

    @property
    def shared(self) -> list[Any]:
        """The rows' scales."""
        config = self.problem.config
        return [plgpu.SMEM((config.stages, config.rows), jnp.float32)]

    def load(self, refs: Refs, slot: Any, row: Any, k: Any) -> None:
        rows, (row_scales_smem,) = self.problem.config.rows, refs.stage_smem
        row_scales_gmem = refs.row_scales_gmem.at[k, pl.ds(row * rows, rows)]
        plgpu.copy_gmem_to_smem(row_scales_gmem, row_scales_smem.at[slot], refs.full_bar.at[slot])

    def weight_scales_of(self, refs: Refs, expert: Any, column: Any) -> Callable[[Any], Any]:
        """Returns `scale(k)` of the warpgroup's 128 columns."""
        warpgroup = lax.axis_index("warpgroup")
        if self.problem.weights == 2:
            first_gmem, second_gmem = refs.weight_scales_gmem
            is_first = warpgroup == 0
            return lambda k: lax.cond(
                is_first, lambda: first_gmem[expert, column, k], lambda: second_gmem[expert, column, k]
            )
        last_block = -(-self.problem.columns // BLOCK) - 1
        block = jnp.minimum(column * (COLUMNS // BLOCK) + warpgroup, last_block)
        return lambda k: refs.weight_scales_gmem[0][expert, block, k]

    def multiply(self, refs: Refs, row: Any, column: Any, expert: Any, done: Any) -> Any:
        problem, warpgroup = self.problem, lax.axis_index("warpgroup")
        accumulate = (interpreted_accumulate if problem.interpret else device_accumulate)(problem.config.rows)
        weight_scale = self.weight_scales_of(refs, expert, column)

        def step(k, state):
            sums, scale = state
            number = done + k
            slot = slot_of(problem, number)
            # A step early, because of its latency.
            following = weight_scale(jnp.minimum(k + 1, problem.steps - 1))
            plgpu.barrier_wait(refs.full_bar.at[slot])
            operands = refs.left_smem, refs.right_smem, *refs.stage_smem
            sums = accumulate(*operands, tuple(sums), scale, slot, warpgroup)
            plgpu.barrier_arrive(refs.free_bar.at[slot])
            return tuple(sums), following

        empty = jnp.zeros((PART, BLOCK), jnp.float32)
        start = tuple(
            empty if problem.interpret else plgpu.layout_cast(empty, MATRIX) for _ in range(problem.config.rows // PART)
        )
        first_scale = weight_scale(column * 0)
        sums, _ = lax.fori_loop(0, problem.steps, step, (start, first_scale))
        return sums
