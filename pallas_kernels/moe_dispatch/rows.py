"""Rows to their experts and back, on Hopper: every value is read once, no shared memory.

To the experts, one warp takes 512 values of a token (16 a lane, so that 8 lanes are one FP8 group), quantises them
once, and stores them in the row of each choice; other warps fill the padding. Back, one warp takes 256 values of a
token from all its rows at once, weighted and added up in the order of the choices.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxlib.mlir import ir

from pallas_kernels import mosaic
from pallas_kernels.mosaic import REF, SCALAR, Float, Word, fp8
from pallas_kernels.quantize.reference import FP8_MAX, GROUP, SMALLEST_AMAX, round_up_to_power_of_two
from pallas_kernels.quantize.reference import quantize as reference_quantize

WARPS = 4
"""Of a CTA."""
CHUNK = 512
"""Values of a token that a warp takes to its rows."""
BACK_CHUNK = 256
"""And from them."""
MOST_CHOICES = 16
"""Of a token: its rows are held in registers."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """What the device code is compiled for.

    Attributes:
      tokens: T.
      choices: K, of a token.
      rows: P.
      width: D, of a row.
      fp8: rows become FP8 values and scales, else they stay bfloat16.
      scale_fmt: see `quantize`.
      scales_by_group: scales are [D / 128, P], else [P, D / 128].
      float32_rows: that come back, else bfloat16.
    """

    tokens: int
    choices: int
    rows: int
    width: int
    fp8: bool = False
    scale_fmt: str | None = None
    scales_by_group: bool = False
    float32_rows: bool = False

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return self.width // GROUP

    @property
    def chunks(self) -> int:
        """Of a token, on the way out."""
        return -(-self.width // CHUNK)

    @property
    def token_ctas(self) -> int:
        """CTAs that take tokens to their rows; later ones fill the padding."""
        return -(-self.tokens * self.chunks // WARPS)

    @property
    def back_chunks(self) -> int:
        """Of a token, on the way back."""
        return -(-self.width // BACK_CHUNK)

    @property
    def value_bytes(self) -> int:
        """Of a value in a row."""
        return 1 if self.fp8 else 2

    def scale_at(self, row, group):
        """Returns the place of a scale."""
        return group * self.rows + row if self.scales_by_group else row * self.groups + group

    @property
    def padding_scale(self) -> float:
        """Of a group of zeros."""
        scale = np.float32(SMALLEST_AMAX) * np.float32(1 / FP8_MAX)
        if self.scale_fmt is None:
            return float(scale)
        return float(np.exp2(np.ceil(np.log2(float(scale)))))


def unsupported(x: jax.Array, choices: int, dtypes: tuple[str, ...], name: str) -> str | None:
    """Says which arguments of `gather_rows` and `combine` the kernels do not take, and which they do; None if all."""
    if x.dtype not in map(jnp.dtype, dtypes):
        return f"{name} of dtype {x.dtype}; it takes {' or '.join(dtypes)}"
    if x.shape[1] % GROUP:
        return f"{name} of shape {x.shape}; it takes [.., D] with D a multiple of {GROUP}"
    if choices > MOST_CHOICES:
        return f"{choices} choices of a token; it takes at most {MOST_CHOICES}"
    return None


def load_rows(shapes: Rows, token_row: ir.Value, token: Word) -> list[Word]:
    """Returns the rows of a token's choices."""
    first = token * shapes.choices
    return [mosaic.load_read_only(mosaic.offset(token_row, first + i, 4))[0] for i in range(shapes.choices)]


# ---- to the experts --------------------------------------------------------------------------------------------


def take_token(shapes: Rows, lane: Word, unit: Word, x, token_row, values, scales) -> None:
    """A warp's 512 values of a token into its rows, between addresses; `scales` is None without FP8."""
    token, column = unit // shapes.chunks, (unit % shapes.chunks) * CHUNK + (lane << 4)
    exists = (token < shapes.tokens) & (column < shapes.width)
    token = token.min(shapes.tokens - 1)
    row = mosaic.offset(x, token, 2 * shapes.width)
    at = mosaic.offset(row, column.min(shapes.width - 16), 2)
    rows = load_rows(shapes, token_row, token)
    words = mosaic.load_read_only(at, 8)
    scale = None
    if shapes.fp8:
        words, scale = fp8.quantize(words, 8, shapes.scale_fmt)
    for place in rows:
        used = exists & place.signed_greater(-1)
        row = mosaic.offset(mosaic.offset(values, place, shapes.value_bytes * shapes.width), column, shapes.value_bytes)
        mosaic.store_global(row, words, predicate=used)
        if scale is not None:
            address = mosaic.offset(scales, shapes.scale_at(place, column >> 7), 4)
            mosaic.store_global(address, [scale.bits()], predicate=used & (lane & 7).equals(0))


def fill_padding(shapes: Rows, lane: Word, row: Word, row_token, values, scales) -> None:
    """Zeros, and the scale of zeros, over a row that belongs to no token."""
    [token] = mosaic.load_read_only(mosaic.offset(row_token, row.min(shapes.rows - 1), 4))

    def fill() -> None:
        start = mosaic.offset(values, row, shapes.value_bytes * shapes.width)
        pieces = shapes.value_bytes * shapes.width // 16
        for i in range(0, pieces, 32):
            piece = lane + i
            mosaic.store_global(mosaic.offset(start, piece, 16), [0] * 4, predicate=piece < pieces)
        if shapes.fp8:
            for i in range(0, shapes.groups, 32):
                group = lane + i
                address = mosaic.offset(scales, shapes.scale_at(row, group), 4)
                bits = Float(shapes.padding_scale).bits()
                mosaic.store_global(address, [bits], predicate=group < shapes.groups)

    mosaic.when((row < shapes.rows) & token.signed_less(0), fill)


def device_gather(shapes: Rows):
    """Returns the function of a CTA's tokens or rows of padding; `cta` is its number."""

    @plgpu.inline_mgpu(arg_types=(*[REF] * (5 if shapes.fp8 else 4), SCALAR))
    def gather(ctx, x_gmem, row_token_gmem, token_row_gmem, values_gmem, *others):
        del ctx
        scales = mosaic.global_address(others[0]) if shapes.fp8 else None
        cta, thread = mosaic.scalar(others[-1]), mosaic.thread_index()
        lane, warp = thread & 31, thread >> 5
        refs_gmem = (x_gmem, row_token_gmem, token_row_gmem, values_gmem)
        x, row_token, token_row, values = map(mosaic.global_address, refs_gmem)
        mosaic.branch(
            cta < shapes.token_ctas,
            lambda: take_token(shapes, lane, cta * WARPS + warp, x, token_row, values, scales),
            lambda: fill_padding(shapes, lane, (cta - shapes.token_ctas) * WARPS + warp, row_token, values, scales),
        )

    return gather


def interpreted_gather(shapes: Rows):
    """Returns the twin of `device_gather`: group by group, through the reference."""

    def gather(x_gmem, row_token_gmem, token_row_gmem, values_gmem, *others):
        scales_gmem, cta = others[0], others[-1]

        def store(row, group, value, scale):
            values_gmem[pl.ds(row, 1), pl.ds(group * GROUP, GROUP)] = value
            if shapes.fp8:
                place = (group, row) if shapes.scales_by_group else (row, group)
                scales_gmem[place] = scale

        def take(token, group):
            value, scale = x_gmem[pl.ds(token, 1), pl.ds(group * GROUP, GROUP)], jnp.float32(0)
            if shapes.fp8:
                value, scale = reference_quantize(value, shapes.scale_fmt, GROUP)
                scale = scale[0, 0]
            for choice in range(shapes.choices):
                row = token_row_gmem[token, choice]
                pl.when(row >= 0)(functools.partial(store, row, group, value, scale))

        def fill(row):
            scale = jnp.full((), SMALLEST_AMAX, jnp.float32) * jnp.float32(1 / FP8_MAX)
            scale = scale if shapes.scale_fmt is None else round_up_to_power_of_two(scale)
            for group in range(shapes.groups):
                store(row, group, jnp.zeros((1, GROUP), values_gmem.dtype), scale)

        for warp in range(WARPS):
            unit, row = cta * WARPS + warp, (cta - shapes.token_ctas) * WARPS + warp
            token, chunk = unit // shapes.chunks, unit % shapes.chunks
            for i in range(CHUNK // GROUP):
                group = chunk * (CHUNK // GROUP) + i
                here = (cta < shapes.token_ctas) & (token < shapes.tokens) & (group < shapes.groups)
                pl.when(here)(functools.partial(take, token, group))
            padding = (row >= 0) & (row < shapes.rows) & (row_token_gmem[jnp.clip(row, 0, shapes.rows - 1)] < 0)
            pl.when(padding)(functools.partial(fill, row))

    return gather


@functools.partial(jax.jit, static_argnames=("quantized", "scale_fmt", "scales_by_group", "interpret"))
def gather_rows(
    x: jax.Array,
    row_token: jax.Array,
    token_row: jax.Array,
    *,
    quantized: bool = False,
    scale_fmt: str | None = None,
    scales_by_group: bool = False,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """(rows,) or, quantised, (values, scales), of at least one token."""
    (tokens, width), rows = x.shape, row_token.shape[0]
    shapes = Rows(tokens, token_row.shape[1], rows, width, quantized, scale_fmt, scales_by_group)
    body = (interpreted_gather if interpret else device_gather)(shapes)

    def moe_gather(*refs):
        body(*refs, lax.axis_index("cta"))

    out = [jax.ShapeDtypeStruct((rows, width), jnp.float8_e4m3fn if quantized else x.dtype)]
    if quantized:
        by_row = (rows, shapes.groups)
        out.append(jax.ShapeDtypeStruct(by_row[::-1] if scales_by_group else by_row, jnp.float32))
    return plgpu.kernel(
        moe_gather,
        out_type=tuple(out),
        grid=(shapes.token_ctas + -(-rows // WARPS),),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )(x, row_token, token_row)


# ---- and back --------------------------------------------------------------------------------------------------


def return_token(shapes: Rows, lane: Word, unit: Word, rows, weights, token_row, out) -> None:
    """A warp's 256 values of a token from its rows, between addresses."""
    token, column = unit // shapes.back_chunks, (unit % shapes.back_chunks) * BACK_CHUNK + (lane << 3)
    exists = (token < shapes.tokens) & (column < shapes.width)
    token, at = token.min(shapes.tokens - 1), column.min(shapes.width - 8)
    places, first = load_rows(shapes, token_row, token), token * shapes.choices
    size = 4 if shapes.float32_rows else 2
    factors, loaded = [], []
    for i, place in enumerate(places):
        row = mosaic.offset(mosaic.offset(rows, place.signed_max(0), size * shapes.width), at, size)
        words = mosaic.load_read_only(row, 2 * size)
        loaded.append([Float.of_bits(word) for word in words] if shapes.float32_rows else mosaic.unpack_bf16(words))
        factors += mosaic.load_read_only(mosaic.offset(weights, first + i, 4))
    sums = [Float(0.0)] * 8
    for place, factor, values in zip(places, factors, loaded, strict=True):
        used = place.signed_greater(-1)
        for i, x in enumerate(values):
            # Rounded before it is added, as the reference's; and a row that does not exist may hold a NaN.
            product = mosaic.ptx_float("mul.rn.f32 $0, $1, $2;", x, Float.of_bits(factor))
            product = Float.of_bits(used.where(product.bits(), 0))
            sums[i] = mosaic.ptx_float("add.rn.f32 $0, $1, $2;", sums[i], product)
    address = mosaic.offset(mosaic.offset(out, token, 4 * shapes.width), at, 4)
    mosaic.store_global(address, [x.bits() for x in sums], predicate=exists)


def device_combine(shapes: Rows):
    """Returns the function of a CTA's tokens; `cta` is its number."""

    @plgpu.inline_mgpu(arg_types=(REF, REF, REF, REF, SCALAR))
    def combine(ctx, rows_gmem, weights_gmem, token_row_gmem, out_gmem, cta):
        del ctx
        thread = mosaic.thread_index()
        unit = mosaic.scalar(cta) * WARPS + (thread >> 5)
        return_token(
            shapes, thread & 31, unit, *map(mosaic.global_address, (rows_gmem, weights_gmem, token_row_gmem, out_gmem))
        )

    return combine


def interpreted_combine(shapes: Rows):
    """Returns the twin of `device_combine`: 128 values at a time."""

    def combine(rows_gmem, weights_gmem, token_row_gmem, out_gmem, cta):
        def one(token, column):
            here, total = pl.ds(column, GROUP), jnp.zeros((1, GROUP), jnp.float32)
            for choice in range(shapes.choices):
                row = token_row_gmem[token, choice]
                value = rows_gmem[pl.ds(jnp.maximum(row, 0), 1), here].astype(jnp.float32)
                total += jnp.where(row >= 0, weights_gmem[token, choice] * value, 0)
            out_gmem[pl.ds(token, 1), here] = total

        for warp in range(WARPS):
            unit = cta * WARPS + warp
            token, chunk = unit // shapes.back_chunks, unit % shapes.back_chunks
            for i in range(BACK_CHUNK // GROUP):
                column = chunk * BACK_CHUNK + i * GROUP
                here = (token < shapes.tokens) & (column < shapes.width)
                pl.when(here)(functools.partial(one, token, column))

    return combine


@functools.partial(jax.jit, static_argnames=("interpret",))
def combine(rows: jax.Array, weights: jax.Array, token_row: jax.Array, *, interpret: Any = None) -> jax.Array:
    """Runs the op's kernel on at least one token."""
    tokens, choices = token_row.shape
    shapes = Rows(tokens, choices, rows.shape[0], rows.shape[1], float32_rows=rows.dtype == jnp.float32)
    body = (interpreted_combine if interpret else device_combine)(shapes)

    def moe_combine(*refs):
        body(*refs, lax.axis_index("cta"))

    return plgpu.kernel(
        moe_combine,
        out_type=jax.ShapeDtypeStruct((tokens, shapes.width), jnp.float32),
        grid=(-(-tokens * shapes.back_chunks // WARPS),),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )(rows, weights, token_row)
