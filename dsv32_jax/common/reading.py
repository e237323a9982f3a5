"""Text and JSON files as they are found in checkpoints: errors that name the file, and no surprises of Python's."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsv32_jax.errors import UserError

DEEPEST = 64
"""Levels of a JSON file that are read; Python itself fails at some hundreds, in whatever function walks them."""
BYTE_ORDER_MARK = "\ufeff"


def present(path: Path) -> bool:
    """Whether a file is there.

    Raises:
      UserError: a symbolic link that leads nowhere has that name: a file was meant to be there.
    """
    if path.exists():
        return True
    if path.is_symlink():
        raise UserError(f"{path}: is a link to {path.readlink()}, which is missing; copy or download that file again")
    return False


def decoded(content: bytes) -> str:
    """UTF-8 without a byte order mark at its beginning, which editors leave there. Raises UnicodeDecodeError."""
    return content.decode("utf-8").removeprefix(BYTE_ORDER_MARK)


def surrogate_in(text: str) -> int | None:
    """Where a text has half of a UTF-16 pair, which JSON can write and which is no character; None: nowhere."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def parsed_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, also where it is nested too deeply to be handled."""
    too_deep = f"it is nested more than {DEEPEST} levels deep"
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(too_deep) from None
    level: list[Any] = [value]
    for _ in range(DEEPEST + 1):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return value
    raise ValueError(too_deep)


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file (of a directory: its config.json), or a UserError that names the file."""
    if path.is_dir():
        path = path / "config.json"
    try:
        raw = parsed_json(decoded(path.read_bytes()))
    except FileNotFoundError:
        present(path)
        raise UserError(f"{path} does not exist; a checkpoint has one") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds a {type(raw).__name__}; it must hold a JSON object")
    return raw
