"""A served engine in tests: whole requests through starlette's client, and open ones step by step."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator

from starlette.testclient import TestClient

from dsv32_jax.server import Settings, create_app
from dsv32_jax.server.worker import Worker

PROMPT = "The lighthouse keeper"
COMPLETION = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
MESSAGES = [{"role": "system", "content": "Short."}, {"role": "user", "content": "Which boats were green?"}]
CHAT = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
PATHS = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}


def settings(**changes) -> Settings:
    return Settings(**{"name": "tiny", "drain_seconds": 60, **changes})


@contextlib.contextmanager
def client(engine, **changes) -> Iterator[TestClient]:
    """A client of a server that is ready."""
    app = create_app(engine, settings(**changes))
    headers = {"authorization": f"Bearer {changes['api_key']}"} if "api_key" in changes else {}
    with TestClient(app, headers=headers) as test_client:
        wait(lambda: app.state.service.ready)
        yield test_client


def wait(condition) -> None:
    """Waits until a condition holds; fails after a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "this never came"
        time.sleep(0.005)


def error(response, status: int) -> dict:
    """The error in an answer, in the JSON of OpenAI's API."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    (body,) = response.json().values()
    assert set(body) == {"message", "type", "param", "code"} and isinstance(body["message"], str)
    return body


def events(text: str) -> list[dict]:
    """The JSON of server-sent events, which end with [DONE]."""
    lines = text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: ") for line in lines[:-1])
    return [json.loads(line[6:]) for line in lines[:-2]]


class Gate:
    """Lets an engine make a number of steps, or any number once it is open."""

    def __init__(self, engine, monkeypatch):
        self._allowed, self._open, step = threading.Semaphore(0), False, engine.step

        def gated():
            if not self._open:
                self._allowed.acquire()
            return step()

        monkeypatch.setattr(engine, "step", gated)

    def step(self, count: int = 1) -> None:
        self._allowed.release(count)

    async def until(self, condition) -> None:
        """Allows steps until a condition holds; the engine may make some more."""
        async with asyncio.timeout(60):
            while not condition():
                self.step()
                await asyncio.sleep(0.005)

    def open(self) -> None:
        self._open = True
        self._allowed.release()


@contextlib.asynccontextmanager
async def service(engine, *, clock=time.monotonic, **changes) -> AsyncIterator:
    """An application with its lifespan, in the present event loop, when it is ready."""
    options = settings(**changes)
    worker = Worker(engine, max_queue=options.max_queue, deadline=options.deadline, clock=clock)
    app = create_app(engine, options, worker=worker)
    async with app.router.lifespan_context(app):
        await until(lambda: app.state.service.ready)
        yield app


async def until(condition) -> None:
    """`wait`, in an event loop."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


class Call:
    """One open request: its client can wait, look at the answer so far, and disconnect."""

    def __init__(self, app, path: str, content=None, *, chunks: list[bytes] | None = None, headers=None):
        self.status, self.headers, self.body = 0, {}, b""
        chunks = chunks if chunks is not None else [json.dumps(content).encode()] if content is not None else []
        self._messages: asyncio.Queue = asyncio.Queue()
        for chunk in chunks:
            self._messages.put_nowait({"type": "http.request", "body": chunk, "more_body": True})
        self._messages.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        sent = {"content-type": "application/json", **(headers or {})}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET" if not chunks else "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        self.task = asyncio.create_task(app(scope, self._messages.get, self._send))

    async def _send(self, message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.body += message.get("body", b"")

    def leave(self) -> None:
        self._messages.put_nowait({"type": "http.disconnect"})

    async def end(self) -> "Call":
        async with asyncio.timeout(60):
            await self.task
        return self

    @property
    def json(self):
        return json.loads(self.body)
