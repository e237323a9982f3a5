"""Files that are whole or not there, and where the user's own files are."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, with its ending; it becomes `path` if the block ends well, else it is removed."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # gone, or never to be made: that error is on its way already
            temporary.unlink()


def home_directory() -> Path:
    """The user's. Raises OSError where there is none."""
    try:
        home = Path.home()
    except RuntimeError as error:  # no $HOME, and no entry for the user's id
        raise FileNotFoundError(errno.ENOENT, "no home directory is known", "~") from error
    # Python takes an empty $HOME for the root directory. And to make a home is not ours.
    if os.environ.get("HOME") == "" or not home.is_absolute() or not home.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "not a home directory", str(home))
    return home
