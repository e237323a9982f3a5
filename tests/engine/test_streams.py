"""Every event is handed out once and in order, whoever makes the steps; leaving a stream cancels its request."""

import gc
import sys
import threading

import pytest
from flax import nnx

from dsv32_jax.config import ModelConfig
from dsv32_jax.engine.engine import Engine
from dsv32_jax.engine.request import SamplingParams
from dsv32_jax.errors import UserError
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.model.model import DeepseekV32
from tests.engine.test_engine import TEXTS
from tests.engine.test_transactions import SMALL, tokens
from tests.harness import EXACT

EIGHT, NINE, THIRTY = (SamplingParams(new, ignore_eos=True) for new in (8, 9, 30))


@pytest.fixture(scope="module")
def lm():
    config = ModelConfig.tiny(
        num_hidden_layers=1, initializer_range=0.3, quantization_config=None, num_nextn_predict_layers=0
    )
    return LanguageModel(DeepseekV32(config, nnx.Rngs(0)), config, options=EXACT)


@pytest.fixture(scope="module")
def shared(lm):
    return Engine(lm, **SMALL)


@pytest.fixture
def engine(shared):
    yield shared
    while shared.busy:
        shared.step()
    assert shared.pool.statistics().in_use == 0 and not shared._owner


def add(engine, count: int, params: SamplingParams = EIGHT):
    return [engine.add(TEXTS[0][n : n + 10], params) for n in range(count)]


def check(events, request) -> None:
    """All events of a request, in order."""
    assert all(event.request is request for event in events)
    for n, completion in enumerate(request.completions):
        assert [event.token for event in events if event.index == n] == completion.tokens


def test_two_streams_one_after_the_other(engine):
    first, second = add(engine, 2)
    for request in (first, second):
        events = list(engine.stream(request))
        assert len(events) == 8
        check(events, request)


@pytest.mark.parametrize("n", [1, 2])
def test_two_streams_in_turns(engine, n):
    requests = add(engine, 2, SamplingParams(8, 1.0, n=n, ignore_eos=True))
    streams = [engine.stream(request) for request in requests]
    events = [[], []]
    for _ in range(8 * n):
        for mine, stream in zip(events, streams, strict=True):
            mine.append(next(stream))
    for mine, stream, request in zip(events, streams, requests, strict=True):
        assert next(stream, None) is None and request.finished
        check(mine, request)


def test_a_stream_that_begins_late_has_what_came_before(engine):
    early, late, latest = add(engine, 3)
    stream = engine.stream(early)
    begin = [next(stream) for _ in range(5)]
    check(list(engine.stream(late)), late)
    check(begin + list(stream), early)
    check(list(engine.stream(latest)), latest)
    assert not engine.busy


def test_steps_between_the_events_of_a_stream(engine):
    """`step` returns the events of requests without a stream, also those of steps that a stream made; each once."""
    streamed, other = add(engine, 2)
    stream, mine, returned = engine.stream(streamed), [], []
    for event in stream:
        mine.append(event)
        if len(mine) % 3 == 0:
            returned += engine.step()
    returned += engine.step()
    check(mine, streamed)
    check(returned, other)
    assert engine.step() == []


def test_a_stream_takes_over_from_steps(engine):
    request, other = add(engine, 2)
    events = [event for _ in range(6) for event in engine.step()]
    begin = [event for event in events if event.request is request]
    assert begin
    check(begin + list(engine.stream(request)), request)
    returned = [event for event in events + engine.step() if event.request is other]
    check(returned, other)


def test_generate_beside_a_stream(engine):
    (streamed,) = add(engine, 1)
    stream = engine.stream(streamed)
    begin = [next(stream), next(stream)]
    (generated,) = engine.generate([TEXTS[1][:9]], EIGHT)
    assert engine.step() == []  # nobody's
    check(begin + list(stream), streamed)
    check(list(engine.stream(generated)), generated)


def leave_by_break(stream):
    for _ in stream:
        break


def leave_by_an_error(stream):
    with pytest.raises(ZeroDivisionError):
        for _ in stream:
            raise ZeroDivisionError


def leave_in_a_cycle(stream):
    cycle = [stream]
    cycle.append(cycle)
    next(stream)
    del cycle, stream


@pytest.mark.parametrize(
    "leave",
    [leave_by_break, leave_by_an_error, leave_in_a_cycle, lambda stream: stream.close(), lambda stream: None],
)
def test_who_leaves_a_stream_ends_its_request(engine, leave):
    left, other = add(engine, 2, THIRTY)
    leave(engine.stream(left))
    gc.collect()
    assert left.completions[0].finish_reason == "cancelled"
    assert len(list(engine.stream(other))) == 30 and not engine.busy


def test_a_stream_that_is_kept_can_be_taken_up_again(engine):
    (request,) = add(engine, 1)
    stream, events = engine.stream(request), []
    for event in stream:
        events.append(event)
        if len(events) == 3:
            break
    assert not request.finished
    other = engine.stream(request)  # another reader: they share what comes
    del stream
    assert not request.finished
    check(events + list(other), request)


def test_an_interrupt_inside_a_stream_ends_its_request_alone(engine, monkeypatch):
    request, other = add(engine, 2)
    stream, step = engine.stream(request), engine.step
    events = [next(stream)]
    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert step == engine.step and events[0].token == request.completions[0].tokens[0]
    assert request.completions[0].finish_reason == "cancelled" and next(stream, None) is None
    check(list(engine.stream(other)), other)


def test_a_stream_that_is_collected_in_the_middle_of_a_step(engine, monkeypatch):
    """Python may collect it anywhere: its request ends with the next call."""
    left, other = add(engine, 2, THIRTY)
    streams, schedule = [engine.stream(left)], engine.scheduler.schedule

    def collecting():
        streams.clear()
        return schedule()

    monkeypatch.setattr(engine.scheduler, "schedule", collecting)
    assert len(list(engine.stream(other))) == 30
    assert left.completions[0].finish_reason == "cancelled" and other.completions[0].finish_reason == "length"


def test_a_request_that_is_cancelled_while_it_is_streamed(engine):
    (request,) = add(engine, 1, THIRTY)
    stream = engine.stream(request)
    begin = [next(stream)]
    engine.cancel(request)
    check(begin + list(stream), request)
    assert len(request.completions[0].tokens) < 30


def test_events_that_nobody_reads_go_with_their_request(engine):
    (read,) = add(engine, 1, THIRTY)
    before = len(gc.get_objects())
    for n in range(3):
        engine.add(TEXTS[1][n : n + 5], NINE)
    list(engine.stream(read))
    assert not engine._outbox._waiting and sys.getrefcount(read) <= 3
    assert len(gc.get_objects()) - before < 100
    assert engine.step() == []


def test_a_request_of_another_engine_is_refused(engine, lm):
    other = Engine(lm, **SMALL)
    request = other.add([5], EIGHT)
    for call in (engine.stream, engine.cancel):
        with pytest.raises(UserError, match="not one of this engine's"):
            call(request)
        with pytest.raises(UserError, match="request: 5"):
            call(5)
    assert not request.finished


def test_threads_share_an_engine(engine):
    """Some threads stream, some generate, some step; each request gets the tokens that it gets alone."""
    prompts = [TEXTS[n % 2][n : n + 20] for n in range(6)]
    want = [tokens(engine.generate([prompt], THIRTY)[0]) for prompt in prompts]
    tokens_of, errors = {}, []

    def stream(n):
        request = engine.add(prompts[n], THIRTY)
        tokens_of[n] = [[event.token for event in engine.stream(request)]]

    def generate(n):
        tokens_of[n] = tokens(engine.generate([prompts[n]], THIRTY)[0])

    def step(n):
        request = engine.add(prompts[n], THIRTY)
        while not request.finished:
            engine.step()
        tokens_of[n] = tokens(request)

    def guarded(call, n):
        try:
            call(n)
        except BaseException as error:
            errors.append(error)

    calls = [stream, generate, step] * 2
    threads = [threading.Thread(target=guarded, args=(call, n)) for n, call in enumerate(calls)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    finally:
        sys.setswitchinterval(interval)
    assert not errors and [tokens_of[n] for n in range(6)] == want
