"""Atomic changes of an object's state: whole or not at all, whatever interrupts them, one thread at a time."""

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

__all__ = ["Changing"]

T = TypeVar("T")


class Changing:
    """An object whose state changes only in calls of `change`.

    After an exception there, `KeyboardInterrupt` included, `start_anew` makes the state valid. Where that is
    interrupted as well, `torn` stays true, and the next change calls it. Other threads wait for the lock.

    Python may run other code in the middle of a change: the handler of a signal, or a `__del__`. Such code leaves its
    changes for later, and every change begins with `settle`, which makes them.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.torn = False  # a change runs, or an interrupted one has left the state invalid

    def start_anew(self, error: str) -> None:
        """Makes the state valid, whatever it is; may be called again after an interrupt."""
        raise NotImplementedError

    def settle(self) -> None:
        """Makes the changes that `settle_or_leave` left."""
        raise NotImplementedError

    def change(self, call: Callable[..., T], *arguments: Any) -> T:
        """Calls a function that changes the state; raises what it raises."""
        with self.lock:
            if self.torn and self._is_inside(sys._getframe(1)):
                raise RuntimeError("a signal's handler or a finalizer that interrupts a change may make none itself")
            try:
                if self.torn:
                    self.start_anew("an earlier call was interrupted")
                self.torn = True
                self.settle()
                result = call(*arguments)
                self.torn = False
                return result
            except BaseException as error:
                self.torn = True
                self.start_anew(" ".join(f"{type(error).__name__}: {error}".split()))
                self.torn = False
                raise

    def settle_or_leave(self) -> None:
        """Calls `settle`, unless the caller has interrupted a change: then the next change does."""
        with self.lock:
            if not (self.torn and self._is_inside(sys._getframe(1))):
                self.change(lambda: None)

    def repair(self) -> None:
        """Makes the state valid if the last change was interrupted."""
        if self.torn:
            self.settle_or_leave()

    def _is_inside(self, frame: FrameType | None) -> bool:
        """Whether a frame is called from a change. The stack tells: an interrupt could leave a flag set."""
        while frame is not None:
            if frame.f_code is Changing.change.__code__ and frame.f_locals["self"] is self:
                return True
            frame = frame.f_back
        return False
