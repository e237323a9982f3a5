"""The routes of the server as an ASGI application."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dsv32_jax.engine.engine import Engine
from dsv32_jax.errors import UserError
from dsv32_jax.server import body, prometheus
from dsv32_jax.server.answer import Answer
from dsv32_jax.server.api_request import ApiRequest, read_chat_request, read_completion_request
from dsv32_jax.server.errors import ApiError, failed
from dsv32_jax.server.guard import Guard
from dsv32_jax.server.metrics_log import regular_lines
from dsv32_jax.server.response_json import ChatJson, CompletionJson, ResponseJson
from dsv32_jax.server.settings import Settings
from dsv32_jax.server.worker import Worker

__all__ = ["Service", "create_app"]

ReadRequest = Callable[[Mapping[str, Any], Engine, Settings], ApiRequest]
STOP_SECONDS = 10.0
"""How long the engine's thread may take for its last step."""


class Service:
    """The routes and the state that they share: `app.state.service`.

    Attributes:
      worker: owns the engine.
      settings: of the server.
      draining: whether new requests are refused because the server shuts down.
      active: requests that are being answered.
      statuses: answers so far, by status.
      stopped: whether the engine's thread ended in time when the application stopped.
    """

    def __init__(self, worker: Worker, settings: Settings):
        self.worker, self.settings = worker, settings
        self._created = int(time.time())
        self.draining = False
        self.active = 0
        self.statuses: Counter[int] = Counter()
        self.stopped = False

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.worker.ready and self.worker.alive and not self.draining

    async def drain(self) -> None:
        """Refuses new requests; returns when those that run have ended, or after `drain_seconds` have been ended."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.drain_seconds):
                while self.active:
                    await asyncio.sleep(0.02)
        self.worker.end_all(ApiError(503, "the server is shutting down", code="draining"))

    # ---- routes ----

    async def completions(self, request: Request) -> ASGIApp:
        return await self._answer(request, read_completion_request, CompletionJson)

    async def chat_completions(self, request: Request) -> ASGIApp:
        return await self._answer(request, read_chat_request, ChatJson)

    async def _answer(self, request: Request, read_request: ReadRequest, response_json: type[ResponseJson]) -> ASGIApp:
        self._check_ready()
        content = await body.read(request, self.settings.max_body_bytes, self.settings.read_seconds)
        self.worker.check_room(1)  # a full server does not even parse the request

        def parse() -> ApiRequest:
            return read_request(body.parse(content), self.worker.engine, self.settings)

        api_request = await asyncio.to_thread(parse)
        self._check_ready()
        tokenizer = self.worker.engine.lm.tokenizer
        assert tokenizer is not None
        return self._counted(Answer(self.worker, response_json(self.settings.name, api_request, tokenizer)))

    def _check_ready(self) -> None:
        if not self.ready:
            reason = "shutting down" if self.draining else "starting" if self.worker.alive else "broken"
            headers = {"retry-after": "5"}
            raise ApiError(503, f"the server is {reason}", code="not_ready", headers=headers)

    def _counted(self, answer: Answer) -> ASGIApp:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            self.active += 1
            try:
                await answer(scope, receive, send)
            finally:
                self.active -= 1

        return app

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        if (name := request.path_params["name"]) != self.settings.name:
            message = f"The model {name[:64]!a} does not exist"
            raise ApiError(404, message, param="model", code="model_not_found")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {"id": self.settings.name, "object": "model", "created": self._created, "owned_by": "dsv32-jax"}

    async def health(self, request: Request) -> Response:
        return JSONResponse(self._health(), 200 if self.worker.alive else 503)

    async def health_ready(self, request: Request) -> Response:
        return JSONResponse(self._health(), 200 if self.ready else 503)

    def _health(self) -> dict[str, Any]:
        status = "ok" if self.worker.alive else "broken"
        return {"status": status, "ready": self.ready, "draining": self.draining}

    async def metrics(self, request: Request) -> Response:
        collector = prometheus.EngineCollector(
            await self.worker.summary(),
            ready=self.ready,
            failed_steps=self.worker.failed_steps,
            statuses=dict(self.statuses),
        )
        return Response(prometheus.text(collector), media_type=prometheus.CONTENT_TYPE)


def create_app(engine: Engine, settings: Settings, *, worker: Worker | None = None) -> Starlette:
    """The server as an ASGI application; its lifespan starts and stops the engine's thread.

    Args:
      engine: of a model with a tokenizer; nobody but the application may use it from now on.
      settings: limits and defaults.
      worker: used instead of one that is made from `settings`.

    Raises:
      UserError: the model has no tokenizer.
    """
    if engine.lm.tokenizer is None:
        raise UserError("model: the checkpoint has no tokenizer.json, which serving needs")
    if worker is None:
        worker = Worker(engine, max_queue=settings.max_queue, deadline=settings.deadline, warmup=settings.warmup)
    service = Service(worker, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        async with regular_lines(worker, settings.metrics_log, settings.metrics_interval):
            yield
            service.draining = True
        service.stopped = await asyncio.to_thread(worker.stop, STOP_SECONDS)

    app = Starlette(
        routes=[
            Route("/v1/models", service.models),
            Route("/v1/models/{name:path}", service.model),
            Route("/v1/completions", service.completions, methods=["POST"]),
            Route("/v1/chat/completions", service.chat_completions, methods=["POST"]),
            Route("/health", service.health),
            Route("/health/ready", service.health_ready),
            Route("/metrics", service.metrics),
        ],
        middleware=[Middleware(Guard, api_key=settings.api_key, statuses=service.statuses)],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientDisconnect: _disconnected,
            Exception: _any_error,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # a redirect would be made of the client's own Host header
    app.state.service = service
    return app


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own errors: there is no such route, or not with this method."""
    assert isinstance(error, HTTPException)
    url = f"{request.method} {request.scope['path'][:128]}"
    message = f"Unknown request URL: {url}" if error.status_code == 404 else f"{error.detail}: {url}"
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    return ApiError(error.status_code, ascii(message)[1:-1], code=code, headers=error.headers).response()


async def _disconnected(request: Request, error: Exception) -> Response:
    """A response that nobody receives: the client disconnected while its body was read."""
    return Response(status_code=400)


async def _any_error(request: Request, error: Exception) -> Response:
    return failed().response()  # uvicorn logs the exception
