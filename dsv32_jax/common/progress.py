"""Progress of what takes long, on stderr: a bar on a terminal, elsewhere a line now and then.

The command line shows it. Anywhere else nothing is shown unless one asks: `with progress.shown(): ...`, or
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
"""What is over sooner is not shown."""
LINE_SECONDS = 10.0
"""Between two lines."""
REFRESH_SECONDS = 0.1
"""Between two states of a bar."""

Advance = Callable[[int], None]

_wanted = False
_running = threading.Lock()
"""Held by the bar on the screen: what runs inside a longer task is silent."""


def show(wanted: bool = True) -> None:
    """From now on progress is shown, or not, in the whole process."""
    global _wanted
    _wanted = wanted


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Within it progress is shown, in every thread."""
    before = _wanted
    show()
    try:
        yield
    finally:
        show(before)


@contextlib.contextmanager
def progress_bar(title: str, total: int, unit: str = "bytes") -> Iterator[Advance]:
    """Progress of one task, from its beginning to 100 % where the block ends well.

    Args:
      title: what is done, such as "loading demo".
      total: how many there are to do.
      unit: what is counted; "bytes" are written as kB, MB, ...

    Yields:
      `advance(count)`, which any thread may call.
    """
    if not _wanted or not _running.acquire(blocking=False):
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
    """The items one by one, each done when the next is asked for."""
    with progress_bar(title, len(items), unit) as advance:
        for item in items:
            yield item
            advance(1)


class _Task:
    """Counts, and shows the count from a thread of its own: the caller may be busy in one long call."""

    def __init__(self, title: str, total: int, unit: str):
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        self._count = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dsv32-progress", daemon=True)
        self._display: _Bar | _Lines | None = None

    def start(self) -> None:
        self.begun = time.monotonic()
        self._thread.start()

    def advance(self, count: int = 1) -> None:
        with self._count:
            self.done = min(self.done + count, self.total)

    def end(self, complete: bool) -> None:
        """Takes the bar away, where that has not been done."""
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
        # A stream that nobody reads any more is no reason to end the task.
        with contextlib.suppress(OSError, ValueError):
            self._display = _Bar(self) if sys.stderr.isatty() else _Lines()
            self._display.update(self)
            while not self._ended.wait(self._display.interval):
                self._display.update(self)


class _Lines:
    """`loading demo: 12.0 MB of 20.3 MB, 14 s`."""

    interval = LINE_SECONDS

    def update(self, task: _Task) -> None:
        if task.unit == "bytes":
            count = f"{human(task.done)} of {human(task.total)}"
        else:
            count = f"{task.done} of {task.total} {task.unit}"
        with contextlib.suppress(OSError, ValueError):
            print(f"{task.title}: {count}, {time.monotonic() - task.begun:.0f} s", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class _Bar:
    """A bar of `rich`, which leaves the screen as it was."""

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
        self._progress.tasks[self._id].start_time = task.begun

    def update(self, task: _Task) -> None:
        self._progress.update(self._id, completed=task.done, refresh=True)

    def close(self) -> None:
        self._progress.stop()
