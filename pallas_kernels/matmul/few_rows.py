"""Products with few rows on Hopper: the weights are read once, at the speed of device memory.

The product is transposed, so that the weights are the large operand of the matrix units: D^T[weight rows, tokens] =
W[weight rows, K] X[tokens, K]^T. The weights lie in shared memory as they lie in device memory, and are never turned
into another form there. The warpgroups of a CTA take different rows, and of many tokens also different tokens; with
four-bit weights they take different parts of K.

An item is a strip of weight rows times one tile of tokens, over all of K (`weight_stream.py`). No item is split between
CTAs, so there is nothing to merge, and results are the same from run to run. A strip has any multiple of 8 rows, so
that all multiprocessors get about as many. The last one may reach past the weight's end, where copies find zeros, or
the next expert's rows, and nothing is stored.

The dense product has one or two tiles; the grouped one has an expert a tile, and stops after the tiles in use.

Two parts are exchanged. A `Stage` is what depends on the scheme: which bytes a stage of K needs, and what a warpgroup
makes of them. An `Epilogue` is what becomes of an item's sums: `Rounded` stores them. A strip may also be half and half
of two weights of one shape, the same rows of both, for an epilogue that needs both products.
"""

import abc
import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.matmul import few_rows_tile as tile_code
from pallas_kernels.matmul.weight_stream import in_lines, plan_of, stream
from pallas_kernels.mosaic.wgmma import SWIZZLE


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a kernel is compiled for: x [tokens, columns] times weights [experts, rows, columns], one or two of them.

    `config`: `FewRows` or `FewRowsInt4`; `interpret`: for Pallas' interpreter, which runs the twins of device code.
    """

    tokens: int
    rows: int
    columns: int
    config: Any
    interpret: bool
    weights: int = 1

    def __post_init__(self) -> None:
        if self.weights > 1 and self.rows % self.share:
            raise ValueError(
                f"strips of {self.config.rows} rows do not fit into {self.weights} weights of {self.rows} rows"
            )

    @property
    def result_shape(self) -> tuple[int, int]:
        return self.tokens, self.rows

    @property
    def share(self) -> int:
        """A strip's rows of each weight."""
        return self.config.rows // self.weights

    def row_of_each(self, row: Any) -> Any:
        """Returns where a strip starts in each weight, which starts at `row` of all of them together."""
        return row if self.weights == 1 else lax.div(row, jnp.int32(self.weights))


class Refs(NamedTuple):
    """A kernel's refs. `plan` holds the tiles' experts and how many tiles are in use, or is empty.

    `x_scales_gmem` is None where rows have no scales; `stage_smem` and `stage_bars` are the stage's own scratch.
    """

    plan: tuple[Any, ...]
    x_gmem: Any
    x_scales_gmem: Any
    weights_gmem: tuple[Any, ...]
    scales_gmem: tuple[Any, ...]
    epilogue: tuple[Any, ...]
    weight_smem: Any
    x_smem: Any
    stage_smem: tuple[Any, ...]
    full_bar: Any
    free_bar: Any
    stage_bars: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Stage(abc.ABC):
    """What of the kernel depends on the scheme: one class a scheme, made of a `Problem`.

    Attributes:
      kernel_name: in profiles.
      copies: that arrive at a slot's barrier.
      shared: its scratch in shared memory, besides weights and tokens.
      barriers: its own.
    """

    problem: Problem
    kernel_name: ClassVar[str]
    shared: ClassVar[Any] = ()
    barriers: ClassVar[Any] = ()
    copies: ClassVar[Any]

    @property
    def weight_lines(self) -> int:
        """Lines of 128 bytes of the weights in a stage."""
        return self.problem.config.blocks

    @property
    def x_lines(self) -> int:
        """Lines of the rows."""
        return self.problem.config.blocks

    @property
    def depth(self) -> int:
        """Values of K in a stage."""
        return 128 * self.problem.config.blocks

    @staticmethod
    @abc.abstractmethod
    def flat_scales(scales: jax.Array) -> jax.Array:
        """Returns a weight's scales [experts, ...] as the kernel takes them."""

    @staticmethod
    @abc.abstractmethod
    def whole_strips(values: jax.Array, scales: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
        """Returns both padded to whole strips of so many rows: the interpreter refuses to copy what is not there."""

    @abc.abstractmethod
    def load(self, refs: Refs, slot: Any, expert: Any, token: Any, row: Any, step: Any) -> None:
        """Starts the copies of a stage into a slot."""

    def start(self) -> Any:
        """Returns the sums that an item begins with."""
        return tile_code.zeros(self.problem.config)

    @abc.abstractmethod
    def add(self, refs: Refs, sums: Any, slot: Any, step: Any, row: Any, warpgroup: Any) -> Any:
        """Returns a warpgroup's sums with those of a stage."""

    @abc.abstractmethod
    def store(self, refs: Refs, epilogue: "Epilogue", sums: Any, token: Any, row: Any, warpgroup: Any) -> None:
        """Hands float32 sums of a whole item to the epilogue."""


class Epilogue(Protocol):
    """What becomes of the sums of an item. Its refs are the outputs and its scratch, in this order."""

    @property
    def outputs(self) -> tuple[jax.ShapeDtypeStruct, ...]: ...

    @property
    def scratch(self) -> tuple[Any, ...]: ...

    def begin(self, refs: tuple[Any, ...]) -> None:
        """Runs before the first item."""

    def store(self, refs: tuple[Any, ...], sums: Any, token: Any, row: Any, warpgroup: Any) -> None:
        """Stores an item: a warpgroup's sums, the tile's first token, and the strip's first row of each weight."""

    def end(self, refs: tuple[Any, ...]) -> None:
        """Runs after the last item."""


@dataclasses.dataclass(frozen=True)
class Rounded:
    """The epilogue that stores sums [tokens, rows of the weight] in `dtype`."""

    problem: Problem
    dtype: Any

    @property
    def outputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return (jax.ShapeDtypeStruct((self.problem.tokens, self.problem.rows), self.dtype),)

    scratch = ()

    def begin(self, refs: tuple[Any, ...]) -> None:
        """Does nothing."""

    def store(self, refs: tuple[Any, ...], sums: Any, token: Any, row: Any, warpgroup: Any) -> None:
        """Stores from registers."""
        problem = self.problem
        store = tile_code.interpreted_store if problem.interpret else tile_code.device_store
        store(problem.config, problem.tokens, problem.rows, self.dtype)(*refs, sums, token, row, warpgroup)

    end = begin


def body(*refs: Any, stage: Stage, epilogue: Epilogue, grouped: bool, row_scales: bool) -> None:
    """The kernel; see the module. `refs` in the order of `Refs`, without what is absent."""
    problem, remaining = stage.problem, iter(refs)
    config = problem.config

    def take(count: int) -> tuple[Any, ...]:
        return tuple(next(remaining) for _ in range(count))

    every = Refs(
        plan=take(2 if grouped else 0),
        x_gmem=next(remaining),
        x_scales_gmem=next(remaining) if row_scales else None,
        weights_gmem=take(problem.weights),
        scales_gmem=take(problem.weights),
        epilogue=take(len(epilogue.outputs) + len(epilogue.scratch)),
        weight_smem=next(remaining),
        x_smem=next(remaining),
        stage_smem=take(len(stage.shared)),
        full_bar=next(remaining),
        free_bar=next(remaining),
        stage_bars=take(len(stage.barriers)),
    )
    epilogue.begin(every.epilogue)
    stream(
        config,
        strips=-(-problem.rows // problem.share),
        steps=problem.columns // stage.depth,
        plan=every.plan,
        load=functools.partial(stage.load, every),
        start=stage.start,
        add=functools.partial(stage.add, every),
        store=functools.partial(stage.store, every, epilogue),
        barriers=(every.full_bar, every.free_bar),
        tiles=-(-every.x_gmem.shape[0] // config.tile),
    )
    epilogue.end(every.epilogue)


def launch(
    stage: Stage,
    epilogue: Epilogue,
    plan: tuple[jax.Array, ...],
    x: jax.Array,
    x_scales: jax.Array | None,
    weights: tuple[jax.Array, ...],
    scales: tuple[jax.Array, ...],
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """Runs the kernel; returns the epilogue's outputs.

    Args:
      stage: of the problem that these arrays are.
      epilogue: what becomes of the sums.
      plan: of `plan_of`; empty for a dense product.
      x: [tokens, K].
      x_scales: those of rows that are quantised, or None.
      weights: stored values [experts, N, ...], each.
      scales: theirs.
      interpret: parameters of the interpreter.
    """
    config = stage.problem.config

    def ring(lines: int, rows: int, like: jax.Array) -> Any:
        shape = (config.stages, lines, rows, 128 // like.dtype.itemsize)
        return plgpu.SMEM(shape, like.dtype, transforms=SWIZZLE)

    kernel = plgpu.kernel(
        functools.partial(body, stage=stage, epilogue=epilogue, grouped=bool(plan), row_scales=x_scales is not None),
        out_type=epilogue.outputs,
        scratch_types=(
            *epilogue.scratch,
            ring(stage.weight_lines, config.rows, weights[0]),
            ring(stage.x_lines, config.tile, x),
            *stage.shared,
            plgpu.Barrier(num_arrivals=stage.copies, num_barriers=config.stages),  # a slot is full
            plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),  # a slot is free
            *stage.barriers,
        ),
        grid=(config.ctas,),
        grid_names=("cta",),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=interpret,
        kernel_name=stage.kernel_name + ("_swiglu" if len(weights) > 1 else ""),
    )
    return kernel(
        *plan,
        in_lines(x),
        *([] if x_scales is None else [x_scales]),
        *(in_lines(weight.reshape(-1, weight.shape[-1])) for weight in weights),
        *map(stage.flat_scales, scales),
    )


def padded(x: jax.Array, x_scales: jax.Array | None, config: Any, interpret: Any) -> tuple[jax.Array, Any]:
    """Returns a dense product's rows in whole tiles: past the end copies find zeros, which the interpreter refuses."""
    if interpret is None:
        return x, x_scales
    pad = (0, -x.shape[0] % config.tile)
    return jax.tree.map(lambda array: jnp.pad(array, (pad, *((0, 0),) * (array.ndim - 1))), (x, x_scales))


@functools.partial(jax.jit, static_argnames=("stage", "config", "dtype", "interpret"))
def matmul(
    x: jax.Array,
    x_scales: jax.Array | None,
    values: jax.Array,
    scales: jax.Array,
    tile_expert: jax.Array | None = None,
    used_tiles: jax.Array | None = None,
    *,
    stage: Any,
    config: Any,
    dtype: Any = jnp.bfloat16,
    interpret: Any = None,
) -> jax.Array:
    """x W^T, or each tile of rows times the transpose of its expert's weight, of which it reads no others.

    Args:
      x: [M, K], as the scheme's products take it: quantised, with `x_scales`, or bfloat16.
      x_scales: float32 [M, K / 128] of FP8 rows, [M] of int8 rows, None of bfloat16 rows.
      values: of the weight [N, K] as it is stored; with a leading axis of experts if there is `tile_expert`.
      scales: of the weight, as they are stored.
      tile_expert: int32 [tiles], the expert of each tile of M / tiles rows.
      used_tiles: int32 [], how many tiles hold a row: the first ones; None: all.
      stage: the class of the scheme's `Stage`.
      config: as `choice.choose` gives it.
      dtype: of the result, bfloat16 or float32.
      interpret: parameters of the interpreter.

    Returns:
      [M, N], summed in float32 (of int8 exactly, in int32); tiles from `used_tiles` on are not written, whatever is in
      the memory stays there.
    """
    tokens, rows = x.shape[0], values.shape[-2]
    plan: tuple[jax.Array, ...] = ()
    if tile_expert is None:
        x, x_scales = padded(x, x_scales, config, interpret)
        values, scales = values[None], scales[None]
    else:
        plan = plan_of(tile_expert, used_tiles, tokens // tile_expert.shape[0] // config.tile)
    if interpret is not None:
        values, scales = stage.whole_strips(values, scales, config.rows)
    problem = Problem(x.shape[0], values.shape[1], x.shape[1], config, interpret is not None)
    out = launch(stage(problem), Rounded(problem, dtype), plan, x, x_scales, (values,), (scales,), interpret)
    return out[0][:tokens, :rows]
