"""Reads the fields of a JSON object, each with its type and range. null is the same as absent, as with OpenAI."""

from collections.abc import Collection, Mapping
from typing import Any

from dsv32_jax.server.errors import ApiError

__all__ = ["Fields", "shown"]


class Fields:
    """A JSON object's fields. Where a value is wrong, every method raises `ApiError` 400, which names the field.

    Args:
      values: of the fields.
      prefix: of the fields' names in errors, for an object inside another.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = ""):
        self._values = {name: value for name, value in values.items() if value is not None}
        self._prefix = prefix

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def error(self, name: str, reason: str) -> ApiError:
        """The error of a field."""
        path = self._prefix + name
        return ApiError(400, f"{path}: {reason}", param=path)

    def only(self, known: Collection[str], neutral: Mapping[str, Collection[Any]]) -> None:
        """Refuses names that are not known, and values of `neutral` fields other than the listed ones, which change
        nothing.
        """
        for name, value in self._values.items():
            if name in neutral:
                if value not in neutral[name]:
                    raise self.error(name, "is not supported; leave it out")
            elif name not in known:
                path = self._prefix + ascii(name)[1:-1][:64]
                raise ApiError(400, f"Unrecognized request argument supplied: {path}", param=path)

    def value(self, name: str) -> Any:
        """The value of a field as it is; None where absent."""
        return self._values.get(name)

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self._values.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"{shown(value)} is not true or false")
        return value

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        value = self._values.get(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(name, f"{shown(value)} is not an integer")
        if not low <= value <= high:
            raise self.error(name, f"{shown(value)}; must be in {low}..{high}")
        return value

    def number(self, name: str, low: float, high: float, default: float) -> float:
        value = self._values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, f"{shown(value)} is not a number")
        if not low <= value <= high:
            raise self.error(name, f"{shown(value)}; must be from {low:g} to {high:g}")
        return float(value)

    def text(self, name: str) -> str | None:
        """A text that can be encoded as UTF-8; None where absent."""
        value = self._values.get(name)
        return None if value is None else self.as_text(name, value)

    def as_text(self, name: str, value: Any) -> str:
        """A value of the field as `text` has it."""
        if not isinstance(value, str):
            raise self.error(name, f"{shown(value)} is not a string")
        try:
            value.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can express
            raise self.error(name, "has half of a surrogate pair; it must be text") from None
        return value

    def object(self, name: str) -> "Fields":
        """The fields of a nested object; none where absent."""
        value = self._values.get(name, {})
        if not isinstance(value, dict):
            raise self.error(name, f"{shown(value)} is not an object")
        return Fields(value, f"{self._prefix}{name}.")


def shown(value: Any) -> str:
    """A client's value as a message has it: short, and ASCII."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    text = ascii(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 64 else text[:60] + "..."
