"""Gate and up as one product of few rows: SwiGLU, and quantisation, at the end of a strip.

A strip is the same rows of the gate and of up, half and half, so the products of one token for both are in several
warps, or warpgroups. They meet in shared memory, rounded to bfloat16, a token's in a row; then a warp takes the tokens
one by one, if their columns are a whole quantisation group, or each thread takes pairs of columns.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir import ir

from pallas_kernels import mosaic, tuning
from pallas_kernels.grouped_matmul import reference
from pallas_kernels.grouped_matmul.swiglu import Result, swiglu
from pallas_kernels.mosaic import REF, SCALAR, Float, SharedWords, Word, fp8
from pallas_kernels.mosaic.wgmma import first_row
from pallas_kernels.quant_matmul import few_rows
from pallas_kernels.quant_matmul.few_rows_tile import first_column, layout_of, unpack
from pallas_kernels.quant_matmul.weight_stream import plan_of
from pallas_kernels.quantize import quantize
from pallas_kernels.quantize.reference import GROUP
from pallas_kernels.quantize.reference import quantize as quantize_reference

TILES = (8, 16, 32, 64)
"""Tokens that a tile can have."""


def stage_sums(config: tuning.FewRowsSwiGLU, staged: Word, sums: Sequence[Float], warpgroup: Word) -> None:
    """A thread's sums in bfloat16, to an address in shared memory of [tokens, rows of the strip, and 8 more]."""
    thread = mosaic.thread_index() & 127
    own = first_row(thread) + (warpgroup << 6)
    first = staged + (first_column(thread) * config.staged_columns + own) * 2
    there = own < config.rows  # of a warp's 16 rows, all or none
    for i, x in enumerate(sums):
        column, below = 8 * (i // 4) + i % 2, 8 * (i // 2 % 2)
        (word,) = mosaic.pack_bf16([x, x])
        address = first + (column * config.staged_columns + below) * 2
        # A whole register: of a store of 16 bits, its lower ones.
        mosaic.ptx("st.shared.u16 [$0], $1;", address, word, predicate=there)


def stage_function(config: tuning.FewRowsSwiGLU):
    """`stage(staged, sums, warpgroup)`: `stage_sums` of a warpgroup."""

    @plgpu.inline_mgpu(arg_types=(REF, layout_of(config), SCALAR))
    def stage(ctx, staged, sums, warpgroup):
        del ctx
        stage_sums(config, mosaic.shared_address(staged), unpack(sums), mosaic.scalar(warpgroup))

    return stage


def stage_twin(config: tuning.FewRowsSwiGLU):
    """`stage_function` for the interpreter."""
    own = min(64, config.rows)

    def stage(staged, sums, warpgroup):
        part = sums.reshape(64, config.tile)[:own].T.astype(jnp.bfloat16)
        staged[:, pl.ds(warpgroup * own, own)] = part

    return stage


def store_groups(
    config: tuning.FewRowsSwiGLU,
    shape: tuple[int, int],
    result: Result,
    staged: SharedWords,
    outputs: Sequence[ir.Value],
    token: Word,
    column: Word,
) -> None:
    """A strip's result, quantised, to the outputs' addresses; shape: of all of it. A warp takes token by token."""
    (tokens, width), thread = shape, mosaic.thread_index()
    lane, warp = thread & 31, thread >> 5

    def one(which: Word) -> None:
        # A pair of words is 4 columns. The gate's 128 are first.
        at = which * (config.staged_columns // 4) + lane
        hidden = swiglu(staged.load_pair(at), staged.load_pair(at + config.rows // 8))
        packed, scale = fp8.quantize(hidden, 32, result.scale_fmt)
        own, group = token + which, column >> 7
        there = own < tokens
        place = mosaic.offset(mosaic.offset(outputs[0], own, width), column + (lane << 2), 1)
        mosaic.store_global(place, packed, predicate=there)
        at = group * tokens + own if result.scales_by_group else own * (width // GROUP) + group
        mosaic.store_global(mosaic.offset(outputs[1], at, 4), [scale.bits()], predicate=there & lane.equals(0))

    for i in range(0, config.tile, 4 * config.warpgroups):
        mosaic.when(warp + i < config.tile, functools.partial(one, warp + i))


def store_pairs(
    config: tuning.FewRowsSwiGLU,
    shape: tuple[int, int],
    result: Result,
    staged: SharedWords,
    outputs: Sequence[ir.Value],
    token: Word,
    column: Word,
) -> None:
    """The same, in bfloat16. A thread takes two columns at a time."""
    del result
    (tokens, width), thread, pairs = shape, mosaic.thread_index(), config.rows // 4
    for i in range(0, config.tile * pairs, 128 * config.warpgroups):
        which, pair = (thread + i) // pairs, (thread + i) % pairs
        at = which.min(config.tile - 1) * (config.staged_columns // 2) + pair
        hidden = swiglu([staged.load(at)], [staged.load(at + pairs)])
        there = (which < config.tile) & (token + which < tokens)
        place = mosaic.offset(mosaic.offset(outputs[0], token + which, 2 * width), column + (pair << 1), 2)
        mosaic.store_global(place, hidden, predicate=there)


def store_function(config: tuning.FewRowsSwiGLU, tokens: int, width: int, result: Result):
    """`store(staged, outputs, token, column)`: a strip's result; of all warpgroups together.

    tokens, width: of the whole result.
    """
    store_all = store_groups if result.quantized else store_pairs

    @plgpu.inline_mgpu(arg_types=(REF, (REF,) * (1 + result.quantized), SCALAR, SCALAR))
    def store(ctx, staged, outputs, *place):
        del ctx
        addresses = [mosaic.global_address(ref) for ref in outputs]
        store_all(config, (tokens, width), result, SharedWords(staged), addresses, *map(mosaic.scalar, place))

    return store


def store_twin(config: tuning.FewRowsSwiGLU, tokens: int, width: int, result: Result):
    """`store_function` for the interpreter, by the references; of the first warpgroup alone, and whole tiles."""
    del tokens, width
    half = config.rows // 2

    def store(staged, outputs, token, column):
        @pl.when(lax.axis_index("warpgroup") == 0)
        def _():
            both = staged[...]
            values = reference.swiglu(both[:, :half], both[:, half : config.rows])
            here = pl.ds(token, config.tile)
            if result.quantized:
                values, scales = quantize_reference(values, result.scale_fmt, GROUP)
                group = lax.div(column, jnp.int32(GROUP))
                if result.scales_by_group:
                    outputs[1][group, here] = scales[:, 0]
                else:
                    outputs[1][here, group] = scales[:, 0]
            outputs[0][here, pl.ds(column, half)] = values

    return store


@dataclasses.dataclass(frozen=True)
class SwiGLU:
    """The epilogue of `few_rows`: see the module."""

    config: tuning.FewRowsSwiGLU
    tokens: int
    width: int
    result: Result
    interpret: bool

    @property
    def outputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return self.result.outputs(self.tokens, self.width)

    @property
    def scratch(self) -> tuple[Any, ...]:
        return (
            plgpu.SMEM((self.config.tile, self.config.staged_columns), jnp.bfloat16),  # staged
            plgpu.Barrier(num_arrivals=self.config.warpgroups),  # there: all sums are staged
            plgpu.Barrier(num_arrivals=self.config.warpgroups),  # taken: all have been read
        )

    def begin(self, refs: tuple[Any, ...]) -> None:
        """Nothing is there that has to be taken."""
        *_, taken = refs
        plgpu.barrier_arrive(taken)

    def store(self, refs: tuple[Any, ...], sums: Any, token: Any, row: Any, warpgroup: Any) -> None:
        """Of a strip."""
        *outputs, staged, there, taken = refs
        stage = (stage_twin if self.interpret else stage_function)(self.config)
        store = (store_twin if self.interpret else store_function)(self.config, self.tokens, self.width, self.result)
        plgpu.barrier_wait(taken)
        stage(staged, sums, warpgroup)
        plgpu.barrier_arrive(there)
        plgpu.barrier_wait(there)
        store(staged, tuple(outputs), token, row)
        plgpu.barrier_arrive(taken)

    def end(self, refs: tuple[Any, ...]) -> None:
        """Waits for the last phase, before the barrier's memory goes."""
        *_, taken = refs
        plgpu.barrier_wait(taken)


def swiglu_few_rows(
    x: jax.Array,
    x_scales: jax.Array,
    weights: tuple[jax.Array, jax.Array],
    weight_scales: tuple[jax.Array, jax.Array],
    tile_expert: jax.Array | None,
    used_tiles: jax.Array | None,
    result: Result,
    *,
    config: tuning.FewRowsSwiGLU | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """silu(x gate^T) * (x up^T), each product rounded to bfloat16 first.

    Strips of less than 128 columns (see `tuning.few_rows_swiglu`) hold no whole quantisation group; `quantize` follows.

    Args:
      x, x_scales, tile_expert, used_tiles, config, interpret: see `few_rows`; without experts, up to 64 rows.
      weights: gate and up, float8_e4m3fn, each [W, K], or [E, W, K] with `tile_expert`; W a multiple of 128.
      weight_scales: theirs, float32 [..., W / 128, K / 128].
      result: what of it.

    Returns:
      values [M, W] and, if quantised, scales.
    """
    count, width = x.shape[0], weights[0].shape[-2]
    plan: tuple[jax.Array, ...] = ()
    if tile_expert is None:
        config = config or tuning.few_rows_swiglu(few_rows.tile_for(count), width, 1)
        x, x_scales = few_rows.padded(x, x_scales, config, interpret)
        weights, weight_scales = ((a[None], b[None]) for a, b in (weights, weight_scales))
    else:
        tiles = tile_expert.shape[0]
        config = config or tuning.few_rows_swiglu(count // tiles, width, tiles)
        plan = plan_of(tile_expert, used_tiles)
    quantises = result.quantized and config.rows // 2 == GROUP
    own = dataclasses.replace(result, quantized=quantises)
    epilogue = SwiGLU(config, x.shape[0], width, own, interpret is not None)
    values, *scales = few_rows.call(epilogue, plan, x, x_scales, weights, weight_scales, interpret, config)
    values = values[:count]
    if result.quantized and not quantises:
        values, by_row = quantize(values, result.scale_fmt, backend="auto" if interpret else "mosaic_gpu")
        return values, by_row.T if result.scales_by_group else by_row
    if result.scales_by_group:
        return values, *(each[:, :count] for each in scales)
    return values, *(each[:count] for each in scales)
