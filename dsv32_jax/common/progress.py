"""Shows the progress of long tasks on stderr: as a bar on a terminal, elsewhere as a line now and then.

The command line shows it. Anywhere else it is shown only on request: by `with progress.shown(): ...`, or by
`progress.show()` once in a notebook.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dsv32_jax.common.units import human

__all__ = ["progress_bar", "show", "shown", "tracked"]

FIRST_SECONDS = 2.0
"""Tasks that end sooner are not shown."""
LINE_SECONDS = 10.0
"""The time between two lines."""
REFRESH_SECONDS = 0.1
"""The time between two updates of a bar."""

Advance = Callable[[int], None]

_enabled = False
_running = threading.Lock()
"""Held by the task that is shown: a task inside a longer one is not shown."""


def show(enabled: bool = True) -> None:
    """Shows progress from now on, or hides it, in the whole process."""
    global _enabled
    _enabled = enabled


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Within it, progress is shown, in every thread."""
    previous = _enabled
    show()
    try:
        yield
    finally:
        show(previous)


@contextlib.contextmanager
def progress_bar(title: str, total: int, unit: str = "bytes") -> Iterator[Advance]:
    """Shows the progress of one task, from its beginning to 100 % where the block ends well.

    Args:
      title: of the task, such as "loading demo".
      total: the number of units in the task.
      unit: that is counted; "bytes" are shown as kB, MB, ...

    Yields:
      `advance(count)`, which any thread may call.
    """
    if not _enabled or not _running.acquire(blocking=False):
        yield lambda count: None
        return
    task = _Task(title, total, unit)
    try:
        task.start()
        yield task.advance
        task.end(complete=True)
    finally:
        task.end(complete=False)
        _running.release()


def tracked[Item](items: Sequence[Item], title: str, unit: str) -> Iterator[Item]:
    """Yields the items one by one; each counts as done when the next is asked for."""
    with progress_bar(title, len(items), unit) as advance:
        for item in items:
            yield item
            advance(1)


class _Task:
    """Counts, and shows the count from its own thread, since the caller may be busy in one long call."""

    def __init__(self, title: str, total: int, unit: str):
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        self._count = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dsv32-progress", daemon=True)
        self._display: _Bar | _Lines | None = None

    def start(self) -> None:
        self.started = time.monotonic()
        self._thread.start()

    def advance(self, count: int = 1) -> None:
        with self._count:
            self.done = min(self.done + count, self.total)

    def end(self, complete: bool) -> None:
        """Closes the display, unless that has been done."""
        self._ended.set()
        self._thread.join()
        if self._display is not None:
            if complete:
                self.done = self.total
                self._display.update(self)
            self._display.close()
            self._display = None

    def _run(self) -> None:
        if self._ended.wait(FIRST_SECONDS):
            return
        # A closed stream must not end the task.
        with contextlib.suppress(OSError, ValueError):
            self._display = _Bar(self) if sys.stderr.isatty() else _Lines()
            self._display.update(self)
            while not self._ended.wait(self._display.interval):
                self._display.update(self)


class _Lines:
    """Lines such as `loading demo: 12.0 MB of 20.3 MB, 14 s`."""

    interval = LINE_SECONDS

    def update(self, task: _Task) -> None:
        if task.unit == "bytes":
            count = f"{human(task.done)} of {human(task.total)}"
        else:
            count = f"{task.done} of {task.total} {task.unit}"
        with contextlib.suppress(OSError, ValueError):
            print(f"{task.title}: {count}, {time.monotonic() - task.started:.0f} s", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class _Bar:
    """A bar of `rich`, which disappears from the screen at its end."""

    interval = REFRESH_SECONDS

    def __init__(self, task: _Task):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f}%")]
        if task.unit == "bytes":
            columns += [DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()]
        else:
            columns += [MofNCompleteColumn(), TextColumn(task.unit), TimeElapsedColumn()]
        self._progress = Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True)
        self._progress.start()
        self._id = self._progress.add_task(task.title, total=task.total)
        self._progress.tasks[self._id].start_time = task.started

    def update(self, task: _Task) -> None:
        self._progress.update(self._id, completed=task.done, refresh=True)

    def close(self) -> None:
        self._progress.stop()
