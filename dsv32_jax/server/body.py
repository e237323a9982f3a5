"""Reads and parses a request's body, with bounds on its size, time and depth."""

import asyncio
import json
import math
from typing import Any

from starlette.requests import Request

from dsv32_jax.server.errors import ApiError

__all__ = ["parse", "read"]

DEEPEST = 16
"""The most levels of nested lists and objects; the fields of the API need half of that."""


async def read(request: Request, limit: int, seconds: float) -> bytes:
    """Reads the body.

    Raises:
      ApiError: 415, its content type is not JSON, so that no page in a browser can send it without a preflight request;
        413, it is larger than `limit`, whether its header says so or not; 408, it did not come in time.
      ClientDisconnect: the client disconnected.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, "content-type: must be application/json", code="unsupported_media_type")
    too_large = ApiError(
        413, f"body: larger than {limit} bytes", code="body_too_large", headers={"connection": "close"}
    )
    length = request.headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()) or len(length) > 18 or int(length) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        message = f"body: did not come within {seconds:g} s"
        raise ApiError(408, message, code="timeout", headers={"connection": "close"}) from None
    return bytes(body)


def parse(body: bytes) -> dict[str, Any]:
    """Parses a body as a JSON object.

    Raises:
      ApiError: 400, it is not UTF-8, not JSON (NaN and infinity are not, nor are numbers beyond float64), nested too
        deeply, or not an object.
    """
    try:
        content = json.loads(body.decode("utf-8"), parse_constant=_refuse, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise _invalid(f"not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise _invalid(f"nested more than {DEEPEST} deep") from None
    except ValueError as error:  # also of an integer with thousands of digits
        raise _invalid(f"not JSON: {error}") from None
    if not isinstance(content, dict):
        raise _invalid("must be a JSON object")
    level: list[Any] = [content]
    for _ in range(DEEPEST):
        level = [item for parent in level for item in (parent.values() if isinstance(parent, dict) else parent)]
        level = [item for item in level if isinstance(item, dict | list)]
    if level:
        raise _invalid(f"nested more than {DEEPEST} deep")
    return content


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON")


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError("a number is too large")
    return value


def _invalid(reason: str) -> ApiError:
    return ApiError(400, f"body: {reason}", code="invalid_json")
