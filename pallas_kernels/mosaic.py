"""What Pallas has no word for: scalar device code, PTX and shared-memory words inside `plgpu.inline_mgpu`.

Pallas' own arrays and copies carry the kernels. Where a kernel needs a thread's own registers (a gather, a histogram, a
warp vote), it writes a small `inline_mgpu` function with the `Word`s below. The interpreter cannot run those, so each
has a twin in plain `jax.numpy` beside it in its kernel's file.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, scf
from jaxlib.mlir.dialects import gpu as gpu_dialect

REF = plgpu.RefType()
SCALAR = plgpu.Layout.WG_SPLAT(())
INT32 = plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR)
"""For `inline_mgpu`: a plain ref, a scalar argument and a scalar int32 result."""


def interpreter(detect_races: bool = True) -> Any:
    """Parameters for `plgpu.kernel(interpret=...)`."""
    return plgpu.InterpretGPUParams(detect_races=detect_races)


def interpret_on(backend: str) -> Any:
    """`interpret` of a kernel on the backend that was chosen: None on a GPU."""
    return interpreter() if backend == "interpret" else None


def integer(bits: int) -> ir.Type:
    """The MLIR type of an integer."""
    return ir.IntegerType.get_signless(bits)


def i32(value: int) -> ir.Value:
    """An MLIR constant."""
    return arith.constant(integer(32), value)


def i64(value: int) -> ir.Value:
    """An MLIR constant."""
    return arith.constant(integer(64), value)


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
        """The opposite predicate."""
        return Word(arith.xori(self.value, arith.constant(integer(1), 1)))

    def to_word(self) -> Word:
        """A predicate as 0 or 1."""
        return Word(arith.extui(integer(32), self.value))

    def leading_zeros(self) -> Word:
        """Zero bits above the highest one."""
        return Word(llvm.intr_ctlz(self.value, False))

    def bit_count(self) -> Word:
        """How many bits are set."""
        return Word(llvm.intr_ctpop(self.value))

    def wide(self) -> ir.Value:
        """The same number in 64 bits, for addresses."""
        return arith.extui(integer(64), self.value)


def total(words: Sequence[Word]) -> Word:
    """The sum of one or more words."""
    return functools.reduce(operator.add, words)


def scalar(x: Any) -> Word:
    """A scalar argument of an `inline_mgpu` function (declared as `SCALAR`)."""
    return Word(x.registers.item())


def splat(x: Word | int) -> Any:
    """A scalar result of an `inline_mgpu` function (declared as `INT32`); equal in all threads."""
    return mgpu.FragmentedArray.splat(as_word(x).value, (), is_signed=True)


# ---- float32 ---------------------------------------------------------------------------------------------------


class Float:
    """A float32 in a thread's register. A product whose sum follows may be fused with it."""

    def __init__(self, value: ir.Value | float):
        self.value = value if isinstance(value, ir.Value) else arith.constant(ir.F32Type.get(), float(value))

    @staticmethod
    def of_bits(bits: Word) -> Float:
        """The float with these bits."""
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
        """The predicate self <= other; false with a NaN."""
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
    """The inverse of `unpack_bf16`, rounded to nearest."""
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
    """The inverse of `pack_e4m3`."""
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


def warp_sum(x: Float) -> Float:
    """The sum over the warp, the same bits in every lane."""
    for distance in (16, 8, 4, 2, 1):
        x = x + Float.of_bits(shuffle("bfly", x.bits(), distance))
    return x


# ---- control flow ----------------------------------------------------------------------------------------------


def loop(start, stop, step, state: Sequence[Word | int], body: Callable[..., Sequence[Word] | None]) -> list[Word]:
    """`for i in range(start, stop, step): state = body(i, *state)`."""
    op = scf.ForOp(as_word(start).value, as_word(stop).value, as_word(step).value, [as_word(x).value for x in state])
    with ir.InsertionPoint(op.body):
        result = body(Word(op.induction_variable), *[Word(x) for x in op.inner_iter_args])
        scf.YieldOp([as_word(x).value for x in result or []])
    return [Word(x) for x in op.results]


def repeat_while(state: Sequence[Word | int], body: Callable[..., Sequence[Word]]) -> list[Word]:
    """`body(*state) -> (again?, *state)`, at least once."""
    start = [as_word(x).value for x in state]
    types = [x.type for x in start]
    op = scf.WhileOp(types, start)
    before, after = op.before.blocks.append(*types), op.after.blocks.append(*types)
    with ir.InsertionPoint(before):
        again, *rest = body(*[Word(x) for x in before.arguments])
        scf.ConditionOp(again.value, [as_word(x).value for x in rest])
    with ir.InsertionPoint(after):
        scf.YieldOp(list(after.arguments))
    return [Word(x) for x in op.results]


def branch(
    condition: Word, then: Callable[[], Any], otherwise: Callable[[], Any] | Sequence[Word | int], results: int = 0
) -> list[Word]:
    """The words of `then()` or of `otherwise` (a function, or the words themselves: then `results` is their number)."""
    if not callable(otherwise):
        values = list(otherwise)
        otherwise, results = (lambda: values), len(values)
    op = scf.IfOp(condition.value, [integer(32)] * results, has_else=True)
    for block, function in ((op.then_block, then), (op.else_block, otherwise)):
        with ir.InsertionPoint(block):
            scf.yield_([as_word(x).value for x in (function() or [])][:results])
    return [Word(x) for x in list(op.results)[:results]]


def when(condition: Word, body: Callable[[], Any]) -> None:
    """Runs `body` in the threads where the predicate holds."""
    with mgu.when(condition.value):
        body()


# ---- threads ---------------------------------------------------------------------------------------------------


def thread_index() -> Word:
    """The thread's number in its CTA."""
    return Word(mgu.thread_idx())


def barrier() -> None:
    """All threads of the CTA meet (`bar.sync 0`)."""
    gpu_dialect.barrier()


def cluster_barrier() -> None:
    """All threads of the cluster meet, with release and acquire."""
    ptx("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;")


def shuffle(kind: str, x: Word, lanes: Word | int) -> Word:
    """`x` of another lane: kind "up", "down", "bfly" or "idx"."""
    clamp = 0 if kind == "up" else 31
    return Word(nvvm.shfl_sync(i32(-1), x.value, as_word(lanes).value, i32(clamp), getattr(nvvm.ShflKind, kind)))


def warp_reduce(kind: str, x: Word) -> Word:
    """ "min", "max" or "add" (unsigned) over the warp."""
    return ptx_word(f"redux.sync.{kind}.u32 $0, $1, 0xffffffff;", x)


def warp_votes(predicate: Word) -> Word:
    """A bit a lane of the warp: set where the predicate holds."""
    text = "{ .reg .pred p; setp.ne.b32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }"
    return ptx_word(text, predicate.to_word())


def warp_prefix_sum(x: Word, lane: Word) -> Word:
    """Inclusive prefix sum over the warp."""
    for distance in (1, 2, 4, 8, 16):
        x = x + (lane >= distance).where(shuffle("up", x, distance), 0)
    return x


# ---- PTX and memory --------------------------------------------------------------------------------------------


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
    found = mgu.inline_ptx(
        text,
        *[x if isinstance(x, ir.Value) else as_word(x).value for x in arguments],
        result_types=(integer(32),) * results,
        has_side_effects=True,
        convergent=True,
    )
    return [Word(x) for x in (found if isinstance(found, list | tuple) else [found])]


def vector_operand(first: int, count: int) -> tuple[str, str]:
    """PTX's vector suffix and operand list for `$first`...: (".v4", "{$0, $1, $2, $3}")."""
    names = [f"${first + i}" for i in range(count)]
    return ("", names[0]) if count == 1 else (f".v{count}", "{" + ", ".join(names) + "}")


def global_address(ref: Any) -> ir.Value:
    """The 64-bit address of a device-memory ref."""
    return llvm.ptrtoint(integer(64), mgu.memref_ptr(ref))


def shared_address(ref: Any) -> Word:
    """The 32-bit address of a shared-memory ref."""
    return Word(llvm.ptrtoint(integer(32), mgu.memref_ptr(ref)))


def offset(address: ir.Value, count: Word, size: int) -> ir.Value:
    """`address + count * size` bytes, in 64 bits."""
    return arith.addi(address, arith.muli(count.wide(), i64(size)))


def parts_of(address: ir.Value, count: int) -> Iterator[ir.Value]:
    """Where each 4 of `count` words are, a multiple of 4."""
    return (offset(address, Word(i), 4) for i in range(0, count, 4))


def load_global(address: ir.Value, count: int = 1) -> list[Word]:
    """1, 2, or a multiple of 4 consecutive words, aligned to their size or to 16 bytes."""
    if count > 4:
        return [word for part in parts_of(address, count) for word in load_global(part, 4)]
    suffix, names = vector_operand(0, count)
    return ptx_words(f"ld.global{suffix}.b32 {names}, [${count}];", count, address)


def load_read_only(address: ir.Value, count: int = 1) -> list[Word]:
    """`load_global` of memory that nobody writes while the kernel runs: may move over stores."""
    if count > 4:
        return [word for part in parts_of(address, count) for word in load_read_only(part, 4)]
    suffix, names = vector_operand(0, count)
    types = (integer(32),) * count
    # Side effects are only claimed so that LLVM issues the loads where they stand, not where they are used.
    text = f"ld.global.nc{suffix}.b32 {names}, [${count}];"
    found = mgu.inline_ptx(text, address, result_types=types, has_side_effects=True)
    return [Word(x) for x in found]


def store_global(address: ir.Value, words: Sequence[Word | int], predicate: Word | None = None) -> None:
    """1, 2, or a multiple of 4 consecutive words, aligned to their size or to 16 bytes."""
    if len(words) > 4:
        for i, part in enumerate(parts_of(address, len(words))):
            store_global(part, words[4 * i : 4 * i + 4], predicate)
        return
    suffix, names = vector_operand(1, len(words))
    ptx(f"st.global{suffix}.b32 [$0], {names};", address, *words, predicate=predicate)


class SharedWords:
    """A one-dimensional array of 32-bit words in shared memory."""

    def __init__(self, base: Any):
        self.base = base if isinstance(base, Word) else shared_address(base)

    def address(self, index: Word | int) -> Word:
        """The address of a word."""
        return self.base + (as_word(index) << 2)

    def part(self, index: Word | int) -> SharedWords:
        """The array from `index` on."""
        return SharedWords(self.address(index))

    def load(self, index: Word | int) -> Word:
        """One word."""
        return ptx_word("ld.shared.b32 $0, [$1];", self.address(index))

    def load_many(self, index: Word | int, count: int) -> list[Word]:
        """`count` consecutive words: 1, 2, or a multiple of 4, aligned."""
        address, width = self.address(index), min(count, 4)
        suffix, names = vector_operand(0, width)
        words = []
        for i in range(0, count, width):
            words += ptx_words(f"ld.shared{suffix}.b32 {names}, [${width}];", width, address + 4 * i)
        return words

    def store(self, index: Word | int, x: Word | int, predicate: Word | None = None) -> None:
        """One word."""
        ptx("st.shared.b32 [$0], $1;", self.address(index), x, predicate=predicate)

    def store_zeros(self, index: Word | int, count: int) -> None:
        """Zeros over `count` consecutive words: 1, 2, or a multiple of 4, aligned."""
        address, width = self.address(index), min(count, 4)
        suffix, names = vector_operand(1, width)
        for i in range(0, count, width):
            ptx(f"st.shared{suffix}.b32 [$0], {names};", address + 4 * i, *[0] * width)

    def load_pair(self, pair: Word | int) -> tuple[Word, Word]:
        """Words 2 * pair and 2 * pair + 1."""
        first, second = self.part(as_word(pair) << 1).load_many(0, 2)
        return first, second

    def store_pair(self, pair: Word | int, x: Word, y: Word | int, predicate: Word | None = None) -> None:
        """Words 2 * pair and 2 * pair + 1."""
        ptx("st.shared.v2.b32 [$0], {$1, $2};", self.base + (as_word(pair) << 3), x, y, predicate=predicate)

    def increment(self, index: Word | int, predicate: Word | None = None) -> None:
        """Adds one, atomically."""
        ptx("red.shared.add.u32 [$0], 1;", self.address(index), predicate=predicate)

    def fetch_increment(self, index: Word | int) -> Word:
        """Adds one, atomically, and returns what was there."""
        return ptx_word("atom.shared.add.u32 $0, [$1], 1;", self.address(index))

    def load_of_peer(self, index: Word | int, count: int, rank: Word | int) -> list[Word]:
        """`load_many` from the same array of another CTA of the cluster."""
        address = ptx_word("mapa.shared::cluster.u32 $0, $1, $2;", self.address(index), rank)
        width = min(count, 4)
        suffix, names = vector_operand(0, width)
        words = []
        for i in range(0, count, width):
            words += ptx_words(f"ld.shared::cluster{suffix}.b32 {names}, [${width}];", width, address + 4 * i)
        return words


# ---- against the compiler --------------------------------------------------------------------------------------


@plgpu.inline_mgpu(arg_types=(SCALAR,), return_type=INT32)
def opaque_zero(ctx, step):
    """A zero that LLVM takes for a function of `step`.

    Refs indexed with it keep their wgmma descriptors inside the loop body; hoisted out, a hundred of them are spilled.
    """
    del ctx
    zero = llvm.inline_asm(integer(32), [step.registers.item()], "mov.b32 $0, 0;", "=r,r", has_side_effects=False)
    return splat(Word(zero))
