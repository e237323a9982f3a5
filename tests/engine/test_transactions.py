"""Interrupts at any point of an engine's calls: requests go on or end, and no change is half made."""

import signal
import sys
import threading
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from dsv32_jax.engine import engine as engine_module
from dsv32_jax.engine import transactions
from dsv32_jax.engine.engine import Engine
from dsv32_jax.engine.request import SamplingParams
from dsv32_jax.engine.transactions import Transactional
from tests.engine.test_engine import TEXTS
from tests.engine.test_speculation import guessing

HOST = ("engine", "intake", "admission", "transactions", "streams", "scheduler", "blocks", "packing", "speculation")
HOST += ("device_step", "request", "metrics")
FILES = {str(Path(transactions.__file__).parent / f"{name}.py") for name in HOST}


class Interrupt:
    """Raises `KeyboardInterrupt` before the `at`-th instruction of the engine's own code, and perhaps later again."""

    TOOL = 4

    def __init__(self, at: int, again: int | None = None):
        self.points = [at] if again is None else [at, at + again]
        self.count = 0

    def __enter__(self) -> "Interrupt":
        sys.monitoring.use_tool_id(self.TOOL, "interrupts")
        sys.monitoring.register_callback(self.TOOL, sys.monitoring.events.INSTRUCTION, self._instruction)
        sys.monitoring.set_events(self.TOOL, sys.monitoring.events.INSTRUCTION)
        return self

    def __exit__(self, *_) -> None:
        self.points = []
        sys.monitoring.set_events(self.TOOL, 0)
        # Neither the events nor a freed tool take the callback away, and code that still has its instructions calls it.
        sys.monitoring.register_callback(self.TOOL, sys.monitoring.events.INSTRUCTION, None)
        sys.monitoring.free_tool_id(self.TOOL)

    def _instruction(self, code, _):
        if code.co_filename not in FILES:
            return sys.monitoring.DISABLE
        self.count += 1
        if self.count in self.points:
            raise KeyboardInterrupt
        return None


SMALL = {"cache_tokens": 4 * 64, "max_tokens": 8, "max_sequences": 4}
"""One shape of a step, and a cache that is too small for two long sequences."""
CASES = [  # text, tokens of the prompt, new ones, temperature, seed, continuations
    (0, 130, 12, 0.0, 0, 1),
    (1, 130, 20, 0.5, 1, 1),
    (1, 100, 30, 0.5, 0, 3),
    (0, 30, 12, 0.0, 0, 1),
    (1, 63, 4, 0.5, 2, 2),
]


def arguments_of(case) -> tuple[list[int], SamplingParams]:
    text, length, new, temperature, seed, n = case
    return TEXTS[text][:length], SamplingParams(new, temperature, 0.9, seed, n, ignore_eos=True)


def tokens(request) -> list[list[int]]:
    return [completion.tokens for completion in request.completions]


def run(engine: Engine) -> None:
    """Runs to the end, and checks after each step that no block is lost, counted twice or both free and in use."""
    while True:
        blocks = [block for sequence in engine.scheduler.running for block in sequence.table.blocks]
        pool = engine.pool
        assert pool._references == [blocks.count(block) for block in range(pool.num_blocks)]
        assert sorted({*pool._free, *pool._unused, *blocks}) == list(range(pool.num_blocks))
        if not engine.busy:
            break
        engine.step()
    assert not engine._owner and engine.pool.statistics().in_use == 0


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "speculating"])
def engine(request):
    engine = Engine(guessing(0.003), **SMALL, speculate=request.param)
    assert engine.warmup() == 1
    return engine


@pytest.fixture(scope="module")
def tokens_alone(engine):
    """The tokens of each case when nothing else runs and nothing is cached."""
    tokens_of = {}
    for case in CASES:
        engine.pool.forget()
        tokens_of[case] = tokens(engine.generate([arguments_of(case)[0]], arguments_of(case)[1])[0])
    return tokens_of


def add(engine, requests):
    requests.append((CASES[3], engine.add(*arguments_of(CASES[3]))))


def generate(engine, _):
    engine.generate([TEXTS[0][:60], TEXTS[1][:20]], SamplingParams(9, ignore_eos=True))


CALLS = {  # with about how many instructions of the engine's own code they run
    "step": (lambda engine, _: engine.step(), 2000),
    "add": (add, 700),
    "cancel": (lambda engine, requests: engine.cancel(requests[0][1]), 400),
    "stream": (lambda engine, requests: list(engine.stream(requests[0][1])), 20_000),
    "generate": (generate, 20_000),
}


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cases=st.lists(st.sampled_from(CASES), min_size=1, max_size=4),
    steps=st.integers(0, 40),
    call=st.sampled_from(["step", "step", *CALLS]),
    at=st.floats(0, 1),
    again=st.sampled_from([None, None, 1, 40, 300]),
)
def test_an_interrupt_at_any_point_of_a_call(engine, tokens_alone, cases, steps, call, at, again):
    requests = [(case, engine.add(*arguments_of(case))) for case in cases]
    for _ in range(steps):
        engine.step()
    interrupted, instructions = CALLS[call]
    try:
        with Interrupt(1 + int(at * instructions), again):
            interrupted(engine, requests)
    except KeyboardInterrupt:
        pass
    engine.summary()  # any call completes what an interrupt of the clearing up has left
    run(engine)
    for case, request in requests:
        for completion, want in zip(request.completions, tokens_alone[case], strict=True):
            assert completion.finish_reason in ("length", "error", "cancelled")
            complete = completion.finish_reason == "length"
            assert completion.tokens == (want if complete else want[: len(completion.tokens)])
            assert (completion.error is None) == (completion.finish_reason != "error")
    # Nothing is found in the cache that was not written.
    repeated = [engine.add(*arguments_of(case)) for case, _ in requests]
    run(engine)
    assert [tokens(request) for request in repeated] == [tokens_alone[case] for case, _ in requests]


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("_start", KeyboardInterrupt),
        ("_run", SystemExit),
        ("_sampling", RuntimeError),
        ("scheduler.schedule", KeyboardInterrupt),
        ("scheduler.publish", MemoryError),
        ("scheduler.receive", KeyboardInterrupt),
        ("_reset_device_memory", KeyboardInterrupt),
    ],
)
def test_whatever_ends_a_step_leaves_no_block_that_was_not_written(engine, tokens_alone, monkeypatch, error, place):
    """The step ends in the middle of a prompt of 130 tokens, which is then added again."""
    case = CASES[1]
    owner, _, name = place.rpartition(".")
    target = getattr(engine, owner) if owner else engine
    engine.pool.forget()
    request, other = engine.add(*arguments_of(case)), engine.add(*arguments_of(CASES[0]))
    for _ in range(20):
        engine.step()

    def broken(*_, **__):
        raise error("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(target, name, broken)
        if place == "_reset_device_memory":  # while it clears up after another
            patch.setattr(engine, "_start", broken)
        with pytest.raises(error):
            while engine.busy:
                engine.step()
    engine.cancel(request)
    again = engine.add(*arguments_of(case))
    run(engine)
    assert tokens(again) == tokens_alone[case]
    assert request.completions[0].finish_reason == other.completions[0].finish_reason == "error"
    assert "in the middle" in other.completions[0].error or place == "_reset_device_memory"


def test_an_interrupt_while_the_host_waits_for_the_device_changes_nothing(engine, tokens_alone, monkeypatch):
    requests = [(case, engine.add(*arguments_of(case))) for case in CASES]
    fetched, waits = engine_module.SampledTokens.fetched, iter(range(10_000))

    def waiting(sampled):
        if next(waits) % 3 == 0:
            raise KeyboardInterrupt
        return fetched(sampled)

    monkeypatch.setattr(engine_module.SampledTokens, "fetched", waiting)
    interrupts, events = 0, []
    while engine.busy:
        try:
            events += engine.step()
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts > 9
    for case, request in requests:
        assert tokens(request) == tokens_alone[case]
        for n, completion in enumerate(request.completions):
            assert [e.token for e in events if e.request is request and e.index == n] == completion.tokens


def test_a_signal_ends_a_call_in_the_middle(engine, tokens_alone):
    """A real signal, at an arbitrary time."""
    request = engine.add(*arguments_of(CASES[0]))
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.005)
            while True:
                engine.step()
    finally:
        signal.signal(signal.SIGALRM, before)
    run(engine)
    assert tokens(request)[0] == tokens_alone[CASES[0]][0][: len(tokens(request)[0])]
    again = engine.add(*arguments_of(CASES[0]))
    run(engine)
    assert tokens(again) == tokens_alone[CASES[0]]


def test_a_failure_on_the_device_is_noticed_with_its_tokens(engine, tokens_alone, monkeypatch):
    request = engine.add(*arguments_of(CASES[0]))
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine_module.SampledTokens, "fetched", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            while True:
                engine.step()
    assert request.completions[0].error == "ZeroDivisionError: division by zero" and not engine.busy
    again = engine.add(*arguments_of(CASES[0]))
    run(engine)
    assert again.cached_tokens == 0 and tokens(again) == tokens_alone[CASES[0]]


class Pair(Transactional):
    """Two numbers that are always equal."""

    def __init__(self):
        super().__init__()
        self.values, self.settled, self.errors = [0, 0], 0, []

    def recover(self, error):
        self.errors.append(error)
        self.values = [0, 0]

    def apply_deferred(self):
        self.settled += 1

    def set(self, value, between=lambda: None):
        self.values[0] = value
        between()
        self.values[1] = value
        return value


def test_a_change_is_whole_or_not_at_all():
    pair = Pair()
    assert pair.transact(pair.set, 3) == 3 and pair.values == [3, 3]

    def interrupt():
        raise KeyboardInterrupt("so\nit ends")

    with pytest.raises(KeyboardInterrupt):
        pair.transact(pair.set, 4, interrupt)
    assert pair.values == [0, 0] and pair.errors == ["KeyboardInterrupt: so it ends"] and not pair.torn


def test_an_interrupt_at_each_instruction_of_a_change():
    for at in range(1, 1000):
        pair = Pair()
        try:
            with Interrupt(at) as interrupt:
                pair.transact(pair.set, 3)
        except KeyboardInterrupt:
            pass
        pair.repair()
        assert pair.values[0] == pair.values[1] and not pair.torn
        assert pair.transact(pair.set, 4) == 4 and pair.values == [4, 4]
        if interrupt.count < at:
            break
    assert 20 < at < 999


def test_code_that_interrupts_a_change_may_leave_something_but_change_nothing():
    pair = Pair()

    def finalizer():
        pair.apply_or_defer()
        with pytest.raises(RuntimeError, match="interrupts a change"):
            pair.transact(pair.set, 9)

    pair.transact(pair.set, 3, finalizer)
    assert pair.values == [3, 3] and pair.settled == 1 and not pair.errors
    pair.apply_or_defer()
    assert pair.settled == 2


def test_other_threads_wait():
    pair, inside, go = Pair(), threading.Event(), threading.Event()

    def wait():
        inside.set()
        go.wait(60)

    first = threading.Thread(target=pair.transact, args=(pair.set, 3, wait))
    second = threading.Thread(target=pair.transact, args=(pair.set, 4))
    first.start()
    inside.wait(60)
    second.start()
    assert second.is_alive() and pair.values == [3, 0]
    go.set()
    for thread in (first, second):
        thread.join(60)
    assert pair.values == [4, 4] and not pair.errors
