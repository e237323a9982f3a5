"""Requests that wait, are cancelled, expire or fail: others get their answers, and no block stays in use."""

import asyncio
import json
import logging
import threading

import pytest

from dsv32_jax.engine import engine as engine_module
from dsv32_jax.engine.request import SamplingParams
from dsv32_jax.errors import UserError
from dsv32_jax.server import create_app
from tests.server.harness import PATHS, Call, events, service, settings, until

LONG = {"max_tokens": 100}
PARAMS = SamplingParams(max_new_tokens=10, ignore_eos=True)


def call(app, path="/v1/completions", **changes):
    return Call(app, path, PATHS[path] | changes)


async def in_use(app) -> int:
    """Blocks in use, as the engine's thread counts them after all commands and before its next step."""
    return (await app.state.service.worker.summary())["cache"]["in_use"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_blocks_within_a_step(engine, gate, path, stream):
    async def run():
        async with service(engine) as app:
            leaving = call(app, path, stream=stream, n=2, **LONG)
            staying = call(app, path, prompt="In 1903") if "chat" not in path else call(app, path)
            await until(lambda: app.state.service.active == 2)
            await gate.until(lambda: app.state.service.worker.queued == 0)
            await gate.until(lambda: not stream or leaving.body.count(b"data:") > 4)
            leaving.leave()
            await leaving.end()
            gate.step()  # the step that was waiting for the gate
            await until(lambda: engine.metrics.finished["cancelled"] >= before + 2)
            blocks = len({block for each in engine.scheduler.running for block in each.table.blocks})
            gate.open()
            assert blocks == 1
            assert leaving.status == (200 if stream else 0) and b"[DONE]" not in leaving.body
            assert (await staying.end()).status == 200
            await until(lambda: not engine.busy)
            assert await in_use(app) == 0 and app.state.service.active == 0

    before = engine.metrics.finished["cancelled"]
    asyncio.run(run())


def test_a_client_that_leaves_the_queue(engine, gate):
    async def run():
        async with service(engine, max_queue=1) as app:
            worker = app.state.service.worker
            first = call(app)
            await until(lambda: worker.queued == 1)
            first.leave()
            await first.end()
            gate.open()
            await until(lambda: worker.queued == 0 and not engine.busy)
            assert await in_use(app) == 0 and (await call(app).end()).status == 200

    asyncio.run(run())


def test_a_client_that_leaves_before_its_body_has_come(engine):
    async def run():
        async with service(engine) as app:
            messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

            async def receive():
                return next(messages)

            async def send(message):
                pass

            scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
            await app(scope | {"headers": [(b"content-type", b"application/json")]}, receive, send)
            assert not engine.busy

    asyncio.run(run())


def test_a_body_that_does_not_come(engine):
    async def run():
        async with service(engine, read_seconds=0.05) as app:
            request = Call(app, "/v1/completions", chunks=[b"{"])
            request._messages.get_nowait(), request._messages.get_nowait()
            await request.end()
            assert request.status == 408 and request.json["error"]["code"] == "timeout"
            assert request.headers["connection"] == "close"

    asyncio.run(run())


def test_a_full_queue(engine, gate):
    async def run():
        async with service(engine, max_queue=3) as app:
            worker = app.state.service.worker
            waiting = [call(app, prompt=["a", "b"]), call(app, stream=True)]
            await until(lambda: worker.queued == 3)
            for path in PATHS:
                refused = await call(app, path).end()
                assert refused.status == 429 and int(refused.headers["retry-after"]) >= 1
                assert refused.json["error"]["code"] == "queue_full"
                assert refused.json["error"]["type"] == "rate_limit_error"
            gate.open()
            assert [(await each.end()).status for each in waiting] == [200, 200]
            assert worker.queued == 0
            # What runs does not wait: four sequences may, beside a queue of three.
            assert {(await each.end()).status for each in [call(app, prompt="abc"[:n]) for n in (1, 2, 3)]} == {200}

    asyncio.run(run())


def test_prompts_of_one_request_find_room_together_or_not_at_all(engine, gate):
    async def run():
        async with service(engine, max_queue=3) as app:
            waiting = call(app, prompt=["a", "b"])
            await until(lambda: app.state.service.worker.queued == 2)
            assert (await call(app, prompt=["c", "d"]).end()).status == 429
            assert app.state.service.worker.queued == 2
            gate.open()
            assert (await waiting.end()).status == 200

    asyncio.run(run())


def test_the_deadline(engine, gate):
    """The deadline of a request that runs, one whose stream has begun, and one that waits."""
    now = [0.0]

    async def run():
        async with service(engine, clock=lambda: now[0], deadline=5) as app:
            whole, stream = call(app, n=2, **LONG), call(app, stream=True, n=2, **LONG)
            await until(lambda: app.state.service.worker.queued == 2)
            waiting = call(app)  # four sequences run before it
            await until(lambda: app.state.service.worker.queued == 3)
            await gate.until(lambda: stream.body.count(b"data:") > 2)
            now[0] = 4.9
            late = call(app, prompt="In 1903")
            await until(lambda: app.state.service.worker.queued == 2)
            steps = engine.metrics.steps
            await gate.until(lambda: engine.metrics.steps >= steps + 3)
            assert not (whole.task.done() or stream.task.done() or waiting.task.done())
            now[0] = 5.1
            gate.open()
            for each in (whole, waiting):
                assert (await each.end()).status == 504 and each.headers["x-should-retry"] == "false"
                assert each.json["error"] == {
                    "message": "not done within 5 s",
                    "type": "timeout_error",
                    "param": None,
                    "code": "deadline_exceeded",
                }
            *chunks, last = events((await stream.end()).body.decode())
            assert stream.status == 200 and last["error"]["code"] == "deadline_exceeded"
            assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
            assert (await late.end()).status == 200
            await until(lambda: not engine.busy)
            assert await in_use(app) == 0

    asyncio.run(run())


def broken(*_, **__):
    raise RuntimeError("RESOURCE_EXHAUSTED: of /a/secret/path")


@pytest.mark.parametrize("place", ["device", "schedule"])
def test_a_step_that_fails_ends_its_requests_and_not_the_loop(engine, gate, monkeypatch, caplog, place):
    async def run():
        async with service(engine) as app:
            whole, stream = call(app, **LONG), call(app, "/v1/chat/completions", stream=True, **LONG)
            await until(lambda: app.state.service.active == 2)
            await gate.until(lambda: stream.body.count(b"data:") > 2)
            with monkeypatch.context() as patch:
                if place == "device":
                    patch.setattr(engine, "_start", broken)
                else:
                    patch.setattr(engine.scheduler, "schedule", broken)
                gate.step(2)
                await whole.end()
                await stream.end()
            assert whole.status == 500 and whole.headers["x-should-retry"] == "false"
            assert whole.json["error"]["type"] == "server_error" and "secret" not in whole.body.decode()
            *_, last = events(stream.body.decode())
            assert last["error"] == whole.json["error"]
            gate.open()
            assert (await call(app).end()).status == 200 and app.state.service.ready
            await until(lambda: not engine.busy)
            assert await in_use(app) == 0 and app.state.service.worker.failed_steps >= 1

    with caplog.at_level(logging.CRITICAL):
        asyncio.run(run())


def test_a_request_whose_logits_are_not_finite(engine, gate, monkeypatch, caplog):
    """Its client gets an error; others get their answers."""
    fetched = engine_module.SampledTokens.fetched

    def first_row(sampled):
        results = fetched(sampled)
        tokens = results.tokens.copy()
        tokens[0] = engine_module.NOT_FINITE
        return engine_module.SampledTokens(tokens, results.logprobs, results.drafts)

    async def run():
        async with service(engine) as app:
            wrong = call(app, stream=True, **LONG)
            await until(lambda: app.state.service.worker.queued == 1)
            other = call(app, prompt="In 1903")
            await until(lambda: app.state.service.worker.queued == 2)
            await gate.until(lambda: wrong.body.count(b"data:") > 2)
            monkeypatch.setattr(engine_module.SampledTokens, "fetched", first_row)
            await gate.until(lambda: wrong.task.done())
            monkeypatch.setattr(engine_module.SampledTokens, "fetched", fetched)
            gate.open()
            *_, last = events((await wrong.end()).body.decode())
            assert last["error"]["code"] == "internal_error"
            assert (await other.end()).status == 200
            await until(lambda: not engine.busy)
            assert await in_use(app) == 0

    with caplog.at_level(logging.CRITICAL):
        asyncio.run(run())


def test_a_request_that_the_engine_does_not_take(engine, monkeypatch):
    """Its client gets an error of any kind; where the second prompt is refused, the first is cancelled."""
    add = engine.add

    def second(*arguments, **options):
        if engine.busy:
            raise error
        return add(*arguments, **options)

    async def run(status, message):
        async with service(engine) as app:
            for stream in (False, True):
                refused = await call(app, prompt=["a", "b"], stream=stream).end()
                assert refused.status == status and message in refused.json["error"]["message"]
            await until(lambda: not engine.busy)
            assert await in_use(app) == 0 and app.state.service.worker.queued == 0

    monkeypatch.setattr(engine, "add", second)
    error = UserError("max_new_tokens: too many")
    asyncio.run(run(400, "max_tokens: too many"))
    error = ZeroDivisionError("secret")
    logging.disable(logging.CRITICAL)
    try:
        asyncio.run(run(500, "the server failed"))
    finally:
        logging.disable(logging.NOTSET)


def test_a_route_that_fails(engine, monkeypatch):
    async def run():
        async with service(engine) as app:
            monkeypatch.setattr("dsv32_jax.server.app.prometheus.text", broken)
            request = Call(app, "/metrics")
            with pytest.raises(RuntimeError):  # for uvicorn's log
                await request.end()
            assert request.status == 500 and request.json["error"]["type"] == "server_error"
            assert "secret" not in request.body.decode()

    asyncio.run(run())


async def health(app):
    live, ready = [await Call(app, path).end() for path in ("/health", "/health/ready")]
    assert live.json == ready.json
    return live.status, ready.status, live.json["ready"], live.json["draining"]


def test_health_while_it_warms_up(engine, monkeypatch):
    warmup, allowed = engine.warmup, threading.Event()
    monkeypatch.setattr(engine, "warmup", lambda: allowed.wait(60) and warmup())

    async def run():
        app = create_app(engine, settings())
        async with app.router.lifespan_context(app):
            assert await health(app) == (200, 503, False, False)
            refused = await call(app).end()
            assert refused.status == 503 and refused.headers["retry-after"]
            assert refused.json["error"]["message"] == "the server is starting"
            assert (await Call(app, "/metrics").end()).status == 200
            allowed.set()
            await until(lambda: app.state.service.ready)
            assert await health(app) == (200, 200, True, False)
            assert (await call(app).end()).status == 200

    asyncio.run(run())


def test_without_warming_up(engine, monkeypatch):
    monkeypatch.setattr(engine, "warmup", broken)

    async def run():
        app = create_app(engine, settings(warmup=False))
        async with app.router.lifespan_context(app):
            await until(lambda: app.state.service.ready)
            assert (await call(app).end()).status == 200

    asyncio.run(run())


def test_health_when_the_engines_thread_has_ended(engine, monkeypatch, caplog):
    monkeypatch.setattr(engine, "warmup", broken)

    async def run():
        app = create_app(engine, settings())
        async with app.router.lifespan_context(app):
            await until(lambda: not app.state.service.worker.alive)
            assert await health(app) == (503, 503, False, False)
            assert (await call(app).end()).json["error"]["message"] == "the server is broken"
            assert (await Call(app, "/metrics").end()).status == 200

    with caplog.at_level(logging.CRITICAL):
        asyncio.run(run())
    assert "the engine's thread has ended" in caplog.text


def test_a_drain_lets_running_requests_end(engine, gate):
    async def run():
        async with service(engine) as app:
            running = call(app, "/v1/chat/completions", stream=True)
            await gate.until(lambda: b"data:" in running.body)
            drain = asyncio.create_task(app.state.service.drain())
            await until(lambda: app.state.service.draining)
            assert await health(app) == (200, 503, False, True)
            refused = await call(app).end()
            assert refused.status == 503 and refused.json["error"]["message"] == "the server is shutting down"
            assert not drain.done()
            gate.open()
            chunks = events((await running.end()).body.decode())
            assert chunks[-1]["choices"][0]["finish_reason"] == "length"
            await drain
        assert app.state.service.stopped and not app.state.service.worker.alive

    asyncio.run(run())


def test_a_drain_ends_those_that_take_too_long(engine, gate):
    async def run():
        async with service(engine, drain_seconds=0) as app:
            whole, stream = call(app, **LONG), call(app, stream=True, **LONG)
            await gate.until(lambda: app.state.service.active == 2 and b"data:" in stream.body)
            await app.state.service.drain()
            gate.open()
            assert (await whole.end()).status == 503 and whole.json["error"]["code"] == "draining"
            assert events((await stream.end()).body.decode())[-1]["error"]["code"] == "draining"
            await until(lambda: not engine.busy)
            assert await in_use(app) == 0

    asyncio.run(run())


def test_a_model_without_a_tokenizer_is_not_served(engine, lm, monkeypatch):
    monkeypatch.setattr(lm, "tokenizer", None)
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        create_app(engine, settings())


def test_many_at_once_get_what_they_get_alone(engine, reference_engine):
    """Whole and streamed answers, in a queue; some clients disconnect. No block is lost."""
    prompts = [f"ship number {n}" for n in range(12)]

    async def run():
        async with service(engine) as app:
            calls = [call(app, prompt=prompt, stream=n % 2 == 0, max_tokens=10) for n, prompt in enumerate(prompts)]
            leaving = [call(app, prompt=f"gone {n}", stream=True, **LONG) for n in range(4)]
            await until(lambda: leaving[0].body)
            for each in leaving:
                each.leave()
            for number, each in enumerate(calls):
                await each.end()
                body = each.body.decode()
                parts = events(body) if number % 2 == 0 else [json.loads(body)]
                want = reference_engine.generate([prompts[number]], PARAMS)[0].completions[0].text
                assert "".join(part["choices"][0]["text"] for part in parts) == want
            await until(lambda: not engine.busy)
            assert await in_use(app) == 0

    asyncio.run(run())
