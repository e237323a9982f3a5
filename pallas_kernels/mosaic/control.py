"""Control flow of device code, and what the threads of a warp, a CTA or a cluster do together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils as mgu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import gpu as gpu_dialect
from jaxlib.mlir.dialects import nvvm, scf

from pallas_kernels.mosaic.floats import Float
from pallas_kernels.mosaic.mlir import for_loop, if_else
from pallas_kernels.mosaic.words import Word, as_word, i32, integer, ptx, ptx_word

# ---- control flow --------------------------------------------------------------------------------------------------


def loop(start, stop, step, state: Sequence[Word | int], body: Callable[..., Sequence[Word] | None]) -> list[Word]:
    """`for i in range(start, stop, step): state = body(i, *state)`."""
    op = for_loop(as_word(start).value, as_word(stop).value, as_word(step).value, [as_word(x).value for x in state])
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
    op = if_else(condition.value, [integer(32)] * results)
    for block, function in ((op.then_block, then), (op.else_block, otherwise)):
        with ir.InsertionPoint(block):
            scf.yield_([as_word(x).value for x in (function() or [])][:results])
    return [Word(x) for x in list(op.results)[:results]]


def when(condition: Word, body: Callable[[], Any]) -> None:
    """Runs `body` in the threads where the predicate holds."""
    with mgu.when(condition.value):
        body()


# ---- threads -------------------------------------------------------------------------------------------------------


def thread_index() -> Word:
    """Returns the thread's number in its CTA."""
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
    """Returns a bit for each lane of the warp: it is set where the predicate holds."""
    text = "{ .reg .pred p; setp.ne.b32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }"
    return ptx_word(text, predicate.to_word())


def warp_prefix_sum(x: Word, lane: Word) -> Word:
    """Returns the inclusive prefix sum over the warp."""
    for distance in (1, 2, 4, 8, 16):
        x = x + (lane >= distance).where(shuffle("up", x, distance), 0)
    return x


def warp_sum(x: Float) -> Float:
    """Returns the sum over the warp, the same bits in every lane."""
    for distance in (16, 8, 4, 2, 1):
        x = x + Float.of_bits(shuffle("bfly", x.bits(), distance))
    return x
