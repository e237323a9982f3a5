"""Scalars of device code: 32-bit words and predicates in a thread's register, and PTX on them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.mosaic.mlir import constant

REF = plgpu.RefType()
SCALAR = plgpu.Layout.WG_SPLAT(())
INT32 = plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR)
"""For `inline_mgpu`: a plain ref, a scalar argument and a scalar int32 result."""


def integer(bits: int) -> ir.Type:
    """Returns the MLIR type of an integer."""
    return ir.IntegerType.get_signless(bits)


def i32(value: int) -> ir.Value:
    """An MLIR constant."""
    return constant(integer(32), value)


def i64(value: int) -> ir.Value:
    """An MLIR constant."""
    return constant(integer(64), value)


def as_word(x: Word | ir.Value | int) -> Word:
    """`x` itself, or a constant."""
    return x if isinstance(x, Word) else Word(x)


class Word:
    """A 32-bit word, or a predicate, in a thread's register. Arithmetic and comparisons are unsigned unless named."""

    def __init__(self, value: ir.Value | int):
        self.value = value if isinstance(value, ir.Value) else i32(int(value))

    def _with(self, operation: Callable[..., ir.Value], other: Word | int) -> Word:
        return Word(operation(self.value, as_word(other).value))

    def _compare(self, predicate: str, other: Word | int) -> Word:
        return Word(arith.cmpi(getattr(arith.CmpIPredicate, predicate), self.value, as_word(other).value))

    __add__ = __radd__ = functools.partialmethod(_with, arith.addi)
    __sub__ = functools.partialmethod(_with, arith.subi)
    __mul__ = __rmul__ = functools.partialmethod(_with, arith.muli)
    __and__ = functools.partialmethod(_with, arith.andi)
    __or__ = functools.partialmethod(_with, arith.ori)
    __xor__ = functools.partialmethod(_with, arith.xori)
    __lshift__ = functools.partialmethod(_with, arith.shli)
    __rshift__ = functools.partialmethod(_with, arith.shrui)
    __floordiv__ = functools.partialmethod(_with, arith.divui)
    __mod__ = functools.partialmethod(_with, arith.remui)
    __lt__ = functools.partialmethod(_compare, "ult")
    __le__ = functools.partialmethod(_compare, "ule")
    __gt__ = functools.partialmethod(_compare, "ugt")
    __ge__ = functools.partialmethod(_compare, "uge")
    equals = functools.partialmethod(_compare, "eq")
    differs = functools.partialmethod(_compare, "ne")
    signed_less = functools.partialmethod(_compare, "slt")
    signed_greater = functools.partialmethod(_compare, "sgt")
    signed_shift_right = functools.partialmethod(_with, arith.shrsi)
    max = functools.partialmethod(_with, arith.maxui)
    min = functools.partialmethod(_with, arith.minui)
    signed_max = functools.partialmethod(_with, arith.maxsi)
    signed_min = functools.partialmethod(_with, arith.minsi)

    def __rsub__(self, other: int) -> Word:
        return as_word(other) - self

    def where(self, yes: Word | int, no: Word | int) -> Word:
        """`yes` where this predicate holds, else `no`."""
        return Word(arith.select(self.value, as_word(yes).value, as_word(no).value))

    def negated(self) -> Word:
        """Returns the opposite predicate."""
        return Word(arith.xori(self.value, constant(integer(1), 1)))

    def to_word(self) -> Word:
        """Returns a predicate as 0 or 1."""
        return Word(arith.extui(integer(32), self.value))

    def leading_zeros(self) -> Word:
        """Returns the number of zero bits above the highest one."""
        return Word(llvm.intr_ctlz(self.value, False))

    def bit_count(self) -> Word:
        """Returns how many bits are set."""
        return Word(llvm.intr_ctpop(self.value))

    def wide(self) -> ir.Value:
        """Returns the same number in 64 bits, for addresses."""
        return arith.extui(integer(64), self.value)


def total(words: Sequence[Word]) -> Word:
    """Returns the sum of one or more words."""
    return functools.reduce(operator.add, words)


def scalar(x: Any) -> Word:
    """Returns a scalar argument of an `inline_mgpu` function (declared as `SCALAR`)."""
    return Word(x.registers.item())


def splat(x: Word | int) -> Any:
    """Returns a scalar result of an `inline_mgpu` function (declared as `INT32`); equal in all threads."""
    return mgpu.FragmentedArray.splat(as_word(x).value, (), is_signed=True)


# ---- PTX -----------------------------------------------------------------------------------------------------------


def ptx(text: str, *arguments: Word | ir.Value | int, predicate: Word | None = None) -> None:
    """PTX without a result; `predicate` guards a single instruction."""
    mgu.inline_ptx(
        text,
        *[x if isinstance(x, ir.Value) else as_word(x).value for x in arguments],
        predicate=None if predicate is None else predicate.value,
        has_side_effects=True,
        convergent=True,
    )


def ptx_word(text: str, *arguments: Word | ir.Value | int) -> Word:
    """PTX with one 32-bit result, `$0`."""
    return ptx_words(text, 1, *arguments)[0]


def ptx_words(text: str, results: int, *arguments: Word | ir.Value | int) -> list[Word]:
    """PTX with some 32-bit results, `$0` to `$(results - 1)`; the arguments come after them."""
    values = mgu.inline_ptx(
        text,
        *[x if isinstance(x, ir.Value) else as_word(x).value for x in arguments],
        result_types=(integer(32),) * results,
        has_side_effects=True,
        convergent=True,
    )
    return [Word(x) for x in (values if isinstance(values, list | tuple) else [values])]


def vector_operand(first: int, count: int) -> tuple[str, str]:
    """PTX's vector suffix and operand list for `$first`...: (".v4", "{$0, $1, $2, $3}")."""
    names = [f"${first + i}" for i in range(count)]
    return ("", names[0]) if count == 1 else (f".v{count}", "{" + ", ".join(names) + "}")


# ---- against the compiler ------------------------------------------------------------------------------------------


@plgpu.inline_mgpu(arg_types=(SCALAR,), return_type=INT32)
def opaque_zero(ctx, step):
    """A zero that LLVM takes for a function of `step`.

    Refs indexed with it keep their wgmma descriptors inside the loop body; hoisted out, a hundred of them are spilled.
    """
    del ctx
    zero = llvm.inline_asm(integer(32), [step.registers.item()], "mov.b32 $0, 0;", "=r,r", has_side_effects=False)
    return splat(Word(zero))
