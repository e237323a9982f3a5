"""Products of many rows with weights as stored, on Hopper: dense, and grouped by expert.

A CTA takes tiles of 64 or 128 rows by 256 columns of the output, one after the other, each over the whole of K:

  warpgroup 2       copies 128 bytes of K of a tile's rows and of its columns at a time into a ring, ahead of the others
  warpgroups 0, 1   multiply all rows by 128 columns each, or 64 rows by all columns

Two parts are exchanged. A `Stage` is what depends on the scheme: how a warpgroup adds up a tile (`many_rows_fp8.py`,
`many_rows_whole.py`). An `Epilogue` is what becomes of a tile's sums: `Rounded` stores them in bfloat16. A tile's
columns may also be half and half of two weights of one shape, a warpgroup's each, for an epilogue that needs both
products.

Tiles are taken column by column within a group of tiles of rows. What all CTAs work on at a time is then about square:
a panel of the weight that is in L2 serves the group's rows, and these serve some columns. Rows sorted by expert are no
different; a tile's expert only says where its weight is.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.matmul.config import ManyRows

MATH = 2
"""Warpgroups that multiply."""
BLOCK = 128
"""Columns of a warpgroup's part of a tile; of an FP8 weight, also the rows and columns of a block."""
PART = 64
"""Rows of a product."""
COLUMNS = 256
"""Of a tile."""
PIECE = 64
"""Columns of a tile of bfloat16 in shared memory: 128 bytes."""


def tiled(dtype: Any) -> Any:
    """Returns the layout in shared memory of what Pallas multiplies or copies: rows of 128 bytes."""
    width = 128 // jnp.dtype(dtype).itemsize
    return (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a kernel is compiled for: x [rows, depth] times weights [experts, columns, depth], one or two of them.

    All are of `dtype`: float8_e4m3fn, bfloat16 or int8. `interpret`: for Pallas' interpreter, which runs the twins of
    device code.
    """

    rows: int
    columns: int
    depth: int
    dtype: Any
    config: ManyRows
    interpret: bool = False
    weights: int = 1

    def __post_init__(self) -> None:
        if self.config.by_rows and self.weights > 1:
            raise ValueError(f"products of several weights take no tiles by rows: {self.config}")

    @property
    def parts(self) -> list[tuple[int, int]]:
        """First row and column of each [64, 128] of a warpgroup's part of a tile."""
        rows, columns = (PART, COLUMNS) if self.config.by_rows else (self.config.rows, BLOCK)
        return [(row, column) for row in range(0, rows, PART) for column in range(0, columns, BLOCK)]

    def place(self, warpgroup: Any) -> tuple[Any, Any]:
        """Returns the first row and column of a warpgroup's part of a tile."""
        return (warpgroup * PART, 0) if self.config.by_rows else (0, warpgroup * BLOCK)

    @property
    def row_tiles(self) -> int:
        return self.rows // self.config.rows

    @property
    def result_shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def share(self) -> int:
        """A tile's columns of each weight."""
        return COLUMNS // self.weights

    @property
    def column_tiles(self) -> int:
        return -(-self.columns // self.share)

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
    def ctas(self) -> int:
        return min(self.row_tiles * self.column_tiles, self.config.ctas)


class Refs(NamedTuple):
    """A kernel's refs. `experts_gmem`, `used_gmem` and `row_scales_gmem` may be None, `weight_scales_gmem` empty.

    `stage_smem` is the stage's own scratch.
    """

    experts_gmem: Any
    used_gmem: Any
    x_gmem: Any
    row_scales_gmem: Any
    weights_gmem: tuple[Any, ...]
    weight_scales_gmem: tuple[Any, ...]
    epilogue: tuple[Any, ...]
    left_smem: Any
    right_smem: Any
    stage_smem: tuple[Any, ...]
    full_bar: Any
    free_bar: Any


@dataclasses.dataclass(frozen=True)
class Stage(abc.ABC):
    """What of the kernel depends on the scheme: one class a scheme, made of a `Problem`.

    Attributes:
      copies: its own, into a slot of the ring.
      shared: its scratch in shared memory, besides rows and weights.
    """

    problem: Problem
    copies: ClassVar[int] = 0
    shared: ClassVar[Any] = ()

    @property
    def transforms(self) -> Any:
        """The layout of both operands in shared memory."""
        return tiled(self.problem.dtype)

    @staticmethod
    def whole_columns(scales: jax.Array) -> jax.Array:
        """Returns a weight's scales as the kernel takes them."""
        return scales

    def load(self, refs: Refs, slot: Any, row: Any, k: Any) -> None:
        """Starts its own copies of a step of K."""
        return

    @abc.abstractmethod
    def multiply(self, refs: Refs, row: Any, column: Any, expert: Any, done: Any) -> Any:
        """Returns a warpgroup's float32 sums of a tile, [64, 128] for each of its `parts`; `done`: steps before it."""


class Epilogue(Protocol):
    """What a warpgroup does with its sums of a tile. Its refs are the outputs and its scratch, in this order."""

    @property
    def outputs(self) -> tuple[jax.ShapeDtypeStruct, ...]: ...

    @property
    def scratch(self) -> tuple[Any, ...]: ...

    def begin(self, refs: tuple[Any, ...]) -> None:
        """Runs before the first tile."""

    def store(self, refs: tuple[Any, ...], sums: Any, row: Any, column: Any) -> None:
        """Stores a tile: float32 sums [64, 128] for each of the warpgroup's `parts`."""

    def end(self, refs: tuple[Any, ...]) -> None:
        """Runs after the last tile."""


@dataclasses.dataclass(frozen=True)
class Rounded:
    """The epilogue that stores sums in bfloat16 [rows, columns], through shared memory."""

    problem: Problem

    @property
    def outputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return (jax.ShapeDtypeStruct((self.problem.rows, self.problem.columns), jnp.bfloat16),)

    @property
    def scratch(self) -> tuple[Any, ...]:
        return (plgpu.SMEM((MATH, BLOCK // PIECE, PART, PIECE), jnp.bfloat16, transforms=tiled(jnp.bfloat16)),)

    def begin(self, refs: tuple[Any, ...]) -> None:
        """Does nothing."""

    def store(self, refs: tuple[Any, ...], sums: Any, row: Any, column: Any) -> None:
        """Rounds and stores a warpgroup's part of a tile, in pieces of 64 x 64 through two buffers."""
        out_gmem, staged_smem = refs
        problem, warpgroup = self.problem, lax.axis_index("warpgroup")
        first_row, first_column = problem.place(warpgroup)
        first_row, first_column = row * problem.config.rows + first_row, column * COLUMNS + first_column
        # How many later copies may be under way when a buffer is used again. A part of which only one piece is stored
        # has no later one.
        later = 1 if problem.columns % BLOCK == 0 else 0

        def store_piece(matrix: Any, row: Any, column: Any, half: int) -> None:
            buffer = staged_smem.at[warpgroup, half]
            plgpu.wait_smem_to_gmem(later, wait_read_only=True)
            buffer[...] = matrix[:, half * PIECE : (half + 1) * PIECE].astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffer, out_gmem.at[pl.ds(row, PART), pl.ds(column, PIECE)])

        for (row_of_part, column_of_part), matrix in zip(problem.parts, sums, strict=True):
            for half in range(BLOCK // PIECE):
                piece = first_column + (column_of_part + half * PIECE)

                @pl.when(piece < problem.columns)
                def _(matrix=matrix, row=first_row + row_of_part, column=piece, half=half):
                    store_piece(matrix, row, column, half)

    def end(self, refs: tuple[Any, ...]) -> None:
        """Waits for the last copies."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


# ---- the kernel --------------------------------------------------------------------------------------------------


def slot_of(problem: Problem, number: Any) -> Any:
    """Returns the slot of the ring of a CTA's `number`-th step."""
    return lax.rem(number, jnp.int32(problem.config.stages))


def run(stage: Stage, epilogue: Epilogue, refs: Refs) -> None:
    """One CTA's program."""
    problem, warpgroup = stage.problem, lax.axis_index("warpgroup")
    math_registers, copy_registers = problem.config.registers

    def multiply(row, column, expert, done):
        epilogue.store(refs.epilogue, stage.multiply(refs, row, column, expert, done), row, column)

    @pl.when(warpgroup < MATH)
    def _():
        plgpu.set_max_registers(math_registers, action="increase")
        epilogue.begin(refs.epilogue)
        for_tiles(problem, refs, multiply)
        epilogue.end(refs.epilogue)

    @pl.when(warpgroup == MATH)
    def _():
        plgpu.set_max_registers(copy_registers, action="decrease")
        for_tiles(problem, refs, functools.partial(copy, stage, refs))
        drain(problem, refs)


def for_tiles(problem: Problem, refs: Refs, f: Any) -> None:
    """Calls `f(row tile, column tile, expert, steps done before)` for each of this CTA's tiles."""
    cta = lax.axis_index("cta")
    group, column_tiles = problem.config.group, problem.column_tiles

    def one(i, _):
        index = cta + i * problem.ctas
        whole = lax.div(index, jnp.int32(group * column_tiles))
        within = index - whole * (group * column_tiles)
        side_by_side = jnp.minimum(row_tiles_used(problem, refs) - whole * group, group)
        column = lax.div(within, side_by_side)
        row = whole * group + within - column * side_by_side
        expert = index * 0 if refs.experts_gmem is None else refs.experts_gmem[row]
        f(row, column, expert, i * problem.steps)

    lax.fori_loop(0, tile_count(problem, refs), one, None)


def row_tiles_used(problem: Problem, refs: Refs) -> Any:
    """Returns how many tiles of rows hold some."""
    if refs.used_gmem is None:
        return jnp.int32(problem.row_tiles)
    return jnp.clip(refs.used_gmem[0], 0, problem.row_tiles)


def tile_count(problem: Problem, refs: Refs) -> Any:
    """Returns how many tiles this CTA has."""
    rest = row_tiles_used(problem, refs) * problem.column_tiles - lax.axis_index("cta") + (problem.ctas - 1)
    return lax.div(jnp.maximum(rest, 0), jnp.int32(problem.ctas))


def copy(stage: Stage, refs: Refs, row: Any, column: Any, expert: Any, done: Any) -> None:
    """Starts all copies of a tile, as slots become free."""
    problem = stage.problem
    rows, box, stages = problem.config.rows, problem.box, problem.config.stages

    def step(k, _):
        number = done + k
        slot = slot_of(problem, number)

        pl.when(number >= stages)(lambda: plgpu.barrier_wait(refs.free_bar.at[slot]))
        depth, full_bar = pl.ds(k * problem.step, problem.step), refs.full_bar.at[slot]
        plgpu.copy_gmem_to_smem(refs.x_gmem.at[pl.ds(row * rows, rows), depth], refs.left_smem.at[slot], full_bar)
        for at in range(0, COLUMNS, box):
            weight_gmem, i = refs.weights_gmem[at // problem.share], at % problem.share
            # A box past the end takes columns that nobody stores.
            first = jnp.minimum(column * problem.share + i, problem.columns - box)
            plgpu.copy_gmem_to_smem(
                weight_gmem.at[expert, pl.ds(first, box), depth], refs.right_smem.at[slot, pl.ds(at, box)], full_bar
            )
        stage.load(refs, slot, row, k)

    lax.fori_loop(0, problem.steps, step, None)


def drain(problem: Problem, refs: Refs) -> None:
    """Waits for the last phases of the barriers, before their memory goes."""
    used = tile_count(problem, refs) * problem.steps
    first = jnp.maximum(used - problem.config.stages, 0)
    lax.fori_loop(first, used, lambda i, _: plgpu.barrier_wait(refs.free_bar.at[slot_of(problem, i)]), None)


def launch(
    stage: Stage,
    epilogue: Epilogue,
    experts: jax.Array | None,
    used: jax.Array | None,
    x: jax.Array,
    row_scales: jax.Array | None,
    weights: tuple[jax.Array, ...],
    weight_scales: tuple[jax.Array, ...],
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """Runs the kernel of whole tiles; returns the epilogue's outputs."""
    problem, config = stage.problem, stage.problem.config
    arrays = [experts, used, x, row_scales, *weights, *weight_scales]
    is_present = [array is not None for array in arrays]

    def body(*refs: Any) -> None:
        remaining = iter(refs)

        def take(count: int) -> tuple[Any, ...]:
            return tuple(next(remaining) for _ in range(count))

        experts, used, x, row_scales, *others = (next(remaining) if present else None for present in is_present)
        every = Refs(
            experts,
            used,
            x,
            row_scales,
            weights_gmem=tuple(others[: len(weights)]),
            weight_scales_gmem=tuple(others[len(weights) :]),
            epilogue=take(len(epilogue.outputs) + len(epilogue.scratch)),
            left_smem=next(remaining),
            right_smem=next(remaining),
            stage_smem=take(len(stage.shared)),
            full_bar=next(remaining),
            free_bar=next(remaining),
        )
        run(stage, epilogue, every)

    copies = 1 + COLUMNS // problem.box + stage.copies
    return plgpu.kernel(
        body,
        out_type=epilogue.outputs,
        scratch_types=[
            *epilogue.scratch,
            plgpu.SMEM((config.stages, config.rows, problem.step), x.dtype, transforms=stage.transforms),
            plgpu.SMEM((config.stages, COLUMNS, problem.step), weights[0].dtype, transforms=stage.transforms),
            *stage.shared,
            plgpu.Barrier(num_arrivals=copies, num_barriers=config.stages),  # a slot is full
            plgpu.Barrier(num_arrivals=MATH, num_barriers=config.stages),  # a slot is free
        ],
        grid=(problem.ctas,),
        grid_names=("cta",),
        num_threads=MATH + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=interpret,
        kernel_name="many_rows" if len(weights) == 1 else "many_rows_swiglu",
    )(*[array for array in arrays if array is not None])


def whole_tiles(
    x: jax.Array,
    row_scales: jax.Array | None,
    tile_expert: jax.Array | None,
    used_tiles: jax.Array | None,
    config: ManyRows,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None, jax.Array | None]:
    """Returns x and row_scales padded to tiles of the config, the experts of those, and how many of them are used."""
    if tile_expert is None:
        pad = -x.shape[0] % config.rows
        if pad:
            x = jnp.pad(x, ((0, pad), (0, 0)))
            if row_scales is not None:
                row_scales = jnp.pad(row_scales, (*[(0, 0)] * (row_scales.ndim - 1), (0, pad)))
        return x, row_scales, None, None
    tile = x.shape[0] // tile_expert.shape[0]
    if tile % config.rows:
        raise ValueError(f"an expert's tiles of {tile} rows are not whole tiles of {config.rows}")
    tile_expert = jnp.repeat(tile_expert, tile // config.rows)
    if used_tiles is not None:
        used_tiles = (used_tiles * (tile // config.rows)).astype(jnp.int32).reshape(1)
    return x, row_scales, tile_expert, used_tiles


@functools.partial(jax.jit, static_argnames=("stage", "config", "interpret"))
def matmul(
    x: jax.Array,
    row_scales: jax.Array | None,
    values: jax.Array,
    scales: jax.Array | None,
    tile_expert: jax.Array | None = None,
    used_tiles: jax.Array | None = None,
    *,
    stage: Any,
    config: ManyRows,
    interpret: Any = None,
) -> jax.Array:
    """x times the weight's transpose, or each tile of rows times the transpose of its expert's weight.

    Args:
      x: float8_e4m3fn, int8 or bfloat16 [M, K].
      row_scales: float32 [K / 128, M], multipliers of FP8 rows: a step of K needs one row of them; [M] of int8 rows.
        None for bfloat16.
      values: of x's dtype, [N, K]; [E, N, K] with `tile_expert`. N is a multiple of 64, K of 128 (bfloat16: 64).
      scales: float32 [..., ceil(N / 128), K / 128], multipliers of FP8 weights; [..., N] of int8 weights. None for
        bfloat16.
      tile_expert: int32 [tiles], the expert of each tile of M / tiles rows, a multiple of 64.
      used_tiles: int32 [], how many tiles hold a row, the first ones; None: all. The others' results are not written.
      stage: the class of the scheme's `Stage`.
      config: as `choice.choose` gives it.
      interpret: parameters of Pallas' interpreter, or None for the GPU.

    Returns:
      bfloat16 [M, N], accumulated in float32; of int8, exact sums times the product of both scales in float32, rounded
      once.
    """
    count, depth = x.shape
    columns = values.shape[-2]
    if count == 0:
        return jnp.zeros((0, columns), jnp.bfloat16)
    x, row_scales, experts, used = whole_tiles(x, row_scales, tile_expert, used_tiles, config)
    if tile_expert is None:
        values = values[None]
        scales = None if scales is None else scales[None]
    weight_scales = () if scales is None else (stage.whole_columns(scales),)
    problem = Problem(x.shape[0], columns, depth, x.dtype, config, interpret is not None)
    (out,) = launch(stage(problem), Rounded(problem), experts, used, x, row_scales, (values,), weight_scales, interpret)
    return out[:count]
