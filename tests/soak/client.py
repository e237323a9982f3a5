"""Sends a request and reads its answer, or disconnects in the middle."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

import httpx2

from tests.soak.accounting import DROPPED, Answer, Expected, Outcome

__all__ = ["Call", "Client", "Stream", "whole"]

SLACK_SECONDS = 30.0
"""The time beyond the deadline after which a client counts its answer as lost."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A request.

    Attributes:
      kind: under which it is counted.
      expected: its right outcomes.
      content: its body.
      path, method: of HTTP.
      headers: in place of the client's own.
      streams: whether it asks for a stream.
      leaves: for one that is dropped, the events of its stream, or the seconds without an answer, after which the
        client disconnects.
    """

    kind: str
    expected: Expected
    content: bytes
    path: str = "/v1/completions"
    method: str = "POST"
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    streams: bool = False
    leaves: float | None = None


class Client:
    """One client, with a new connection for each request.

    Args:
      address: of the server, without a path.
      key: that it asks for.
      deadline: seconds, that every request has.
    """

    def __init__(self, address: str, key: str, deadline: float):
        self.patience = deadline + SLACK_SECONDS
        self._http = httpx2.Client(
            base_url=address,
            headers={"authorization": f"Bearer {key}", "content-type": "application/json"},
            timeout=self.patience,
            # A kept connection may be closed by the server just when it is used again: an error without a fault.
            limits=httpx2.Limits(max_keepalive_connections=0),
            trust_env=False,
        )

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def get(self, path: str, timeout: float) -> httpx2.Response:
        """A GET; raises httpx2's errors."""
        return self._http.get(path, timeout=timeout)

    def post(self, path: str, body: Mapping[str, Any]) -> httpx2.Response:
        """A POST of JSON; raises httpx2's errors."""
        return self._http.post(path, json=body)

    def send(self, call: Call, at_first: Callable[[], None] = lambda: None) -> Outcome:
        """Runs a request to its end; calls `at_first` when a stream has begun."""
        started = time.monotonic()
        try:
            if call.streams:
                return self._stream(call, started, at_first)
            patience = self.patience if call.leaves is None else call.leaves
            response = self._http.request(
                call.method, call.path, content=call.content, headers=call.headers, timeout=patience
            )
            return _outcome(response, started)
        except httpx2.ReadTimeout:
            status = DROPPED if call.leaves is not None else "ReadTimeout"
            return Outcome(status, time.monotonic() - started)
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            return Outcome(type(error).__name__, time.monotonic() - started, message=str(error))

    def _stream(self, call: Call, started: float, at_first: Callable[[], None]) -> Outcome:
        first_seconds = None
        with self._http.stream(call.method, call.path, content=call.content, headers=call.headers) as response:
            if response.status_code != 200:
                response.read()
                return _outcome(response, started)
            stream = Stream()
            for number, event in enumerate(_events(response.iter_lines())):
                if first_seconds is None:
                    first_seconds = time.monotonic() - started
                    at_first()
                if call.leaves is not None and number >= call.leaves:
                    return Outcome(DROPPED, time.monotonic() - started, first=first_seconds)
                stream.add(event)
                if time.monotonic() - started > self.patience:
                    return Outcome("ReadTimeout", time.monotonic() - started, message="a stream without an end")
        seconds = time.monotonic() - started
        return Outcome("200", seconds, stream.answer(), stream.code, stream.message, first=first_seconds)


class Stream:
    """The events of a stream as one answer.

    Attributes:
      code, message: of the error with which it ended.
    """

    def __init__(self) -> None:
        self.code: str | None = None
        self.message = ""
        self._texts: dict[int, str] = {}
        self._reasons: dict[int, str | None] = {}
        self._tokens: int | None = None
        self._done = False

    def add(self, data: str) -> None:
        """Adds an event, the text after `data: `."""
        if data == "[DONE]":
            self._done = True
            return
        event = json.loads(data)
        if error := event.get("error"):
            self.code, self.message = error["code"] or "error", error["message"]
        for choice in event.get("choices", []):
            index = choice["index"]
            text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            self._texts[index] = self._texts.get(index, "") + text
            self._reasons[index] = choice["finish_reason"] or self._reasons.get(index)
        if usage := event.get("usage"):
            self._tokens = usage["completion_tokens"]

    def answer(self) -> Answer | None:
        """The whole answer; None before its [DONE]."""
        if not self._done:
            return None
        order = sorted(self._texts)
        return Answer(tuple(self._texts[i] for i in order), tuple(self._reasons[i] for i in order), self._tokens)


def whole(content: Mapping[str, Any]) -> Answer:
    """The answer of a request that is not streamed."""
    choices = sorted(content["choices"], key=lambda choice: choice["index"])
    texts = tuple(choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices)
    return Answer(texts, tuple(choice["finish_reason"] for choice in choices), content["usage"]["completion_tokens"])


def _events(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


def _outcome(response: httpx2.Response, started: float) -> Outcome:
    status, seconds = str(response.status_code), time.monotonic() - started
    if response.status_code == 200:
        return Outcome(status, seconds, whole(response.json()))
    try:
        error = response.json()["error"]
    except (ValueError, LookupError, TypeError):  # not in OpenAI's shape
        return Outcome(f"{status} malformed", seconds, message=response.text[:200])
    header = response.headers.get("retry-after")
    return Outcome(status, seconds, None, error["code"], error["message"], header)
