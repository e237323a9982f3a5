"""Changes of what belongs together: each whole or not at all, whatever interrupts it, and one thread at a time."""

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

__all__ = ["Changing"]

T = TypeVar("T")


class Changing:
    """An object whose state changes only in calls of `change`.

    An exception there, `KeyboardInterrupt` included, ends in `start_anew`. Where that is interrupted as well, the next
    change does it: `torn` stays. Other threads wait for the lock.

    Python may run code of others in the middle of ours: the handler of a signal, or a `__del__`. What such code leaves
    for later is done by `settle`, with which every change begins.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.torn = False  # in the middle of a change, or for good

    def start_anew(self, error: str) -> None:
        """Makes the state a valid one, whatever it is; may be called again after an interrupt."""
        raise NotImplementedError

    def settle(self) -> None:
        """Does what `settle_or_leave` left."""
        raise NotImplementedError

    def change(self, call: Callable[..., T], *arguments: Any) -> T:
        """Calls what changes the state; raises what it raises."""
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
        """`settle`, unless this interrupts a change: then the next one does."""
        with self.lock:
            if not (self.torn and self._is_inside(sys._getframe(1))):
                self.change(lambda: None)

    def repair(self) -> None:
        """What the next change would do if the last one was interrupted."""
        if self.torn:
            self.settle_or_leave()

    def _is_inside(self, frame: FrameType | None) -> bool:
        """A frame is called from a change. Asked of the stack, as a flag could be left set by an interrupt."""
        while frame is not None:
            if frame.f_code is Changing.change.__code__ and frame.f_locals["self"] is self:
                return True
            frame = frame.f_back
        return False
