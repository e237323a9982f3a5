"""Quantisation on Hopper: to FP8 with 16 values a lane and 8 lanes a group; to int8 with one CTA a row."""

from __future__ import annotations

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
from pallas_kernels.mosaic import REF, SCALAR, Float, SharedWords, Word, fp8
from pallas_kernels.quantize import reference
from pallas_kernels.quantize.reference import GROUP

WARPS = 4
"""Of a warpgroup."""
WIDEST = 16384
"""Row that a warpgroup can hold in registers."""
MOST_WARPGROUPS = 4
"""Of a CTA with a row of int8: the threads of one would have up to 128 values each to read and divide in turn."""


def unsupported(x: jax.Array, group: int) -> str | None:
    """Says which arguments of `quantize` the kernel does not take, and which it does; None if it takes all."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x of dtype {x.dtype}; it takes bfloat16 or float32"
    return None if group == GROUP else f"groups of {group}; it takes {GROUP}"


def int8_unsupported(x: jax.Array) -> str | None:
    """Says which arguments of `quantize_int8` the kernel does not take, and which it does; None if it takes all."""
    if x.dtype != jnp.bfloat16:
        return f"x of dtype {x.dtype}; it takes bfloat16"
    widest = MOST_WARPGROUPS * WIDEST
    if x.shape[-1] % GROUP or x.shape[-1] > widest:
        return f"x of shape {x.shape}; it takes rows of a multiple of {GROUP}, of at most {widest}"
    return None


# ---- to FP8 --------------------------------------------------------------------------------------------------------


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
    """Returns the function of a CTA's groups; `cta` is its number."""

    @plgpu.inline_mgpu(arg_types=(REF, REF, REF, SCALAR))
    def body(ctx, x_gmem, values_gmem, scales_gmem, cta):
        del ctx
        thread = mosaic.scalar(cta) * (32 * WARPS) + mosaic.thread_index()
        quantize_groups(
            groups, is_float32, scale_fmt, thread, *map(mosaic.global_address, (x_gmem, values_gmem, scales_gmem))
        )

    return body


def interpreted_quantize(groups: int, is_float32: bool, scale_fmt: str | None):
    """Returns the twin of `device_quantize`: group by group, by the reference."""
    del is_float32

    def body(x_gmem, values_gmem, scales_gmem, cta):
        def one(group):
            here = pl.ds(group * GROUP, GROUP)
            values_gmem[here], scales_gmem[pl.ds(group, 1)] = reference.quantize(x_gmem[here], scale_fmt, GROUP)

        for i in range(4 * WARPS):
            group = cta * (4 * WARPS) + i
            pl.when(group < groups)(functools.partial(one, group))

    return body


@functools.partial(jax.jit, static_argnames=("scale_fmt", "interpret"))
def quantize(x: jax.Array, *, scale_fmt: str | None, interpret: Any = None) -> tuple[jax.Array, jax.Array]:
    """Runs the op's kernel on at least one group."""
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


# ---- to int8 -------------------------------------------------------------------------------------------------------


def pieces_of(width: int, thread: Word, warps: int) -> list[Word]:
    """Returns the first columns of a thread's pieces of 16 values of a row; some may lie beyond it."""
    return [(thread << 4) + start for start in range(0, width, 16 * 32 * warps)]


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
    """Returns the function of a CTA's row."""

    @plgpu.inline_mgpu(arg_types=(REF, REF, REF, REF, SCALAR))
    def body(ctx, x_gmem, values_gmem, scales_gmem, shared_smem, row):
        del ctx
        addresses = map(mosaic.global_address, (x_gmem, values_gmem, scales_gmem))
        int8_row(width, mosaic.thread_index(), mosaic.scalar(row), SharedWords(shared_smem), *addresses)

    return body


def interpreted_int8(width: int):
    """Returns the twin of `device_int8`, by the reference."""
    del width

    def body(x_gmem, values_gmem, scales_gmem, shared_smem, row):
        del shared_smem
        here = pl.ds(row, 1)
        values_gmem[here], scales_gmem[here] = reference.quantize_int8(x_gmem[here])

    return body


@functools.partial(jax.jit, static_argnames=("interpret",))
def quantize_int8(x: jax.Array, *, interpret: Any = None) -> tuple[jax.Array, jax.Array]:
    """Runs the op's kernel on at least one row."""
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
