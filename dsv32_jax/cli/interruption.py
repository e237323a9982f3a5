"""Makes Ctrl-C end a command, also where Python or a library loses the exception."""

import _thread
import signal
import sys
import threading
import time
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from types import FrameType
from typing import Any

__all__ = ["Interrupt", "Interruption"]

PAUSE = 0.05
"""Seconds until a lost interrupt is repeated: by then Python has left the place that lost it."""

INITIALISING = (ExtensionFileLoader.create_module.__code__, ExtensionFileLoader.exec_module.__code__)
"""Functions that initialise modules in C++. Some modules end the process where Python code that they call raises."""


class Interrupt(KeyboardInterrupt):
    """The exception of Ctrl-C, which presses it again when it is lost.

    Python drops the exceptions of destructors and of the garbage collector's callbacks; modules in C turn them into
    others, such as ImportError; libraries catch those.

    Args:
      still_runs: tells, when the exception is gone, whether the code that it was to end still runs.
    """

    def __init__(self, still_runs: Callable[[], bool]):
        super().__init__()
        self._still_runs = still_runs

    def __del__(self) -> None:
        if self._still_runs():
            repeat(self._still_runs)  # raised here, it would be lost once more


def repeat(still_runs: Callable[[], bool]) -> None:
    """Presses Ctrl-C a little later, if the code that it is to end still runs then."""

    def press() -> None:
        time.sleep(PAUSE)
        thread = threading.main_thread().ident
        if thread is not None and still_runs():
            signal.pthread_kill(thread, signal.SIGINT)

    _thread.start_new_thread(press, ())


def initialises_extension(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code in INITIALISING:
            return True
        frame = frame.f_back
    return False


class Interruption:
    """Within it, Ctrl-C ends `run`, and the errors of threads and destructors that follow are not shown.

    A handler of SIGINT that is not Python's own stays, since the caller has installed it.
    """

    def __init__(self) -> None:
        self._interrupted = False
        self._runs = False
        self._handles = False

    def __enter__(self) -> "Interruption":
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            signal.signal(signal.SIGINT, self._handle)
            self._handles = True
        self._unraisablehook, self._excepthook = sys.unraisablehook, threading.excepthook
        sys.unraisablehook, threading.excepthook = self._quiet(sys.unraisablehook), self._quiet(threading.excepthook)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.unraisablehook, threading.excepthook = self._unraisablehook, self._excepthook
        if self._handles:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def run(self, command: Callable[[], None]) -> None:
        """Runs a command; raises KeyboardInterrupt if an interrupt came, even if the command caught it."""
        self._runs = True
        try:
            command()
        finally:
            self._runs = False
            if self._interrupted:
                raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        if initialises_extension(frame):
            repeat(lambda: self._runs)
        else:
            raise Interrupt(lambda: self._runs)

    def _quiet(self, hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def shown(problem: Any) -> None:
            if not (self._interrupted or issubclass(problem.exc_type, KeyboardInterrupt)):
                hook(problem)

        return shown
