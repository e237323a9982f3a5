"""Products of many rows with weights as stored, on Hopper: dense, and grouped by expert.

A CTA takes tiles of 64 or 128 rows by 256 columns of the output, one after the other, each over the whole of K:

  warpgroup 2       copies 128 bytes of K of a tile's rows and of its columns at a time into a ring, ahead of the others
  warpgroups 0, 1   multiply all rows by 128 columns each, or 64 rows by all columns

Weights in FP8 have a scale for each block of 128 x 128, rows one for each 128 of K. So each step of K is a fresh
product on the tensor cores, 64 rows at a time, which a warpgroup then multiplies by both scales and adds to float32
sums in its registers, while the product of the other warpgroup runs. In bfloat16 and int8 the tensor cores add up by
themselves, and a step is under way while the next is started; int8 has one scale for each row and each column, which
the sums of the whole of K are multiplied by.

What becomes of a tile's sums is an epilogue's business: `Rounded` stores them in bfloat16. A tile's columns may also be
half and half of two weights of one shape, a warpgroup's each, for an epilogue that needs both products.

Tiles are taken column by column within a group of tiles of rows. What all CTAs work on at a time is then about square:
a panel of the weight that is in L2 serves the group's rows, and these serve some columns. Rows sorted by expert are no
different; a tile's expert only says where its weight is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tuning
from pallas_kernels.mosaic.wgmma import SWIZZLE
from pallas_kernels.quant_matmul.accumulate import (
    BLOCK,
    COLUMNS,
    PART,
    accumulate_function,
    accumulate_twin,
    start,
)
from pallas_kernels.quant_matmul.many_rows_int8 import COLUMN, ROW, load, scaled, whole_columns

MATH = 2
"""Warpgroups that multiply."""
PIECE = 64
"""Columns of a tile of bfloat16 in shared memory: 128 bytes."""


def tiled(dtype: Any) -> Any:
    """The layout in shared memory of what Pallas multiplies or copies: rows of 128 bytes."""
    width = 128 // jnp.dtype(dtype).itemsize
    return (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a kernel is compiled for: x [rows, depth] times weights [experts, columns, depth], one or two of them.

    All are of `dtype`: float8_e4m3fn, bfloat16 or int8.
    """

    rows: int
    columns: int
    depth: int
    dtype: Any
    config: tuning.ManyRowsMatmul
    weights: int = 1

    def __post_init__(self) -> None:
        if self.config.by_rows and (self.fp8 or self.weights > 1):
            raise ValueError(f"FP8 products, and those of several weights, take no tiles by rows: {self.config}")

    @property
    def fp8(self) -> bool:
        return self.dtype == jnp.float8_e4m3fn

    @property
    def int8(self) -> bool:
        return self.dtype == jnp.int8

    @property
    def parts(self) -> list[tuple[int, int]]:
        """First row and column of each [64, 128] of a warpgroup's part of a tile."""
        rows, columns = (PART, COLUMNS) if self.config.by_rows else (self.config.rows, BLOCK)
        return [(row, column) for row in range(0, rows, PART) for column in range(0, columns, BLOCK)]

    def place(self, warpgroup: Any) -> tuple[Any, Any]:
        """First row and column of a warpgroup's part of a tile."""
        return (warpgroup * PART, 0) if self.config.by_rows else (0, warpgroup * BLOCK)

    @property
    def units(self) -> int:
        """Of rows: a tile for each CTA of a cluster."""
        return self.rows // self.config.unit

    @property
    def share(self) -> int:
        """A tile's columns of each weight."""
        return COLUMNS // self.weights

    @property
    def column_tiles(self) -> int:
        return -(-self.columns // self.share)

    @property
    def items(self) -> int:
        """Of a cluster's work: as many columns of a unit as a tile has."""
        return self.units * self.column_tiles

    @property
    def step(self) -> int:
        """Values of K in 128 bytes."""
        return 128 // jnp.dtype(self.dtype).itemsize

    @property
    def steps(self) -> int:
        return self.depth // self.step

    @property
    def box(self) -> int:
        """Columns of a copy: as many as surely lie within the weight, if one of them does."""
        return next(box for box in (256, 128, 64) if self.columns % box == 0 and box <= self.share)

    @property
    def copies(self) -> int:
        """Into a slot of the ring."""
        return 1 + COLUMNS // self.box + self.fp8

    @property
    def clusters(self) -> int:
        return min(self.items, self.config.ctas // self.config.cluster)


class Epilogue(Protocol):
    """What a warpgroup does with its sums of a tile. Its refs are the outputs and its scratch, in this order."""

    @property
    def outputs(self) -> tuple[jax.ShapeDtypeStruct, ...]: ...

    @property
    def scratch(self) -> tuple[Any, ...]: ...

    def begin(self, refs: tuple[Any, ...]) -> None:
        """Before the first tile."""

    def store(self, refs: tuple[Any, ...], sums: Any, row: Any, column: Any) -> None:
        """Of a tile: float32 sums [64, 128] for each of the warpgroup's `parts`."""

    def end(self, refs: tuple[Any, ...]) -> None:
        """After the last tile."""


@dataclasses.dataclass(frozen=True)
class Rounded:
    """Sums in bfloat16 [rows, columns], through shared memory."""

    problem: Problem

    @property
    def outputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return (jax.ShapeDtypeStruct((self.problem.rows, self.problem.columns), jnp.bfloat16),)

    @property
    def scratch(self) -> tuple[Any, ...]:
        return (plgpu.SMEM((MATH, BLOCK // PIECE, PART, PIECE), jnp.bfloat16, transforms=tiled(jnp.bfloat16)),)

    def begin(self, refs: tuple[Any, ...]) -> None:
        """Nothing."""

    def store(self, refs: tuple[Any, ...], sums: Any, row: Any, column: Any) -> None:
        """Rounds and stores a warpgroup's part of a tile, in pieces of 64 x 64 through two buffers."""
        out, staged = refs
        problem, warpgroup = self.problem, lax.axis_index("warpgroup")
        first_row, first_column = problem.place(warpgroup)
        first_row, first_column = row * problem.config.rows + first_row, column * COLUMNS + first_column
        # How many later copies may be under way when a buffer is used again. A part of which only one piece is stored
        # has no later one.
        later = 1 if problem.columns % BLOCK == 0 else 0

        def store_piece(matrix: Any, row: Any, column: Any, half: int) -> None:
            buffer = staged.at[warpgroup, half]
            plgpu.wait_smem_to_gmem(later, wait_read_only=True)
            buffer[...] = matrix[:, half * PIECE : (half + 1) * PIECE].astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffer, out.at[pl.ds(row, PART), pl.ds(column, PIECE)])

        for (row_of_part, column_of_part), matrix in zip(problem.parts, sums, strict=True):
            for half in range(BLOCK // PIECE):
                piece = first_column + (column_of_part + half * PIECE)

                @pl.when(piece < problem.columns)
                def _(matrix=matrix, row=first_row + row_of_part, column=piece, half=half):
                    store_piece(matrix, row, column, half)

    def end(self, refs: tuple[Any, ...]) -> None:
        """Waits for the last copies."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One CTA's program. The fields after `interpret` are refs, or tuples of them for what there may be several of.

    `experts`, `used` and `row_scales` may be None, `weight_scales` empty. `scales` is the ring of FP8 rows' scales.
    """

    problem: Problem
    epilogue: Epilogue
    interpret: bool
    experts: Any
    used: Any
    x: Any
    row_scales: Any
    weights: tuple[Any, ...]
    weight_scales: tuple[Any, ...]
    ends: tuple[Any, ...]
    left: Any
    right: Any
    scales: Any
    full: Any
    free: Any

    def run(self) -> None:
        warpgroup = lax.axis_index("warpgroup")
        math_registers, copy_registers = self.problem.config.registers

        @pl.when(warpgroup < MATH)
        def _():
            plgpu.set_max_registers(math_registers, action="increase")
            self.epilogue.begin(self.ends)
            self.for_tiles(self.multiply_fp8 if self.problem.fp8 else self.multiply_whole)
            self.epilogue.end(self.ends)

        @pl.when(warpgroup == MATH)
        def _():
            plgpu.set_max_registers(copy_registers, action="decrease")
            self.for_tiles(self.copy)
            self.drain()

    def for_tiles(self, f: Any) -> None:
        """`f(row tile, column tile, expert, steps done before)` of each of this CTA's tiles."""
        problem, cluster = self.problem, lax.axis_index("cluster")
        each = problem.config.cluster
        group, column_tiles = problem.config.group // each, problem.column_tiles
        rank = lax.axis_index("rank") if each > 1 else 0

        def one(i, _):
            index = cluster + i * problem.clusters
            whole = lax.div(index, jnp.int32(group * column_tiles))
            within = index - whole * (group * column_tiles)
            side_by_side = jnp.minimum(self.units() - whole * group, group)
            column = lax.div(within, side_by_side)
            unit = whole * group + within - column * side_by_side
            expert = index * 0 if self.experts is None else self.experts[unit]
            f(unit * each + rank if each > 1 else unit, column, expert, i * problem.steps)

        lax.fori_loop(0, self.tile_count(), one, None)

    def units(self) -> Any:
        """Of rows, those that hold some."""
        if self.used is None:
            return jnp.int32(self.problem.units)
        return jnp.clip(self.used[0], 0, self.problem.units)

    def tile_count(self) -> Any:
        """Tiles of this CTA."""
        clusters = self.problem.clusters
        rest = self.units() * self.problem.column_tiles - lax.axis_index("cluster") + (clusters - 1)
        return lax.div(jnp.maximum(rest, 0), jnp.int32(clusters))

    def slot(self, number: Any) -> Any:
        return lax.rem(number, jnp.int32(self.problem.config.stages))

    # ---- copies ----

    def copy(self, row: Any, column: Any, expert: Any, done: Any) -> None:
        """Starts all copies of a tile, as slots become free."""
        problem = self.problem
        rows, box, stages = problem.config.rows, problem.box, problem.config.stages

        def step(k, _):
            number = done + k
            slot = self.slot(number)

            pl.when(number >= stages)(lambda: plgpu.barrier_wait(self.free.at[slot]))
            depth, full = pl.ds(k * problem.step, problem.step), self.full.at[slot]
            plgpu.copy_gmem_to_smem(self.x.at[pl.ds(row * rows, rows), depth], self.left.at[slot], full)
            for at in range(0, COLUMNS, box):
                weight, i = self.weights[at // problem.share], at % problem.share
                # A box past the end takes columns that nobody stores.
                first = jnp.minimum(column * problem.share + i, problem.columns - box)
                plgpu.copy_gmem_to_smem(
                    weight.at[expert, pl.ds(first, box), depth],
                    self.right.at[slot, pl.ds(at, box)],
                    full,
                    collective_axes="rank" if problem.config.cluster > 1 else None,
                )
            if problem.fp8:
                plgpu.copy_gmem_to_smem(self.row_scales.at[k, pl.ds(row * rows, rows)], self.scales.at[slot], full)

        lax.fori_loop(0, problem.steps, step, None)

    def drain(self) -> None:
        """Waits for the last phases of the barriers, before their memory goes."""
        used = self.tile_count() * self.problem.steps
        first = jnp.maximum(used - self.problem.config.stages, 0)
        lax.fori_loop(first, used, lambda i, _: plgpu.barrier_wait(self.free.at[self.slot(i)]), None)

    # ---- math ----

    def weight_scales_of(self, expert: Any, column: Any) -> Callable[[Any], Any]:
        """`scale(k)` of the warpgroup's 128 columns."""
        warpgroup = lax.axis_index("warpgroup")
        if self.problem.weights == 2:
            first, second = self.weight_scales
            is_first = warpgroup == 0
            return lambda k: lax.cond(is_first, lambda: first[expert, column, k], lambda: second[expert, column, k])
        last_block = -(-self.problem.columns // BLOCK) - 1
        block = jnp.minimum(column * (COLUMNS // BLOCK) + warpgroup, last_block)
        return lambda k: self.weight_scales[0][expert, block, k]

    def multiply_fp8(self, row: Any, column: Any, expert: Any, done: Any) -> None:
        problem, warpgroup = self.problem, lax.axis_index("warpgroup")
        accumulate = (accumulate_twin if self.interpret else accumulate_function)(problem.config.rows)
        weight_scale = self.weight_scales_of(expert, column)

        def step(k, state):
            sums, scale = state
            number = done + k
            slot = self.slot(number)
            # A step early, because of its latency.
            following = weight_scale(jnp.minimum(k + 1, problem.steps - 1))
            plgpu.barrier_wait(self.full.at[slot])
            sums = accumulate(self.left, self.right, self.scales, tuple(sums), scale, slot, warpgroup)
            plgpu.barrier_arrive(self.free.at[slot])
            return tuple(sums), following

        empty = start(problem.config.rows, self.interpret)
        first_scale = weight_scale(column * 0)
        sums, _ = lax.fori_loop(0, problem.steps, step, (empty, first_scale))
        self.epilogue.store(self.ends, sums, row, column)

    def multiply_whole(self, row: Any, column: Any, expert: Any, done: Any) -> None:
        """In bfloat16 and int8."""
        problem, warpgroup = self.problem, lax.axis_index("warpgroup")
        by_rows, rows = problem.config.by_rows, problem.config.rows

        def product(accumulator):
            def step(k, _):
                number = done + k
                slot = self.slot(number)
                plgpu.barrier_wait(self.full.at[slot])
                left, right = self.left.at[slot], self.right.at[slot, pl.ds(warpgroup * BLOCK, BLOCK)]
                if by_rows:
                    left, right = self.left.at[slot, pl.ds(warpgroup * PART, PART)], self.right.at[slot]
                plgpu.wgmma(accumulator, left, right.transpose((1, 0)))
                plgpu.wgmma_wait(1)

                pl.when(k > 0)(lambda: plgpu.barrier_arrive(self.free.at[self.slot(number - 1)]))

            lax.fori_loop(0, problem.steps, step, None)
            scales = self.int8_scales(row, column, expert) if problem.int8 else None
            total = accumulator[...]
            plgpu.barrier_arrive(self.free.at[self.slot(done + (problem.steps - 1))])
            return total, scales

        shape = (PART, COLUMNS) if by_rows else (rows, BLOCK)
        total, scales = pl.run_scoped(product, plgpu.ACC(shape, jnp.int32 if problem.int8 else jnp.float32))
        sums = [total[i : i + PART, j : j + BLOCK] for i, j in problem.parts]
        if problem.int8:
            by_row, by_column = scales
            sums = [scaled(x, by_row[i], by_column[j]) for x, (i, j) in zip(sums, problem.parts, strict=True)]
        self.epilogue.store(self.ends, sums, row, column)

    def int8_scales(self, row: Any, column: Any, expert: Any) -> tuple[dict[int, Any], dict[int, Any]]:
        """Of the warpgroup's `parts` of a tile, by their first row and by their first column."""
        problem = self.problem
        first_row, first_column = problem.place(lax.axis_index("warpgroup"))
        first_row, first_column = row * problem.config.rows + first_row, column * COLUMNS + first_column
        (column_scales,) = self.weight_scales
        rows, columns = (sorted(set(places)) for places in zip(*problem.parts, strict=True))
        by_row = {i: load(self.row_scales.at[pl.ds(first_row + i, PART)], ROW, self.interpret) for i in rows}
        by_column = {
            j: load(column_scales.at[expert, pl.ds(first_column + j, BLOCK)], COLUMN, self.interpret) for j in columns
        }
        return by_row, by_column


def launch(
    problem: Problem,
    epilogue: Epilogue,
    experts: jax.Array | None,
    used: jax.Array | None,
    x: jax.Array,
    row_scales: jax.Array | None,
    weights: tuple[jax.Array, ...],
    weight_scales: tuple[jax.Array, ...],
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """The kernel of whole tiles: the epilogue's outputs."""
    config = problem.config
    axes: dict[str, Any] = {}
    free: Any = plgpu.Barrier(num_arrivals=MATH, num_barriers=config.stages)
    if config.cluster > 1:  # a slot is free when nobody in the cluster reads its own any more
        axes = {"cluster": (config.cluster,), "cluster_names": ("rank",)}
        free = plgpu.ClusterBarrier(collective_axes=("rank",), num_arrivals=MATH, num_barriers=config.stages)
    given = [experts, used, x, row_scales, *weights, *weight_scales]
    present = [array is not None for array in given]
    transforms = SWIZZLE if problem.fp8 else tiled(problem.dtype)
    scratch: list[Any] = [
        plgpu.SMEM((config.stages, config.rows, problem.step), x.dtype, transforms=transforms),
        plgpu.SMEM((config.stages, COLUMNS, problem.step), weights[0].dtype, transforms=transforms),
        *([plgpu.SMEM((config.stages, config.rows), jnp.float32)] if problem.fp8 else []),
        plgpu.Barrier(num_arrivals=problem.copies, num_barriers=config.stages),
        free,
    ]

    def body(*refs: Any) -> None:
        remaining = iter(refs)
        operands = [next(remaining) if there else None for there in present]
        outputs = [next(remaining) for _ in epilogue.outputs]
        ends = (*outputs, *(next(remaining) for _ in epilogue.scratch))
        left, right = next(remaining), next(remaining)
        scales = next(remaining) if problem.fp8 else None
        of_weights, of_scales = operands[4 : 4 + len(weights)], operands[4 + len(weights) :]
        Kernel(
            problem,
            epilogue,
            interpret is not None,
            *operands[:4],
            tuple(of_weights),
            tuple(of_scales),
            ends,
            left,
            right,
            scales,
            *remaining,
        ).run()

    return plgpu.kernel(
        body,
        out_type=epilogue.outputs,
        scratch_types=[*epilogue.scratch, *scratch],
        grid=(problem.clusters,),
        grid_names=("cluster",),
        **axes,
        num_threads=MATH + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=interpret,
        kernel_name="many_rows" if len(weights) == 1 else "many_rows_swiglu",
    )(*[array for array in given if array is not None])


def whole_tiles(
    x: jax.Array,
    row_scales: jax.Array | None,
    tile_expert: jax.Array | None,
    used_tiles: jax.Array | None,
    config: tuning.ManyRowsMatmul,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None, jax.Array | None]:
    """x and row_scales padded to units of the config; the experts of those, and how many of them are used."""
    if tile_expert is None:
        pad = -x.shape[0] % config.unit
        if pad:
            x = jnp.pad(x, ((0, pad), (0, 0)))
            if row_scales is not None:
                row_scales = jnp.pad(row_scales, (*[(0, 0)] * (row_scales.ndim - 1), (0, pad)))
        return x, row_scales, None, None
    tile = x.shape[0] // tile_expert.shape[0]
    if tile % config.unit:
        raise ValueError(f"an expert's tiles of {tile} rows are not whole tiles of {config.unit}")
    tile_expert = jnp.repeat(tile_expert, tile // config.unit)
    if used_tiles is not None:
        used_tiles = (used_tiles * (tile // config.unit)).astype(jnp.int32).reshape(1)
    return x, row_scales, tile_expert, used_tiles


def unsupported(x: jax.Array, weights: jax.Array, dtype: Any, *, tile: int | None = None) -> str | None:
    """What the kernel does not take of these arguments, and what it takes; None if it takes all.

    Args:
      x: [M, K], not quantised.
      weights: [N, K] or [E, N, K].
      dtype: of the weights, float8_e4m3fn, int8 or bfloat16; the input is quantised for the first two.
      tile: rows of an expert's tile, for weights of several experts.
    """
    columns, depth = weights.shape[-2:]
    step = 128 // jnp.dtype(dtype).itemsize
    if x.dtype != jnp.bfloat16:
        return f"rows of {x.dtype}; it takes bfloat16"
    if weights.dtype != dtype:
        return f"weights of {weights.dtype}; it takes {jnp.dtype(dtype).name}"
    if columns == 0 or columns % 64 or depth == 0 or depth % step:
        return f"weights {weights.shape}; it takes [..., N, K] with N a multiple of 64 and K of {step}"
    if tile is not None and (tile == 0 or tile % 64):
        return f"tiles of {tile} rows; it takes multiples of 64"
    if -(-x.shape[0] // 128) * -(-columns // COLUMNS) * (depth // step) >= 2**31:
        return f"rows {x.shape} times weights {weights.shape}; steps of the whole product must number less than 2^31"
    return None


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def many_rows_matmul(
    x: jax.Array,
    row_scales: jax.Array | None,
    weights: jax.Array,
    weight_scales: jax.Array | None,
    tile_expert: jax.Array | None = None,
    used_tiles: jax.Array | None = None,
    *,
    config: tuning.ManyRowsMatmul | None = None,
    interpret: Any = None,
) -> jax.Array:
    """x times the weight's transpose, or each tile of rows times the transpose of its expert's weight.

    Args:
      x: float8_e4m3fn, int8 or bfloat16 [M, K].
      row_scales: float32 [K / 128, M], multipliers of FP8 rows: a step of K needs one row of them; [M] of int8 rows.
        None for bfloat16.
      weights: of x's dtype, [N, K]; [E, N, K] with `tile_expert`. N is a multiple of 64, K of 128 (bfloat16: 64).
      weight_scales: float32 [..., ceil(N / 128), K / 128], multipliers of FP8 weights; [..., N] of int8 weights. None
        for bfloat16.
      tile_expert: int32 [tiles], the expert of each tile of M / tiles rows, a multiple of 64.
      used_tiles: int32 [], how many tiles hold a row, the first ones; None: all. The others' results are not written.
      config: None: as tuned.
      interpret: parameters of Pallas' interpreter, or None for the GPU.

    Returns:
      bfloat16 [M, N], accumulated in float32; of int8, exact sums times the product of both scales in float32, rounded
      once.
    """
    count, depth = x.shape
    columns = weights.shape[-2]
    if count == 0:
        return jnp.zeros((0, columns), jnp.bfloat16)
    tile = None if tile_expert is None else count // tile_expert.shape[0]
    int8 = x.dtype == jnp.int8
    config = config or tuning.many_rows_matmul(count, columns, tile, int8=int8)
    x, row_scales, experts, used = whole_tiles(x, row_scales, tile_expert, used_tiles, config)
    if tile_expert is None:
        weights = weights[None]
        weight_scales = None if weight_scales is None else weight_scales[None]
    if int8 and weight_scales is not None:
        weight_scales = whole_columns(weight_scales)
    problem = Problem(x.shape[0], columns, depth, x.dtype, config)
    scales = () if weight_scales is None else (weight_scales,)
    (out,) = launch(problem, Rounded(problem), experts, used, x, row_scales, (weights,), scales, interpret)
    return out[:count]
