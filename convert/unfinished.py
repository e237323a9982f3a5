"""Checkpoint directories in the making: one writer a target, which resumes what an interrupted run had finished."""

import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsv32_jax.common.files import LockedPath, locked, whole_file
from dsv32_jax.common.reading import parsed_json
from dsv32_jax.errors import UserError

JOURNAL = ".progress.json"
PARTIAL = ".partial"


def refuse_unfinished(directory: Path) -> None:
    """Raises UserError for a directory that is still being made: its files have room for tensors that were never
    written, and would load as zeros."""
    journal = read_journal(directory)
    if journal is not None and not journal.get("complete"):
        raise UserError(f"{directory}: an unfinished conversion; run the same conversion again to finish it")


def read_journal(directory: Path) -> dict[str, Any] | None:
    """The journal of a directory: {} where it cannot be read, and None where there is none."""
    try:
        journal = parsed_json((directory / JOURNAL).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        return {}
    return journal if isinstance(journal, dict) else {}


class Unfinished:
    """The directory `<target>.partial`, for whoever has locked the target.

    Attributes:
      directory: its path.
      done: groups that are finished, by this run or by an earlier one of the same work.
    """

    def __init__(self, directory: Path, identity: dict[str, Any] | None):
        """Makes the directory, or resumes in it; files that another work left in it are removed.

        Args:
          directory: its path.
          identity: of the work, JSON-able; a later run resumes only where it is the same, and never where it is None.

        Raises:
          UserError: something else has that name.
        """
        self.directory = directory
        journal = read_journal(directory)
        part_prefix = f".{Path(JOURNAL).stem}."  # of the file that becomes the journal once it is whole
        if journal is None and directory.exists():
            if not directory.is_dir() or any(not path.name.startswith(part_prefix) for path in directory.iterdir()):
                raise UserError(f"{directory}: is no unfinished conversion, and in the way; move it")
        self.identity = json.loads(json.dumps(identity))
        self.done: set[str] = set()
        directory.mkdir(parents=True, exist_ok=True)
        if journal and identity is not None and journal.get("identity") == self.identity:
            self.done = set(journal["done"])
            self.write_journal()
        else:
            self.restart()

    def restart(self) -> None:
        """Begins anew: removes all files, and marks no group as done."""
        self.done = set()
        self.write_journal()  # first, so that the directory counts as unfinished if the removal is interrupted
        self.keep(())

    def keep(self, names: Collection[str], folder: str = "") -> None:
        """Removes all but these files and folders, and the journal, from the directory or a folder in it."""
        for path in (self.directory / folder).iterdir():
            if path.name in names or (not folder and path.name == JOURNAL):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def finish(self, group: str) -> None:
        """Notes that a group is written and on the disk."""
        self.done.add(group)
        self.write_journal()

    def complete(self, target: Path) -> None:
        """Renames the finished directory to `target`."""
        self.write_journal(complete=True)
        try:
            self.directory.rename(target)
        finally:
            (target / JOURNAL).unlink(missing_ok=True)

    def write_journal(self, complete: bool = False) -> None:
        """Writes the file that a later run reads; `complete` means that only the renaming is missing."""
        journal = {"identity": self.identity, "done": sorted(self.done), "complete": complete}
        with whole_file(self.directory / JOURNAL) as part:
            part.write_text(json.dumps(journal), encoding="utf-8")


@contextmanager
def unfinished(target: str | os.PathLike[str], identity: dict[str, Any] | None) -> Iterator[Unfinished]:
    """Yields a directory to work in, which becomes `target` only if the block ends without an error.

    The caller has locked `target`. After an interruption the directory stays, so that the same work can be resumed.
    After a `UserError`, and without an `identity`, it is removed.
    """
    target = Path(target)
    work = Unfinished(target.with_name(target.name + PARTIAL), identity)
    try:
        yield work
        work.complete(target)
    except BaseException as error:
        if identity is None or isinstance(error, UserError):
            shutil.rmtree(work.directory, ignore_errors=True)
        raise


@contextmanager
def new_directory(target: str | os.PathLike[str]) -> Iterator[LockedPath]:
    """Locks a directory that the caller will make.

    Raises:
      UserError: it exists, cannot be written, has no name or the name of an unfinished directory, or another process is
        making it.
    """
    if Path(target).name in ("", ".."):
        raise UserError(f'"{target}": has no name of its own; give the path of a directory that does not exist')
    if Path(target).name.endswith(PARTIAL):
        raise UserError(f"{target}: unfinished directories end in {PARTIAL}; give another name")
    try:
        with locked(target) as path:
            refuse_existing(Path(path))
            yield path
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{target}: cannot be written ({file}{error.strerror or error})") from error


def refuse_existing(target: Path) -> None:
    """Raises UserError for a target that exists."""
    if (read_journal(target) or {}).get("complete"):  # a run was killed between its last two steps
        (target / JOURNAL).unlink(missing_ok=True)
    if os.path.lexists(target):
        raise UserError(f"{target}: exists; give a path that does not")
