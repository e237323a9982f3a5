"""Quantisation to FP8 (e4m3) of values in a warp's registers: device code, bit for bit what `quantize` gives."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from pallas_kernels import mosaic
from pallas_kernels.mosaic import Float, Word
from pallas_kernels.quantize.reference import FP8_MAX, SMALLEST_AMAX


def group_maximum(words: Sequence[Word], lanes: int) -> Float:
    """Returns the largest magnitude of packed bfloat16 values over `lanes` neighbouring lanes."""

    def larger(a: Word, b: Word) -> Word:
        return mosaic.ptx_word("max.NaN.bf16x2 $0, $1, $2;", a, b)

    largest = functools.reduce(larger, [word & 0x7FFF7FFF for word in words])
    for distance in (16, 8, 4, 2, 1):
        if distance < lanes:
            largest = larger(largest, mosaic.shuffle("bfly", largest, distance))
    low, high = mosaic.unpack_bf16([largest])
    return low.max(high)


def group_maximum_of_floats(values: Sequence[Float], lanes: int) -> Float:
    """Returns the largest magnitude of float32 values over `lanes` neighbouring lanes."""
    largest = functools.reduce(Float.max, [Float.of_bits(x.bits() & 0x7FFFFFFF) for x in values])
    for distance in (16, 8, 4, 2, 1):
        if distance < lanes:
            largest = largest.max(Float.of_bits(mosaic.shuffle("bfly", largest.bits(), distance)))
    return largest


def power_of_two(scale: Float) -> tuple[Float, Float]:
    """`scale` rounded up to one, and its exact inverse."""
    exponent = (scale.bits() >> 23) + (scale.bits() & 0x7FFFFF).differs(0).to_word()
    return Float.of_bits(exponent << 23), Float.of_bits((254 - exponent) << 23)


def quantize_floats(values: Sequence[Float], largest: Float, scale_fmt: str | None) -> tuple[list[Word], Float]:
    """Returns packed e4m3 values, and the scale of a group whose largest magnitude is `largest`."""
    scale = largest.max(SMALLEST_AMAX) * float(np.float32(1 / FP8_MAX))
    if scale_fmt is None:
        return mosaic.pack_e4m3([x / scale for x in values]), scale
    scale, inverse = power_of_two(scale)
    return mosaic.pack_e4m3([x * inverse for x in values]), scale


def quantize(words: Sequence[Word], lanes: int, scale_fmt: str | None) -> tuple[list[Word], Float]:
    """Packed bfloat16 values of `lanes` neighbouring lanes -> this lane's packed e4m3 values, and the scale of all."""
    return quantize_floats(mosaic.unpack_bf16(words), group_maximum(words, lanes), scale_fmt)
