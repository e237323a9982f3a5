"""Checks of the fields of a config file, with errors that name the field and what would be right."""

import difflib
import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from dsv32_jax.errors import UserError

_SHOWN = 60
"""The most characters of a value that a message shows."""

# Below this similarity two names are taken to be different words (`n_group` for `num_group` scores 0.88).
_NEAR_MISS = 0.86


def near_miss(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` is probably a slip of, if any."""
    by_letters = {k.lower().replace("_", "").replace("-", ""): k for k in known}
    letters = name.lower().replace("_", "").replace("-", "")
    if letters in by_letters:
        return by_letters[letters]
    close = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=_NEAR_MISS)
    return close[0] if close else None


def number(name: str, value: object) -> None:
    """Refuses a value that is not a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise UserError(f"{name} is {value!r}; it must be a finite number above 0")


def integer(name: str, value: object, least: int) -> None:
    """Refuses a value that is not an integer, or less than `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} is {value!r}; it must be an integer of at least {least}")


def only(name: str, value: object, *supported: object) -> None:
    """Refuses a value that is none of the supported ones."""
    # Types are compared too: JSON's 1 is not true, and 0.0 is not false.
    if not any(type(value) is type(s) and value == s for s in supported):
        words = " or ".join("absent" if s is None else json.dumps(s) for s in supported)
        raise UserError(f"{name} is {value!r}; the only supported value is {words}")


def same(value: object, other: object) -> bool:
    """Whether two JSON values mean the same: 1 is 1.0, and neither is true."""
    if isinstance(value, list | tuple) and isinstance(other, list | tuple):
        return len(value) == len(other) and all(map(same, value, other))
    if isinstance(value, bool) or isinstance(other, bool):
        return value is other
    return value == other


def neutral(name: str, value: object, accepted: Iterable[object], reason: str) -> None:
    """Refuses a value that is neither null nor one of the accepted values, under which the result is the same."""
    accepted = tuple(accepted)
    if value is not None and not any(same(value, neutral_value) for neutral_value in accepted):
        right = " or ".join([*map(shown, accepted), "absent"])
        raise UserError(f"{name} is {shown(value)}; it must be {right}: {reason}")


def shown(value: object) -> str:
    """A JSON value as a message has it."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def check_keys(path: str, raw: object, known: frozenset[str], required: frozenset[str]) -> Mapping[str, Any]:
    """Refuses a nested block without a required field, or with an unknown one, which could change the arithmetic.

    Args:
      path: of the block in the config, for errors.
      raw: the block.
      known: names of all its fields.
      required: those that it must have.
    """
    if not isinstance(raw, Mapping):
        raise UserError(f"{path} is {raw!r}; it must be an object or absent")
    for name in raw:
        if name not in known:
            meant = near_miss(name, known)
            hint = f"did you mean {path}.{meant}?" if meant else f"supported fields: {', '.join(sorted(known))}"
            raise UserError(f"{path}.{name} is not a field this model knows; {hint}")
    if missing := sorted(required - raw.keys()):
        raise UserError(f"{path}.{missing[0]} is missing; the config must give it")
    return raw
