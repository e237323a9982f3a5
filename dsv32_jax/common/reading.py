"""Reads text and JSON files of checkpoints, with errors that name the file."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsv32_jax.errors import UserError

DEEPEST = 64
"""The most levels of a JSON file; Python itself fails at some hundreds, in whatever function walks them."""
BYTE_ORDER_MARK = "\ufeff"


def present(path: Path) -> bool:
    """Whether a file exists.

    Raises:
      UserError: it is a symbolic link whose target is missing.
    """
    if path.exists():
        return True
    if path.is_symlink():
        raise UserError(f"{path}: is a link to {path.readlink()}, which is missing; copy or download that file again")
    return False


def decoded(content: bytes) -> str:
    """Decodes UTF-8, without the byte order mark that some editors write. Raises UnicodeDecodeError."""
    return content.decode("utf-8").removeprefix(BYTE_ORDER_MARK)


def surrogate_in(text: str) -> int | None:
    """The index of half a UTF-16 pair in a text, which JSON can express and which is no character; None for none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def parsed_json(text: str) -> Any:
    """Parses a JSON text. Raises ValueError, also where it is nested too deeply."""
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
    """Reads the JSON object in a file, or in the config.json of a directory. Raises a UserError that names the file."""
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
