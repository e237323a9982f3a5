"""HTTP/1.1 of uvicorn, with limits on clients that send or read too slowly."""

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from dsv32_jax.server.errors import ApiError

__all__ = ["protocol_class"]


class SlowProtocol(H11Protocol):
    """A connection that is closed where a request's head does not come, or an answer is not read, in time.

    The application itself limits the time of a request's body.
    """

    read_seconds: float
    send_seconds: float

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._head: asyncio.TimerHandle | None = None
        self._write: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head = self.loop.call_later(self.read_seconds, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers("_head", "_write")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # Bytes of an incomplete head do not restart the timer.
        if self.conn.their_state is not h11.IDLE:
            self._stop_timers("_head")
        elif self._head is None and not self.transport.is_closing():
            self._head = self.loop.call_later(self.read_seconds, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write = self._write or self.loop.call_later(self.send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_timers("_write")
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        # Closing waits until everything is written; this client has had its time to read.
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def _stop_timers(self, *names: str) -> None:
        for name in names:
            if (timer := getattr(self, name)) is not None:
                timer.cancel()
            setattr(self, name, None)

    def send_400_response(self, msg: str) -> None:
        """Answers a request that is not HTTP, or whose head is too large."""
        content = json.dumps(ApiError(400, msg, code="invalid_http").body).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(content))), ("connection", "close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=content),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def protocol_class(read_seconds: float, send_seconds: float) -> type[asyncio.Protocol]:
    """The class with these limits, for uvicorn's `http`."""
    return type("Protocol", (SlowProtocol,), {"read_seconds": read_seconds, "send_seconds": send_seconds})
