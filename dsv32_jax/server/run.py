"""Runs the server on a socket, from its start to its drain."""

import asyncio
import gc
import os
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from dsv32_jax.engine.engine import Engine
from dsv32_jax.errors import UserError
from dsv32_jax.server.app import Service, create_app
from dsv32_jax.server.protocol import protocol_class
from dsv32_jax.server.settings import Settings

__all__ = ["Server", "bind", "serve"]

MAX_HEAD_BYTES = 16 * 1024
"""Of a request's line and headers."""
MAX_CONNECTIONS = 1024
"""Beyond these, uvicorn itself answers 503."""
CLOSE_SECONDS = 5
"""How long connections may take to end after the drain."""


class Server(uvicorn.Server):
    """Drains at the first signal, and answers new requests with 503 meanwhile; ends at once at the second.

    The objects that exist when the engine is ready are left out of Python's garbage collections until the end: walking
    through all that JAX has traced would stop the engine for some tenths of a second.

    Args:
      app: of `create_app`.
      listening: called with the URL when the server listens; the engine may still be warming up.
    """

    def __init__(self, app: Starlette, listening: Callable[[str], None]):
        self.service: Service = app.state.service
        settings = self.service.settings
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol_class(settings.read_seconds, settings.send_seconds),
                ws="none",
                lifespan="on",
                access_log=False,
                log_level="warning",
                proxy_headers=False,
                server_header=False,
                limit_concurrency=MAX_CONNECTIONS,
                timeout_graceful_shutdown=CLOSE_SECONDS,
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            )
        )
        self.listening = listening
        self.signalled = self._frozen = False
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        self.listening(f"http://{host}:{port}/v1")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not passed on to uvicorn, which would raise the signal again at the end: a drained server ends with 0.
        if self.signalled:
            self.should_exit = self.force_exit = True
        self.signalled = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self._frozen:
            gc.unfreeze()

    async def on_tick(self, counter: int) -> bool:
        if self.service.ready and not self._frozen:
            self._frozen = True
            gc.collect()
            gc.freeze()
        if self.signalled and self._drain is None:
            self._drain = asyncio.create_task(self.service.drain())
            self._drain.add_done_callback(self._exit)
        if not self.service.worker.alive:
            self.should_exit = True
        return await super().on_tick(counter)

    def _exit(self, _: "asyncio.Task[None]") -> None:
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """Binds a socket that does not listen yet; raises `UserError`.

    This comes before a model is loaded, which can take minutes.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host}, --port {port}: cannot be bound: {reason}") from error
    return bound


def serve(engine: Engine, settings: Settings, bound: socket.socket, listening: Callable[[str], None] = print) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code.

    Args:
      engine: of a model with a tokenizer; not warmed up.
      settings: limits and defaults.
      bound: a socket, of `bind`.
      listening: called with the URL when the server listens.

    Returns:
      0 after a drain; 1 where the engine's thread ended by itself.
    """
    server = Server(create_app(engine, settings), listening)
    server.run(sockets=[bound])
    code = 0 if server.signalled else 1
    if not server.service.stopped:
        os._exit(code)  # the engine's thread still compiles, and could crash the interpreter as it ends
    return code
