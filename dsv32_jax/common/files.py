"""Writes files and directories that are either whole or absent, by one writer at a time; finds the home directory."""

import contextlib
import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from dsv32_jax.errors import UserError

TRIES = 100
"""Attempts, 10 ms apart, to read the process id of a holder that has not written it yet."""


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`, with its ending; the file becomes `path` if the block ends well, and is
    removed otherwise.

    Each call has a name of its own: of several writers, in whatever process or thread, the last one's file stays.
    """
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.part{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # it has been renamed, or could not be made, which has raised already
            temporary.unlink()


def replace_directory(fresh: Path, directory: Path) -> None:
    """Replaces `directory` by a whole one, `fresh`; the caller has locked its name."""
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)  # left by an interrupted call
    if directory.exists():
        directory.rename(old)
    fresh.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


class LockedPath(os.PathLike[str]):
    """A path that `locked` has locked for its caller, to be passed to functions that write it."""

    def __init__(self, path: Path):
        self.path = path

    def __fspath__(self) -> str:
        return os.fspath(self.path)


@contextlib.contextmanager
def locked(target: str | os.PathLike[str]) -> Iterator[LockedPath]:
    """Locks a file or directory that is to be written, against other processes and threads.

    The lock is the operating system's, on the file `.<name>.lock` beside the target: it ends with the process that
    holds it, in whatever way that ends. The file holds the process id and is removed at the end.

    Args:
      target: to be written; its parent directory is made. A `LockedPath` is yielded as it is, so that functions may
        write what their caller has locked.

    Raises:
      UserError: another process or thread is writing it; the message names the process.
      OSError: the lock's file cannot be written.
    """
    if isinstance(target, LockedPath):
        yield target
        return
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    file = target.with_name(f".{target.name}.lock")
    lock = FileLock(file, timeout=0)
    try:
        if (holder := acquire(lock, file)) is not None:
            raise UserError(f"{target}: process {holder} is writing it; wait for it, or give another path")
        if is_native(lock):
            file.write_text(str(os.getpid()))
        yield LockedPath(target)
    finally:
        try:
            if lock.is_locked and is_native(lock):
                # Before the release: a process that has it open sees then that it is no longer the lock.
                file.unlink(missing_ok=True)
        finally:
            lock.release()


def is_native(lock: BaseFileLock) -> bool:
    """Whether the lock is the system's. Where the system has none, filelock takes a file's existence for the lock."""
    return not isinstance(lock, SoftFileLock)


def acquire(lock: BaseFileLock, file: Path) -> int | None:
    """Acquires the lock, and returns None; or returns the id of the process that holds it, 0 where that is unknown."""
    holder = None
    for _ in range(TRIES):
        try:
            lock.acquire()
            return None
        except Timeout:
            if is_running(holder := process_in(file)):
                break
            time.sleep(0.01)  # the holder is about to write its id, or to remove the file
    return holder or 0


def process_in(file: Path) -> int | None:
    """The process id that a lock's file holds."""
    try:
        return int(file.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def is_running(process: int | None) -> bool:
    """Whether there is such a process on this machine."""
    if process is None or process <= 0:
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


def home_directory() -> Path:
    """The user's home directory. Raises OSError where there is none."""
    try:
        home = Path.home()
    except RuntimeError as error:  # no $HOME, and no entry for the user's id
        raise FileNotFoundError(errno.ENOENT, "no home directory is known", "~") from error
    # Python takes an empty $HOME for the root directory. A home that does not exist is not created here.
    if os.environ.get("HOME") == "" or not home.is_absolute() or not home.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "not a home directory", str(home))
    return home
