"""float32 numbers of device code, and the formats that they are packed in."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence

from jax.experimental.mosaic.gpu import utils as mgu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.mosaic.mlir import f32
from pallas_kernels.mosaic.words import Word, integer


class Float:
    """A float32 in a thread's register. A product whose sum follows may be fused with it."""

    def __init__(self, value: ir.Value | float):
        self.value = value if isinstance(value, ir.Value) else f32(float(value))

    @staticmethod
    def of_bits(bits: Word) -> Float:
        """Returns the float with these bits."""
        return Float(arith.bitcast(ir.F32Type.get(), bits.value))

    def bits(self) -> Word:
        """Its bits."""
        return Word(arith.bitcast(integer(32), self.value))

    def _with(self, operation: Callable[..., ir.Value], other: Float | float) -> Float:
        return Float(operation(self.value, as_float(other).value))

    __add__ = __radd__ = functools.partialmethod(_with, arith.addf)
    __sub__ = functools.partialmethod(_with, arith.subf)
    __mul__ = __rmul__ = functools.partialmethod(_with, arith.mulf)
    max = functools.partialmethod(_with, arith.maximumf)
    """The larger; NaN if one is."""

    def __truediv__(self, other: Float | float) -> Float:
        return ptx_float("div.rn.f32 $0, $1, $2;", self, other)

    def at_most(self, other: Float | float) -> Word:
        """Returns the predicate self <= other; false with a NaN."""
        return Word(arith.cmpf(arith.CmpFPredicate.OLE, self.value, as_float(other).value))

    def times_plus(self, factor: Float | float, summand: Float | float) -> Float:
        """self * factor + summand, rounded once."""
        return Float(llvm.intr_fma(self.value, as_float(factor).value, as_float(summand).value))

    def reciprocal_sqrt(self) -> Float:
        """1 / sqrt, within 2^-22 of it: what XLA makes of `lax.rsqrt`."""
        return ptx_float("rsqrt.approx.f32 $0, $1;", self)


def as_float(x: Float | float) -> Float:
    """`x` itself, or a constant."""
    return x if isinstance(x, Float) else Float(x)


def ptx_float(text: str, *arguments: Float | float) -> Float:
    """PTX on float32 operands with one float32 result, `$0`."""
    values = [as_float(x).value for x in arguments]
    return Float(mgu.inline_ptx(text, *values, result_types=ir.F32Type.get()))


def unpack_bf16(words: Sequence[Word]) -> list[Float]:
    """Two bfloat16 values a word, the lower half first."""
    return [Float.of_bits(half) for word in words for half in (word << 16, word & -65536)]


def pack_bf16(values: Sequence[Float]) -> list[Word]:
    """Returns the inverse of `unpack_bf16`, rounded to nearest."""
    return [
        Word(mgu.inline_ptx("cvt.rn.bf16x2.f32 $0, $2, $1;", low.value, high.value, result_types=integer(32)))
        for low, high in zip(values[::2], values[1::2], strict=True)
    ]


def pack_e4m3(values: Sequence[Float]) -> list[Word]:
    """Four e4m3 values a word, the lowest byte first, rounded to nearest; beyond 448 they are 448."""
    text = (
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; "
        "mov.b32 $0, {low, high}; }"
    )
    return [
        Word(mgu.inline_ptx(text, *[x.value for x in values[i : i + 4]], result_types=integer(32)))
        for i in range(0, len(values), 4)
    ]


def unpack_e4m3(words: Sequence[Word]) -> list[Float]:
    """Returns the inverse of `pack_e4m3`."""
    text = (
        "{ .reg .b16 low, high, a, b, c, d; .reg .b32 x, y; mov.b32 {low, high}, $4; cvt.rn.f16x2.e4m3x2 x, low; "
        "cvt.rn.f16x2.e4m3x2 y, high; mov.b32 {a, b}, x; mov.b32 {c, d}, y; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; "
        "cvt.f32.f16 $2, c; cvt.f32.f16 $3, d; }"
    )
    types = (ir.F32Type.get(),) * 4
    return [Float(x) for word in words for x in mgu.inline_ptx(text, word.value, result_types=types)]


def zero_after(words: Sequence[Word]) -> Float:
    """0.0 or -0.0, by the words' sign bits: a sum that starts with it waits for their loads, which are then in flight
    together. The compiler would move a load down to its use.
    """
    return Float.of_bits(functools.reduce(operator.xor, words) & -(1 << 31))
