"""Checks of the arguments of Python calls: their type, then their range, with errors that name them.

NumPy's numbers count as Python's; a bool is no number, and nothing is rounded or parsed.
"""

import math
from typing import Any

import numpy as np

from dsv32_jax.errors import UserError

__all__ = ["boolean", "instance", "integer", "number"]


def instance(name: str, value: Any, expected_type: type | tuple[type, ...], description: str) -> Any:
    """Returns the value if it is of a type, which `description` names in the error."""
    if not isinstance(value, expected_type):
        raise UserError(f"{name}: {shown(value)}; must be {description}")
    return value


def boolean(name: str, value: Any) -> bool:
    """Returns the value if it is True or False."""
    return bool(instance(name, value, (bool, np.bool_), "True or False"))


def integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Returns the value if it is an integer from `least` to `most`."""
    if isinstance(value, bool):
        instance(name, value, (), "a whole number")
    whole = int(instance(name, value, (int, np.integer), "a whole number"))
    if whole < least or (most is not None and whole > most):
        bounds = f"at least {least}" if most is None else f"in {least}..{most}"
        raise UserError(f"{name}: {shown(whole)}; must be {bounds}")
    return whole


def number(
    name: str,
    value: Any,
    description: str,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
) -> float:
    """Returns the value if it is a finite number of a range, which `description` names in the error."""
    if isinstance(value, bool):
        instance(name, value, (), "a number")
    value = instance(name, value, (int, float, np.integer, np.floating), "a number")
    # Compared before it becomes a float: an integer may be too large for one. No comparison holds for NaN.
    if not (above < value and least <= value <= most and -math.inf < value < math.inf):
        raise UserError(f"{name}: {shown(value)}; must be {description}")
    return float(value)


def shown(value: Any) -> str:
    """A value as a message has it: on one line, and not long."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    text = str(value) if isinstance(value, int | float | np.number) else " ".join(repr(value).split())
    return text if len(text) <= 64 else text[:60] + "..."
