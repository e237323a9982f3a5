"""Bfloat16 and INT8 in products of many rows: the tensor cores add up the whole of K by themselves.

A step of K is under way while the next is started. INT8 has one scale for each row and each column, which the exact
sums, whole numbers, are multiplied by at a tile's end.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.matmul.many_rows import BLOCK, COLUMNS, PART, Refs, Stage, slot_of

ROW = plgpu.Layout.WGMMA.reduce(1)
"""The layout of an array with a value for each row of a matrix in registers."""
COLUMN = plgpu.Layout.WGMMA.reduce(0)
"""The same for each column."""


class Bf16Stage(Stage):
    """The stage of `many_rows` for weights that are not quantised."""

    accumulator: ClassVar[Any] = jnp.float32

    def scales_of(self, refs: Refs, row: Any, column: Any, expert: Any) -> Any:
        """Returns what `scaled` takes, loaded before the last product is waited for."""
        return None

    def scaled(self, sums: list[Any], scales: Any) -> list[Any]:
        """Returns float32 sums of the warpgroup's `parts`."""
        return sums

    def multiply(self, refs: Refs, row: Any, column: Any, expert: Any, done: Any) -> Any:
        problem, warpgroup = self.problem, lax.axis_index("warpgroup")
        by_rows, rows = problem.config.by_rows, problem.config.rows

        def product(accumulator):
            def step(k, _):
                number = done + k
                slot = slot_of(problem, number)
                plgpu.barrier_wait(refs.full_bar.at[slot])
                left, right = refs.left_smem.at[slot], refs.right_smem.at[slot, pl.ds(warpgroup * BLOCK, BLOCK)]
                if by_rows:
                    left, right = refs.left_smem.at[slot, pl.ds(warpgroup * PART, PART)], refs.right_smem.at[slot]
                plgpu.wgmma(accumulator, left, right.transpose((1, 0)))
                plgpu.wgmma_wait(1)

                pl.when(k > 0)(lambda: plgpu.barrier_arrive(refs.free_bar.at[slot_of(problem, number - 1)]))

            lax.fori_loop(0, problem.steps, step, None)
            scales = self.scales_of(refs, row, column, expert)
            total = accumulator[...]
            plgpu.barrier_arrive(refs.free_bar.at[slot_of(problem, done + (problem.steps - 1))])
            return total, scales

        shape = (PART, COLUMNS) if by_rows else (rows, BLOCK)
        total, scales = pl.run_scoped(product, plgpu.ACC(shape, self.accumulator))
        return self.scaled([total[i : i + PART, j : j + BLOCK] for i, j in problem.parts], scales)


class Int8Stage(Bf16Stage):
    """The stage of `many_rows` for INT8."""

    accumulator = jnp.int32

    @staticmethod
    def whole_columns(scales: jax.Array) -> jax.Array:
        """Returns columns' scales [..., N], padded to whole tiles, whose columns past the end nobody stores."""
        return jnp.pad(scales, (*[(0, 0)] * (scales.ndim - 1), (0, -scales.shape[-1] % COLUMNS)))

    def scales_of(self, refs: Refs, row: Any, column: Any, expert: Any) -> tuple[dict[int, Any], dict[int, Any]]:
        """Returns those of the warpgroup's `parts` of a tile, by their first row and by their first column."""
        problem = self.problem
        first_row, first_column = problem.place(lax.axis_index("warpgroup"))
        first_row, first_column = row * problem.config.rows + first_row, column * COLUMNS + first_column
        (column_scales_gmem,) = refs.weight_scales_gmem
        rows, columns = (sorted(set(places)) for places in zip(*problem.parts, strict=True))

        def load(scales_gmem, layout):
            return scales_gmem[...] if problem.interpret else plgpu.load(scales_gmem, layout=layout, optimized=False)

        by_row = {i: load(refs.row_scales_gmem.at[pl.ds(first_row + i, PART)], ROW) for i in rows}
        by_column = {j: load(column_scales_gmem.at[expert, pl.ds(first_column + j, BLOCK)], COLUMN) for j in columns}
        return by_row, by_column

    def scaled(self, sums: list[Any], scales: Any) -> list[Any]:
        """Returns the sums times the product of both scales, as the reference has it."""
        by_row, by_column = scales

        def one(matrix, row_scales, column_scales):
            rows = lax.broadcast_in_dim(row_scales, matrix.shape, [0])
            columns = lax.broadcast_in_dim(column_scales, matrix.shape, [1])
            return matrix.astype(jnp.float32) * (rows * columns)

        return [one(x, by_row[i], by_column[j]) for x, (i, j) in zip(sums, self.problem.parts, strict=True)]
