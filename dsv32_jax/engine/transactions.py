"""Transactions: changes of an object's state that happen whole or not at all, whatever interrupts them."""

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

__all__ = ["Transactional"]

T = TypeVar("T")


class Transactional:
    """An object whose state changes only in transactions: calls of `transact`, of one thread at a time.

    After an exception in a transaction, `KeyboardInterrupt` included, `recover` makes the state valid. Where that is
    interrupted as well, `torn` stays true, and the next transaction calls it.

    Python may run other code in the middle of a transaction: the handler of a signal, or a `__del__`. Such code defers
    its changes, and every transaction begins with `apply_deferred`, which makes them.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.torn = False  # a transaction runs, or an interrupted one has left the state invalid

    def recover(self, error: str) -> None:
        """Makes the state valid, whatever it is; may be called again after an interrupt."""
        raise NotImplementedError

    def apply_deferred(self) -> None:
        """Makes the changes that were deferred."""
        raise NotImplementedError

    def transact(self, call: Callable[..., T], *arguments: Any) -> T:
        """Calls a function that changes the state, as a transaction; raises what it raises."""
        with self.lock:
            if self.torn and self._called_from_transaction(sys._getframe(1)):
                raise RuntimeError("a signal's handler or a finalizer that interrupts a change may make none itself")
            try:
                if self.torn:
                    self.recover("an earlier call was interrupted")
                self.torn = True
                self.apply_deferred()
                result = call(*arguments)
                self.torn = False
                return result
            except BaseException as error:
                self.torn = True
                self.recover(" ".join(f"{type(error).__name__}: {error}".split()))
                self.torn = False
                raise

    def apply_or_defer(self) -> None:
        """Calls `apply_deferred`, unless the caller has interrupted a transaction: then the next one does."""
        with self.lock:
            if not (self.torn and self._called_from_transaction(sys._getframe(1))):
                self.transact(lambda: None)

    def repair(self) -> None:
        """Makes the state valid if the last transaction was interrupted."""
        if self.torn:
            self.apply_or_defer()

    def _called_from_transaction(self, frame: FrameType | None) -> bool:
        """Whether a frame is called from a transaction. The stack tells: an interrupt could leave a flag set."""
        while frame is not None:
            if frame.f_code is Transactional.transact.__code__ and frame.f_locals["self"] is self:
                return True
            frame = frame.f_back
        return False
