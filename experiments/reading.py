"""Reading and waiting: files of JSON lines, and a progress bar that is silent when nobody looks."""

import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of an xz-compressed file with one a line."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def progress() -> Progress:
    """A bar of things done, on stderr."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
