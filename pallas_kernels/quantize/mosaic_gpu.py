"""Quantisation on Hopper: FP8 with 16 values a lane, 8 lanes a group; behind an RMSNorm, or to int8, one CTA a row."""

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

from pallas_kernels import fp8, mosaic, rowwise
from pallas_kernels.mosaic import REF, SCALAR, Float, SharedWords, Word
from pallas_kernels.quantize import reference
from pallas_kernels.quantize.reference import GROUP

WARPS = 4
"""Of a warpgroup."""
WIDEST = 16384
"""Row that a warpgroup can hold in registers."""
MOST_WARPGROUPS = 4
"""Of a CTA with a row of int8: the threads of one would have up to 128 values each to read and divide in turn."""


def unsupported(x: jax.Array, group: int) -> str | None:
    """What of the arguments of `quantize` the kernel does not take, and what it would."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x of dtype {x.dtype}; it takes bfloat16 or float32"
    return None if group == GROUP else f"groups of {group}; it takes {GROUP}"


def int8_unsupported(x: jax.Array) -> str | None:
    """What of the arguments of `quantize_int8` the kernel does not take, and what it would."""
    if x.dtype != jnp.bfloat16:
        return f"x of dtype {x.dtype}; it takes bfloat16"
    widest = MOST_WARPGROUPS * WIDEST
    if x.shape[-1] % GROUP or x.shape[-1] > widest:
        return f"x of shape {x.shape}; it takes rows of a multiple of {GROUP}, of at most {widest}"
    return None


def norm_unsupported(x: jax.Array, weight: jax.Array) -> str | None:
    """What of the arguments of `rms_norm_quantize` the kernel does not take, and what it would."""
    if x.dtype != jnp.bfloat16 or weight.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x of dtype {x.dtype} and a weight of {weight.dtype}; it takes bfloat16, and bfloat16 or float32"
    return None if x.shape[-1] <= WIDEST else f"x of shape {x.shape}; it takes rows of at most {WIDEST}"


# ---- quantisation alone ----------------------------------------------------------------------------------------


def quantize_groups(
    groups: int, is_float32: bool, scale_fmt: str | None, thread: Word, x: ir.Value, values: ir.Value, scales: ir.Value
) -> None:
    """A thread's 16 values of all, by its number; a warp's groups beyond the last one are the last one."""
    lane, group = thread & 7, thread >> 3
    piece = (group.min(groups - 1) << 3) + lane
    if is_float32:
        floats = [Float.of_bits(word) for word in mosaic.load_read_only(mosaic.offset(x, piece, 64), 16)]
        packed, scale = fp8.quantize_floats(floats, fp8.group_maximum_of_floats(floats, 8), scale_fmt)
    else:
        packed, scale = fp8.quantize(mosaic.load_read_only(mosaic.offset(x, piece, 32), 8), 8, scale_fmt)
    exists = group < groups
    mosaic.store_global(mosaic.offset(values, piece, 16), packed, predicate=exists)
    mosaic.store_global(mosaic.offset(scales, group, 4), [scale.bits()], predicate=exists & lane.equals(0))


def device_quantize(groups: int, is_float32: bool, scale_fmt: str | None):
    """A CTA's groups; `cta` is its number."""

    @plgpu.inline_mgpu(arg_types=(REF, REF, REF, SCALAR))
    def body(ctx, x, values, scales, cta):
        del ctx
        thread = mosaic.scalar(cta) * (32 * WARPS) + mosaic.thread_index()
        quantize_groups(groups, is_float32, scale_fmt, thread, *map(mosaic.global_address, (x, values, scales)))

    return body


def interpreted_quantize(groups: int, is_float32: bool, scale_fmt: str | None):
    """`device_quantize` for the interpreter: group by group, by the reference."""
    del is_float32

    def body(x, values, scales, cta):
        def one(group):
            here = pl.ds(group * GROUP, GROUP)
            values[here], scales[pl.ds(group, 1)] = reference.quantize(x[here], scale_fmt, GROUP)

        for i in range(4 * WARPS):
            group = cta * (4 * WARPS) + i
            pl.when(group < groups)(functools.partial(one, group))

    return body


@functools.partial(jax.jit, static_argnames=("scale_fmt", "interpret"))
def quantize(x: jax.Array, *, scale_fmt: str | None, interpret: Any = None) -> tuple[jax.Array, jax.Array]:
    """The op's kernel, of at least one group."""
    groups = x.size // GROUP
    body = (interpreted_quantize if interpret else device_quantize)(groups, x.dtype == jnp.float32, scale_fmt)

    def fp8_quantize(*refs):
        body(*refs, lax.axis_index("cta"))

    values, scales = plgpu.kernel(
        fp8_quantize,
        out_type=(
            jax.ShapeDtypeStruct((x.size,), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((groups,), jnp.float32),
        ),
        grid=(-(-groups // (4 * WARPS)),),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )(x.reshape(-1))
    return values.reshape(x.shape), scales.reshape(*x.shape[:-1], -1)


# ---- behind an RMSNorm -----------------------------------------------------------------------------------------


def pieces_of(width: int, thread: Word, warps: int) -> list[Word]:
    """The first columns of a thread's pieces of 16 values of a row; some may lie beyond it."""
    return [(thread << 4) + start for start in range(0, width, 16 * 32 * warps)]


@dataclasses.dataclass(frozen=True)
class NormShapes:
    """What the device code is compiled for.

    Attributes:
      width: N, of a row.
      float32_weight: else bfloat16.
      eps: of the norm.
      scale_fmt: see the op.
    """

    width: int
    float32_weight: bool
    eps: float
    scale_fmt: str | None


def norm_row(
    shapes: NormShapes,
    thread: Word,
    row: Word,
    shared: SharedWords,
    x: ir.Value,
    weight: ir.Value,
    values: ir.Value,
    scales: ir.Value,
) -> None:
    """A CTA's row, between addresses; every fourth piece of 512 values is a warp's."""
    width, columns = shapes.width, pieces_of(shapes.width, thread, WARPS)
    start = mosaic.offset(x, row, 2 * width)
    loaded = [mosaic.load_read_only(mosaic.offset(start, column.min(width - 16), 2), 8) for column in columns]
    square = Float(0.0)
    for column, words in zip(columns, loaded, strict=True):
        own = Float(0.0)
        for value in mosaic.unpack_bf16(words):
            own = value.times_plus(value, own)
        square = square + Float.of_bits((column < width).where(own.bits(), 0))
    square = mosaic.warp_sum(square)
    shared.store(thread >> 5, square.bits(), predicate=(thread & 31).equals(0))
    mosaic.barrier()
    square = Float(0.0)
    for word in shared.load_many(0, WARPS):
        square = square + Float.of_bits(word)
    # As the reference: a division, not a product with 1 / width.
    factor = (square / float(width) + shapes.eps).reciprocal_sqrt()
    size = 4 if shapes.float32_weight else 2
    for column, words in zip(columns, loaded, strict=True):
        weights = mosaic.load_read_only(mosaic.offset(weight, column.min(width - 16), size), 4 * size)
        factors = [Float.of_bits(w) for w in weights] if shapes.float32_weight else mosaic.unpack_bf16(weights)
        normed = [value * factor * w for value, w in zip(mosaic.unpack_bf16(words), factors, strict=True)]
        packed, scale = fp8.quantize(mosaic.pack_bf16(normed), 8, shapes.scale_fmt)
        exists = column < width
        mosaic.store_global(mosaic.offset(mosaic.offset(values, row, width), column, 1), packed, predicate=exists)
        place = row * (width // GROUP) + (column >> 7)
        leads = exists & (thread & 7).equals(0)
        mosaic.store_global(mosaic.offset(scales, place, 4), [scale.bits()], predicate=leads)


def device_norm(shapes: NormShapes):
    """A CTA's row."""

    @plgpu.inline_mgpu(arg_types=(REF, REF, REF, REF, REF, SCALAR))
    def body(ctx, x, weight, values, scales, shared, row):
        del ctx
        addresses = map(mosaic.global_address, (x, weight, values, scales))
        norm_row(shapes, mosaic.thread_index(), mosaic.scalar(row), SharedWords(shared), *addresses)

    return body


def interpreted_norm(shapes: NormShapes):
    """`device_norm` for the interpreter, by the reference."""

    def body(x, weight, values, scales, shared, row):
        del shared
        here = pl.ds(row, 1)
        normed = rowwise.rms_norm(x[here], weight[...], shapes.eps)
        values[here], scales[here] = reference.quantize(normed, shapes.scale_fmt, GROUP)

    return body


@functools.partial(jax.jit, static_argnames=("eps", "scale_fmt", "interpret"))
def rms_norm_quantize(
    x: jax.Array, weight: jax.Array, *, eps: float, scale_fmt: str | None, interpret: Any = None
) -> tuple[jax.Array, jax.Array]:
    """The op's kernel, of at least one row."""
    width, rows = x.shape[-1], x.size // x.shape[-1]
    shapes = NormShapes(width, weight.dtype == jnp.float32, eps, scale_fmt)
    body = (interpreted_norm if interpret else device_norm)(shapes)

    def fp8_rms_norm_quantize(*refs):
        body(*refs, lax.axis_index("cta"))

    values, scales = plgpu.kernel(
        fp8_rms_norm_quantize,
        out_type=(
            jax.ShapeDtypeStruct((rows, width), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((rows, width // GROUP), jnp.float32),
        ),
        scratch_types=[plgpu.SMEM((32,), jnp.uint32)],
        grid=(rows,),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )(x.reshape(rows, width), weight)
    return values.reshape(x.shape), scales.reshape(*x.shape[:-1], -1)


# ---- to int8 ---------------------------------------------------------------------------------------------------


def pack_int8(values: list[Float]) -> list[Word]:
    """Four values a word, the lowest byte first, rounded to nearest even and at most 127 in magnitude."""
    words = []
    for i in range(0, len(values), 4):
        packed = mosaic.as_word(0)
        for j, x in enumerate(values[i : i + 4]):
            whole = mosaic.ptx_word("cvt.rni.s32.f32 $0, $1;", x.value).signed_max(-127).signed_min(127)
            packed = packed | ((whole & 0xFF) << (8 * j))
        words.append(packed)
    return words


def int8_warpgroups(width: int) -> int:
    """Of a CTA: as many as have a piece of 16 values for each thread, within what a CTA takes."""
    return min(MOST_WARPGROUPS, -(-width // (16 * 32 * WARPS)))


def int8_row(
    width: int, thread: Word, row: Word, shared: SharedWords, x: ir.Value, values: ir.Value, scales: ir.Value
) -> None:
    """A CTA's row, between addresses."""
    warps = WARPS * int8_warpgroups(width)
    columns, start = pieces_of(width, thread, warps), mosaic.offset(x, row, 2 * width)
    # Columns beyond the row repeat its last ones, which changes no maximum.
    loaded = [mosaic.load_read_only(mosaic.offset(start, column.min(width - 16), 2), 8) for column in columns]
    largest = fp8.group_maximum([word for words in loaded for word in words], 32)
    shared.store(thread >> 5, largest.bits(), predicate=(thread & 31).equals(0))
    mosaic.barrier()
    largest = functools.reduce(Float.max, map(Float.of_bits, shared.load_many(0, warps)))
    scale = largest.max(reference.SMALLEST_AMAX) * float(np.float32(1 / reference.INT8_MAX))
    for column, words in zip(columns, loaded, strict=True):
        packed = pack_int8([value / scale for value in mosaic.unpack_bf16(words)])
        address = mosaic.offset(mosaic.offset(values, row, width), column, 1)
        mosaic.store_global(address, packed, predicate=column < width)
    mosaic.store_global(mosaic.offset(scales, row, 4), [scale.bits()], predicate=thread.equals(0))


def device_int8(width: int):
    """A CTA's row."""

    @plgpu.inline_mgpu(arg_types=(REF, REF, REF, REF, SCALAR))
    def body(ctx, x, values, scales, shared, row):
        del ctx
        addresses = map(mosaic.global_address, (x, values, scales))
        int8_row(width, mosaic.thread_index(), mosaic.scalar(row), SharedWords(shared), *addresses)

    return body


def interpreted_int8(width: int):
    """`device_int8` for the interpreter, by the reference."""
    del width

    def body(x, values, scales, shared, row):
        del shared
        here = pl.ds(row, 1)
        values[here], scales[here] = reference.quantize_int8(x[here])

    return body


@functools.partial(jax.jit, static_argnames=("interpret",))
def quantize_int8(x: jax.Array, *, interpret: Any = None) -> tuple[jax.Array, jax.Array]:
    """The op's kernel, of at least one row."""
    width, rows = x.shape[-1], x.size // x.shape[-1]
    body = (interpreted_int8 if interpret else device_int8)(width)

    def int8_quantize(*refs):
        body(*refs, lax.axis_index("cta"))

    values, scales = plgpu.kernel(
        int8_quantize,
        out_type=(jax.ShapeDtypeStruct((rows, width), jnp.int8), jax.ShapeDtypeStruct((rows,), jnp.float32)),
        scratch_types=[plgpu.SMEM((32,), jnp.uint32)],
        grid=(rows,),
        grid_names=("cta",),
        num_threads=1 if interpret else int8_warpgroups(width),
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )(x.reshape(rows, width))
    return values.reshape(x.shape), scales.reshape(x.shape[:-1])
