"""Writes the engine's summary to a file, one line of JSON each time."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path

from dsv32_jax.errors import UserError
from dsv32_jax.server.worker import Worker

__all__ = ["check_writable", "regular_lines"]

logger = logging.getLogger("dsv32_jax.server")


def check_writable(path: Path) -> None:
    """Raises `UserError` if lines cannot be added to the file."""
    try:
        path.open("a").close()
    except OSError as error:
        raise UserError(f"--metrics-log {path}: cannot be written: {error.strerror}") from error


async def write_line(worker: Worker, path: Path) -> None:
    """Appends the summary; its `time` is Unix time.

    A full disk must not end the server: the line is lost then, and the log says so.
    """
    line = json.dumps({"time": time.time(), **await worker.summary()}) + "\n"
    try:
        await asyncio.to_thread(_append, path, line)
    except OSError as error:
        logger.warning("%s: a line of metrics is lost: %s", path, error.strerror)


@contextlib.asynccontextmanager
async def regular_lines(worker: Worker, path: Path | None, seconds: float) -> AsyncIterator[None]:
    """Writes a line at the beginning, at the end, and every so many seconds in between; without a path none."""

    async def write() -> None:
        while path is not None:
            await write_line(worker, path)
            await asyncio.sleep(seconds)

    writing = asyncio.create_task(write())
    try:
        yield
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        if path is not None:
            await write_line(worker, path)


def _append(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(line)
