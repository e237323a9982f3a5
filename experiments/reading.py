"""Reading and waiting: files of JSON lines, and a progress bar, which is lines where there is no terminal."""

import json
import lzma
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

SECONDS = 10.0
"""Between two lines of progress."""


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of an xz-compressed file with one a line."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


class Lines(Progress):
    """A bar that nobody can look at: every `SECONDS` a line for the task that moves."""

    def __init__(self, *columns: ProgressColumn, console: Console):
        super().__init__(*columns, console=console, disable=True)
        self.said = time.monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self.say(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self.say(task_id)

    def say(self, task_id: TaskID) -> None:
        """Prints how far a task is, if it is time to."""
        task, now = self.tasks[self.task_ids.index(task_id)], time.monotonic()
        if now - self.said >= SECONDS:
            self.said = now
            print(f"{task.description}: {task.completed:.0f} of {task.total or 0:.0f}", file=sys.stderr, flush=True)


def progress() -> Progress:
    """A bar of things done, on stderr; where that is no terminal, lines at intervals."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return (
        Progress(*columns, console=console, transient=True) if console.is_terminal else Lines(*columns, console=console)
    )
