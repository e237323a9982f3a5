"""FP8 products with few rows on Hopper: the weights are read once, at the speed of device memory.

The product is transposed, so that the weights are the large operand of the matrix units: D^T[weight rows, tokens] =
W[weight rows, 128 of K] X[tokens, 128 of K]^T. Both lie in shared memory as they lie in device memory. Each 128 of K
give a fresh product, which is scaled and added up in float32 registers (`few_rows_tile.py`). The warpgroups of a CTA
take different rows, and of many tokens also different tokens: so no thread scales too many of them, and the weights are
still read once.

An item is a strip of weight rows times one tile of tokens, over all of K (`weight_stream.py`). No item is split, so
there is nothing to merge, and results are the same from run to run. A strip has any multiple of 8 rows, so that all
multiprocessors get about as many. It may need the scales of two groups of 128 rows; the last one may reach past the
weight's end, where copies find zeros, or the next expert's rows, and nothing is stored. CTAs of a cluster take strips
next to each other and copy their tokens once for all of them.

The dense product is that with one or two tiles; the grouped one has an expert a tile, and stops after the tiles in use.

What becomes of an item's sums is an epilogue's business: `Rounded` stores them. A strip may also be half and half of
two weights of one shape, the same rows of both, for an epilogue that needs both products.
"""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tuning
from pallas_kernels.mosaic.wgmma import SWIZZLE
from pallas_kernels.quant_matmul import few_rows_tile as device
from pallas_kernels.quant_matmul.few_rows_tile import BLOCK, GROUP
from pallas_kernels.quant_matmul.weight_stream import copy_lines, in_lines, plan_of, stream

TILES = (8, 16, 32, 64, 128)
"""Tokens that a tile can have."""


class Epilogue(Protocol):
    """What becomes of the sums of an item. Its refs are the outputs and its scratch, in this order."""

    @property
    def outputs(self) -> tuple[jax.ShapeDtypeStruct, ...]: ...

    @property
    def scratch(self) -> tuple[Any, ...]: ...

    def begin(self, refs: tuple[Any, ...]) -> None:
        """Before the first item."""

    def store(self, refs: tuple[Any, ...], sums: Any, token: Any, row: Any, warpgroup: Any) -> None:
        """Of an item: a warpgroup's sums, the tile's first token, and the strip's first row of each weight."""

    def end(self, refs: tuple[Any, ...]) -> None:
        """After the last item."""


@dataclasses.dataclass(frozen=True)
class Rounded:
    """Sums [tokens, rows of the weight] in `dtype`."""

    config: tuning.FewRows
    tokens: int
    rows: int
    dtype: Any
    interpret: bool

    @property
    def outputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return (jax.ShapeDtypeStruct((self.tokens, self.rows), self.dtype),)

    scratch = ()

    def begin(self, refs: tuple[Any, ...]) -> None:
        """Nothing."""

    def store(self, refs: tuple[Any, ...], sums: Any, token: Any, row: Any, warpgroup: Any) -> None:
        """From registers."""
        store = device.store_twin if self.interpret else device.store_function
        store(self.config, self.tokens, self.rows, self.dtype)(*refs, sums, token, row, warpgroup)

    end = begin


def body(*refs, config, epilogue, rows, scale_rows, columns, weights, grouped, interpret):
    """See the module. `refs`: the tiles' experts and how many are in use (if grouped), the operands, outputs, scratch.

    rows, columns: N and K of the weights; scale_rows: the rows of their scales.
    weights: how many; a strip has its share of each.
    """
    remaining = iter(refs)

    def take(count):
        return tuple(next(remaining) for _ in range(count))

    plan = take(2 if grouped else 0)
    (x, x_scales), matrices, matrix_scales = take(2), take(weights), take(weights)
    ends = take(len(epilogue.outputs) + len(epilogue.scratch))
    w_s, x_s, x_scale_s, scale_s, full, free = remaining
    share, together = config.rows // weights, collective(config, interpret)
    tile_of = (device.tile_twin if interpret else device.tile_function)(config, weights)

    def load(slot, expert, token, row, step):
        row, block = own_row(row), step * config.blocks
        for which, matrix in enumerate(matrices):
            for first, there in parts(w_s.at[slot], which):
                copy_lines(matrix, expert * rows + row, block + first, there, full.at[slot])
        copy_lines(x, token, block, x_s.at[slot], full.at[slot], collective_axes=together)
        group = pl.ds(lax.div(block, jnp.int32(GROUP)) * GROUP, GROUP)
        plgpu.copy_gmem_to_smem(x_scales.at[pl.ds(token, config.tile), group], x_scale_s.at[slot], full.at[slot])
        count = device.scale_rows(share)
        at = pl.ds(expert * scale_rows + lax.div(row, jnp.int32(BLOCK)), count)
        for which, scales in enumerate(matrix_scales):
            there = scale_s.at[slot, pl.ds(8 * which, count)]  # copies start at multiples of 128 bytes
            plgpu.copy_gmem_to_smem(scales.at[at, group], there, full.at[slot])

    def parts(strip, which):
        """Of a strip in shared memory, the first line and the place of each copy of one weight."""
        if weights == 1:
            return [(0, strip)]
        return [(i, strip.at[pl.ds(i, 1), pl.ds(which * share, share)]) for i in range(config.blocks)]

    def own_row(row):
        """Of each weight, where a strip starts that starts at `row` of all of them together."""
        return row if weights == 1 else lax.div(row, jnp.int32(weights))

    def add(sums, slot, step, row, warpgroup):
        place = lax.rem(step * config.blocks, jnp.int32(GROUP))
        return tile_of(w_s, x_s, x_scale_s, scale_s, sums, slot, place, row, warpgroup)

    epilogue.begin(ends)
    stream(
        config,
        strips=-(-rows // (share * config.cluster)) * config.cluster,
        steps=columns // (BLOCK * config.blocks),
        plan=plan,
        load=load,
        start=lambda: device.zeros(config),
        add=add,
        store=lambda sums, token, row, warpgroup: epilogue.store(ends, sums, token, own_row(row), warpgroup),
        barriers=(full, free),
        tiles=-(-x.shape[0] // config.tile),
        cluster=config.cluster,
    )
    epilogue.end(ends)


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
    return unsupported_rows(x, tile)


def unsupported_rows(x: jax.Array, tile: int | None) -> str | None:
    """`unsupported`, of the rows alone."""
    if tile is None and not 1 <= x.shape[0] <= TILES[-1]:
        return f"x of shape {x.shape}; it takes 1 to {TILES[-1]} rows"
    if tile is not None and tile not in TILES:
        return f"tiles of {tile} rows; it takes {', '.join(map(str, TILES))}"
    return None


@functools.partial(jax.jit, static_argnames=("dtype", "interpret", "config"))
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
    tokens, rows = x.shape[0], values.shape[0]
    config = config or tuning.few_rows(tile_for(tokens), rows, 1, x.shape[1])
    x, x_scales = padded(x, x_scales, config, interpret)
    return rounded((), x, x_scales, values[None], scales[None], dtype, interpret, config)[:tokens]


def tile_for(tokens: int) -> int:
    """The least tile that holds all tokens."""
    return next(tile for tile in TILES if tile >= tokens)


def padded(x: jax.Array, x_scales: jax.Array, config: tuning.FewRows, interpret: Any) -> tuple[jax.Array, jax.Array]:
    """x and x_scales of a dense product: rows past the end are zeros from the copies, which the interpreter refuses."""
    if interpret is None:
        return x, x_scales
    pad = ((0, -x.shape[0] % config.tile), (0, 0))
    return jnp.pad(x, pad), jnp.pad(x_scales, pad)


@functools.partial(jax.jit, static_argnames=("dtype", "interpret", "config"))
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
      x: float8_e4m3fn [P, K], in the order of a `RoutingPlan`.
      x_scales: float32 [P, K / 128].
      values: float8_e4m3fn [E, N, K].
      scales: float32 [E, ceil(N / 128), K / 128].
      tile_expert: int32 [tiles], the expert of each tile of P / tiles rows.
      used_tiles: int32 [], how many tiles hold a row: the first ones; None: all.

    Returns:
      [P, N]; tiles from `used_tiles` on are not written, whatever is in the memory stays there.
    """
    tile = x.shape[0] // tile_expert.shape[0]
    config = config or tuning.few_rows(tile, values.shape[1], tile_expert.shape[0], x.shape[1])
    return rounded(plan_of(tile_expert, used_tiles), x, x_scales, values, scales, dtype, interpret, config)


def rounded(
    plan: tuple[jax.Array, ...],
    x: jax.Array,
    x_scales: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    dtype: Any,
    interpret: Any,
    config: tuning.FewRows,
) -> jax.Array:
    """The products, in `dtype`."""
    rows = values.shape[1]
    if interpret is not None:  # rows past the end, which a strip may have: the interpreter refuses to copy them
        values = whole_strips(values, config)
        scales = jnp.pad(scales, ((0, 0), (0, device.scale_rows(config.rows * config.cluster)), (0, 0)))
    epilogue = Rounded(config, x.shape[0], values.shape[1], dtype, interpret is not None)
    return call(epilogue, plan, x, x_scales, (values,), (scales,), interpret, config)[0][:, :rows]


def whole_strips(of_rows: jax.Array, config: tuning.FewRows) -> jax.Array:
    """[experts, N, ...] with zeros, up to whole strips for all CTAs of a cluster."""
    missing = -of_rows.shape[1] % (config.rows * config.cluster)
    return jnp.pad(of_rows, ((0, 0), (0, missing), *((0, 0),) * (of_rows.ndim - 2)))


def collective(config: tuning.FewRows, interpret: bool) -> str | None:
    """The axis of the CTAs that copy tokens together. In the interpreter, which cannot do that, each copies all."""
    return "rank" if config.cluster > 1 and not interpret else None


def sharing(config: tuning.FewRows) -> tuple[Any, dict[str, Any]]:
    """Barriers of free slots, and the cluster as a kernel's arguments."""
    if config.cluster == 1:
        return plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages), {}
    # A slot is free when nobody in the cluster reads its own any more.
    free = plgpu.ClusterBarrier(collective_axes=("rank",), num_arrivals=config.warpgroups, num_barriers=config.stages)
    return free, {"cluster": (config.cluster,), "cluster_names": ("rank",)}


def call(
    epilogue: Epilogue,
    plan: tuple[jax.Array, ...],
    x: jax.Array,
    x_scales: jax.Array,
    weights: tuple[jax.Array, ...],
    scales: tuple[jax.Array, ...],
    interpret: Any,
    config: tuning.FewRows,
) -> tuple[jax.Array, ...]:
    """The epilogue's outputs, with or without a plan (experts of the tiles, how many are used)."""
    experts, rows, columns = weights[0].shape
    if len(weights) > 1 and rows % (config.rows // len(weights)):
        raise ValueError(f"strips of {config.rows} rows do not fit into {len(weights)} weights of {weights[0].shape}")
    copies = 1 if len(weights) == 1 else config.blocks * len(weights)  # of weights, into a slot
    free, axes = sharing(config)
    kernel = plgpu.kernel(
        functools.partial(
            body,
            config=config,
            epilogue=epilogue,
            rows=rows,
            scale_rows=scales[0].shape[1],
            columns=columns,
            weights=len(weights),
            grouped=bool(plan),
            interpret=interpret is not None,
        ),
        out_type=epilogue.outputs,
        scratch_types=(
            *epilogue.scratch,
            plgpu.SMEM((config.stages, config.blocks, config.rows, BLOCK), weights[0].dtype, transforms=SWIZZLE),
            plgpu.SMEM((config.stages, config.blocks, config.tile, BLOCK), x.dtype, transforms=SWIZZLE),
            plgpu.SMEM((config.stages, config.tile, GROUP), jnp.float32),
            plgpu.SMEM((config.stages, 8 * len(weights), GROUP), jnp.float32),
            plgpu.Barrier(num_arrivals=2 + len(weights) + copies, num_barriers=config.stages),
            free,
        ),
        grid=(config.ctas // config.cluster,),
        grid_names=("cta",),
        **axes,
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=interpret,
        kernel_name="few_rows" if len(weights) == 1 else "few_rows_swiglu",
    )
    return kernel(
        *plan,
        in_lines(x),
        x_scales,
        *(in_lines(weight.reshape(experts * rows, columns)) for weight in weights),
        *(each.reshape(experts * each.shape[1], each.shape[2]) for each in scales),
    )
