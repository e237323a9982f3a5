"""Answering: a job's pieces as one JSON object or as server-sent events, for as long as the client is there."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from dsv32_jax.server.errors import ApiError
from dsv32_jax.server.wording import Wording
from dsv32_jax.server.worker import Accepted, Job, Piece, Usage, Worker

__all__ = ["Answer"]

SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies like to collect
]


class Answer:
    """An ASGI response that submits its request, and gives it up when the client goes away.

    Args:
      worker: takes the request; `ApiError` 429 comes out of the call if it cannot.
      wording: of the answer; its `ask` is what is submitted.
    """

    def __init__(self, worker: Worker, wording: Wording):
        self.worker = worker
        self.wording = wording

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        job = self.worker.submit(self.wording.ask)
        send_all = self._stream if self.wording.ask.stream else self._whole
        sending = asyncio.create_task(send_all(job, scope, receive, send))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()  # raises what it raised
        finally:
            self.worker.cancel(job)
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _whole(self, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
        pieces: list[Piece] = []
        async for item in _items(job):
            if isinstance(item, Piece):
                pieces.append(item)
            elif isinstance(item, Usage):
                # With log-probabilities these can be megabytes, which the event loop must not wait for.
                whole = await asyncio.to_thread(lambda usage: JSONResponse(self.wording.whole(pieces, usage)), item)
                await whole(scope, receive, send)

    async def _stream(self, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
        """Status 200 is said when the engine has taken the job; an error after that is an event of its own."""
        items = _items(job)
        await anext(items)
        await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
        try:
            for opening in self.wording.opening():
                await _send_event(send, opening)
            async for item in items:
                event = self.wording.chunk(item) if isinstance(item, Piece) else None
                if isinstance(item, Usage) and self.wording.ask.include_usage:
                    event = self.wording.usage(item)
                if event is not None:
                    await _send_event(send, event)
        except ApiError as error:
            await _send_event(send, error.body)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def _items(job: Job) -> AsyncIterator[Accepted | Piece | Usage]:
    """A job's items to the last; raises the `ApiError` that ends it."""
    while True:
        item = await job.items.get()
        if isinstance(item, ApiError):
            raise item
        assert isinstance(item, Accepted | Piece | Usage)
        yield item
        if isinstance(item, Usage):
            return


async def _send_event(send: Send, content: dict[str, Any]) -> None:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has gone; the request's body has been read before."""
    with contextlib.suppress(asyncio.CancelledError):
        while (await receive())["type"] != "http.disconnect":
            pass
