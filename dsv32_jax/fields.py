"""Checks of the fields of a config file, with errors that name the field and what would be right."""

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from dsv32_jax.errors import UserError

# Below this similarity two names are taken to be different words (`n_group` for `num_group` scores 0.88).
_NEAR_MISS = 0.86


def near_miss(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was probably meant to be, if any."""
    plain = {k.lower().replace("_", "").replace("-", ""): k for k in known}
    short = name.lower().replace("_", "").replace("-", "")
    if short in plain:
        return plain[short]
    close = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=_NEAR_MISS)
    return close[0] if close else None


def number(name: str, value: object) -> None:
    """Refuses what is not a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise UserError(f"{name} is {value!r}; it must be a finite number above 0")


def integer(name: str, value: object, least: int) -> None:
    """Refuses what is not an integer, or less than `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} is {value!r}; it must be an integer of at least {least}")


def only(name: str, value: object, *supported: object) -> None:
    """Refuses what is none of the supported values."""
    # Types are compared too: JSON's 1 is not true, and 0.0 is not false.
    if not any(type(value) is type(s) and value == s for s in supported):
        words = " or ".join("absent" if s is None else json.dumps(s) for s in supported)
        raise UserError(f"{name} is {value!r}; the only supported value is {words}")


def check_keys(where: str, raw: object, known: frozenset[str], required: frozenset[str]) -> Mapping[str, Any]:
    """Refuse a nested block with a field that is missing or that nobody reads: it would change the arithmetic."""
    if not isinstance(raw, Mapping):
        raise UserError(f"{where} is {raw!r}; it must be an object or absent")
    for name in raw:
        if name not in known:
            meant = near_miss(name, known)
            hint = f"did you mean {where}.{meant}?" if meant else f"supported fields: {', '.join(sorted(known))}"
            raise UserError(f"{where}.{name} is not a field this model knows; {hint}")
    if missing := sorted(required - raw.keys()):
        raise UserError(f"{where}.{missing[0]} is missing; the config must give it")
    return raw
