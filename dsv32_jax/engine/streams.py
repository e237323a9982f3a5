"""Hands each event of a request to its streams, or else to the caller of `Engine.step`."""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator

from dsv32_jax.engine.request import Event, Request

__all__ = ["Outbox", "Stream"]


class Outbox:
    """Hands out events, each once.

    Events of a request with readers wait on the request until these read them. `Engine.step` returns the others; those
    of a step that a reader made wait on their requests too, and the next call returns them unless the request has been
    collected.
    """

    def __init__(self) -> None:
        self._waiting: weakref.WeakSet[Request] = weakref.WeakSet()  # requests whose events the next step returns
        self._caller = threading.local()

    def for_readers(self, step: Callable[[], object]) -> None:
        """Makes a step that returns no events, for a stream or `Engine.generate`."""
        self._caller.silent = True  # not an argument: `Engine.step` may be wrapped
        try:
            step()
        finally:
            self._caller.silent = False

    @property
    def silent(self) -> bool:
        """Whether a reader makes the step that begins; true once."""
        return self._caller.__dict__.pop("silent", False)

    def put(self, request: Request, completion: int, token: int, text: str) -> None:
        """Keeps an event that the step does not return, since the request has a reader, or a reader made the step."""
        request.unread.append((completion, token, text))
        if not request.readers:
            self._waiting.add(request)

    def pop_waiting(self) -> list[Event]:
        """Events without a reader from steps that readers made; a step returns them before its own."""
        if not self._waiting:
            return []
        requests = [request for request in self._waiting if not request.readers]
        self._waiting.clear()
        return [Event(request, *request.unread.popleft()) for request in requests for _ in range(len(request.unread))]


class Stream(Iterator[Event]):
    """A request's events, each once and in order, those from before the stream began included; it makes the steps.

    When the last stream of a request is closed, collected by Python, or ended by an exception out of `next`, the
    completions that still run are cancelled. So leaving a loop over `engine.stream(request)` cancels the request; a
    loop over a stream that a variable holds can be left and resumed.

    Args:
      request: to read.
      step: makes a step, without returning its events.
      cancel: ends the request.
    """

    _open = False

    def __init__(self, request: Request, step: Callable[[], None], cancel: Callable[[Request], None]):
        self.request = request
        self._step, self._cancel = step, cancel
        request.readers += 1
        self._open = True

    def __next__(self) -> Event:
        try:
            while self._open:
                finished = self.request.finished  # read before the events: then none can follow them
                with contextlib.suppress(IndexError):
                    return Event(self.request, *self.request.unread.popleft())
                if finished:
                    break
                try:
                    self._step()
                except StopIteration as error:  # it would be taken for the end of the stream
                    raise RuntimeError("a step ended with StopIteration") from error
        except BaseException:
            self.close()
            raise
        self.close()
        raise StopIteration

    def close(self) -> None:
        """Ends the stream, and cancels the request if no other reads it."""
        if self._open:
            self._open = False
            self.request.readers -= 1
            if not self.request.readers:
                self._cancel(self.request)

    def __del__(self) -> None:
        self.close()
