"""Errors that a client gets, in the JSON of OpenAI's API."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from dsv32_jax.errors import UserError

__all__ = ["ApiError", "failed", "from_user_error"]

TYPES = {429: "rate_limit_error", 503: "service_unavailable_error", 504: "timeout_error"}
NO_RETRY = {"x-should-retry": "false"}
"""OpenAI's clients send a request that failed with 500 or 504 again, unless they are told not to."""


class ApiError(Exception):
    """An error that a client gets.

    Args:
      status: of HTTP.
      message: one line for people.
      param: the field that is wrong.
      code: for programs.
      headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {**(NO_RETRY if status in (500, 504) else {}), **(headers or {})}

    @property
    def body(self) -> dict[str, Any]:
        """{"error": {...}}."""
        kind = "server_error" if self.status == 500 else TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def from_user_error(error: UserError, names: Mapping[str, str]) -> ApiError:
    """An error 400 that names the client's own field.

    Args:
      error: "field: what is wrong", where "prompt 0, position 3" is of the field prompt.
      names: this request's names of the engine's fields.
    """
    subject, colon, reason = str(error).partition(":")
    field, space, position = subject.partition(" ")
    field = field.rstrip(",")
    if not colon or field not in names:
        return ApiError(400, str(error))
    return ApiError(400, f"{names[field]}{space}{position}:{reason}", param=names[field])


def failed() -> ApiError:
    """The error of a request that failed without a fault of its own; the log has the reason."""
    return ApiError(500, "the server failed while it ran this request", code="internal_error")
