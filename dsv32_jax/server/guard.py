"""Checks the API key in front of every route, and counts answers by status."""

import hashlib
import hmac
from collections import Counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsv32_jax.server.errors import ApiError

__all__ = ["Guard"]


class Guard:
    """ASGI middleware that lets no request through without the key, whatever its path is.

    Args:
      app: that it guards.
      api_key: None if no key is required.
      statuses: counts answers by status.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, statuses: Counter[int]):
        self.app = app
        self.statuses = statuses
        self._digest = None if api_key is None else hashlib.sha256(api_key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']}: not served")

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.statuses[message["status"]] += 1
            await send(message)

        if not self._allowed(scope):
            error = ApiError(
                401,
                "Incorrect or missing API key; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer", "connection": "close"},
            )
            await error.response()(scope, receive, counting)
            return
        await self.app(scope, receive, counting)

    def _allowed(self, scope: Scope) -> bool:
        """Whether the request has the key. Digests are compared, so that time tells neither characters nor length."""
        if self._digest is None:
            return True
        values = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        scheme, _, key = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        keys_equal = hmac.compare_digest(hashlib.sha256(key.strip()).digest(), self._digest)
        return keys_equal and scheme.lower() == b"bearer"
