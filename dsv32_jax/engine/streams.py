"""Who gets which event: those who stream a request, or else who calls `Engine.step`."""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator

from dsv32_jax.engine.request import Event, Request

__all__ = ["Outbox", "Stream"]


class Outbox:
    """Hands events out, each once.

    Those of a request with readers wait for them, on the request. Others go to whoever calls `Engine.step`; where they
    come in a step that a reader made, it is the next call that returns them. They wait on their requests too, and are
    gone with those.
    """

    def __init__(self) -> None:
        self._waiting: weakref.WeakSet[Request] = weakref.WeakSet()  # requests whose events the next step returns
        self._caller = threading.local()

    def for_readers(self, step: Callable[[], object]) -> None:
        """Makes a step that returns no events."""
        self._caller.silent = True  # not an argument: `Engine.step` may be wrapped
        try:
            step()
        finally:
            self._caller.silent = False

    @property
    def silent(self) -> bool:
        """Of the step that begins: a reader makes it; asked once."""
        return self._caller.__dict__.pop("silent", False)

    def put(self, request: Request, completion: int, token: int, text: str) -> None:
        """A token has come whose event the step does not return: somebody reads the request, or made the step."""
        request.unread.append((completion, token, text))
        if not request.readers:
            self._waiting.add(request)

    def rest(self) -> list[Event]:
        """What a step returns before its own events."""
        if not self._waiting:
            return []
        requests = [request for request in self._waiting if not request.readers]
        self._waiting.clear()
        return [Event(one, *one.unread.popleft()) for one in requests for _ in range(len(one.unread))]


class Stream(Iterator[Event]):
    """A request's events, each once and in order, those from before the stream began included; it makes the steps.

    When the last stream of a request is closed, collected by Python, or left by an exception out of `next`, what still
    runs of the request is cancelled. So a loop over `engine.stream(request)` cancels when it is left; a loop over a
    stream that a variable holds can be left and taken up again.

    Args:
      request: whose.
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
                finished = self.request.finished  # asked first: then nothing comes any more
                with contextlib.suppress(IndexError):
                    return Event(self.request, *self.request.unread.popleft())
                if finished:
                    break
                try:
                    self._step()
                except StopIteration as error:  # which would pass for the end of the stream
                    raise RuntimeError("a step ended with StopIteration") from error
        except BaseException:
            self.close()
            raise
        self.close()
        raise StopIteration

    def close(self) -> None:
        """Nobody reads on here."""
        if self._open:
            self._open = False
            self.request.readers -= 1
            if not self.request.readers:
                self._cancel(self.request)

    def __del__(self) -> None:
        self.close()
