"""Sends a job's pieces as one JSON object or as server-sent events, as long as the client is connected."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from dsv32_jax.server.errors import ApiError
from dsv32_jax.server.response_json import ResponseJson
from dsv32_jax.server.worker import Accepted, Job, Piece, Usage, Worker

__all__ = ["Answer"]

SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies like to collect
]


class Answer:
    """An ASGI response that submits its request, and cancels it when the client disconnects.

    Args:
      worker: takes the request; the call raises `ApiError` 429 if it cannot.
      response_json: of the answer; its `request` is submitted.
    """

    def __init__(self, worker: Worker, response_json: ResponseJson):
        self.worker = worker
        self.response_json = response_json

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        job = self.worker.submit(self.response_json.request)
        send_all = self._stream if self.response_json.request.stream else self._whole
        sending = asyncio.create_task(send_all(job, scope, receive, send))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()  # raises its exception
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
                response = await asyncio.to_thread(self._whole_response, pieces, item)
                await response(scope, receive, send)

    def _whole_response(self, pieces: list[Piece], usage: Usage) -> JSONResponse:
        return JSONResponse(self.response_json.whole(pieces, usage))

    async def _stream(self, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends status 200 when the engine has taken the job; an error after that is sent as an event."""
        items = _items(job)
        await anext(items)
        await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
        try:
            for opening in self.response_json.opening():
                await _send_event(send, opening)
            async for item in items:
                event = self.response_json.chunk(item) if isinstance(item, Piece) else None
                if isinstance(item, Usage) and self.response_json.request.include_usage:
                    event = self.response_json.usage(item)
                if event is not None:
                    await _send_event(send, event)
        except ApiError as error:
            await _send_event(send, error.body)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def _items(job: Job) -> AsyncIterator[Accepted | Piece | Usage]:
    """All items of a job; raises the `ApiError` that ends it."""
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
    """Returns when the client has disconnected; the request's body has been read before."""
    with contextlib.suppress(asyncio.CancelledError):
        while (await receive())["type"] != "http.disconnect":
            pass
