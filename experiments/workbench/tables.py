"""Tables of a terminal, at most 120 columns wide, and how their cells show a measurement."""

from collections.abc import Mapping, Sequence
from typing import Any

WIDEST = 120
NONE = "-"


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right, two spaces between them."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        first, *others = row
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant figures; "-" for None."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".rstrip(".")


def share(value: float | None) -> str:
    """A share as a percentage; "-" for None."""
    return NONE if value is None else f"{100 * value:.1f}%"


def answered(needles: Mapping[str, int] | None) -> str:
    """Needles found, of how many."""
    return NONE if needles is None else f"{needles['answered']}/{needles['of']}"


def times(speedup: Mapping[str, Any] | None) -> str:
    """How many times as fast, in brackets where that is not beyond the spread of the repeats."""
    if speedup is None:
        return NONE
    text = f"{number(speedup['median'])}x"
    return text if speedup["differs"] else f"({text})"
