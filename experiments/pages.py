"""Tools for reports of results: tables in Markdown, pages with parts between markers, figures."""

import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv32_jax.errors import UserError
from dsv32_jax.experiments.command_line import require

STYLE = "dsv32_jax.experiments.notebooks.figures"
"""Of matplotlib: colours that the colour-blind tell apart, a dash and a marker for each line, a white ground."""


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def between(page: str, name: str, content: str) -> str:
    """Replaces the text between the markers of a name in a page."""
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not marked.search(page):
        raise UserError(f"page: no markers of {name!r}; there must be <!-- {name} --> and <!-- /{name} -->")
    return marked.sub(lambda match: f"{match[1]}\n{content}\n\n{match[2]}", page)


def drawing(directory: Path) -> tuple[Any, Callable[[Any, str], Path]]:
    """matplotlib's pyplot without a screen, in the style of all figures, and `save(figure, name)`: the file's path.

    A figure stands alone: `titled` says what the numbers show, the axes have units, `signed` says where and when.
    """
    require("figures", "matplotlib", extra="train")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.style.use(STYLE)

    def save(figure: Any, name: str) -> Path:
        file = directory / f"{name}.png"
        figure.savefig(file, dpi=100)
        plt.close(figure)
        return file

    return plt, save


def signed(figure: Any, text: str) -> None:
    """Writes below a figure what was measured, on which device and when."""
    figure.supxlabel(text, x=0.995, ha="right", fontsize=7.5, color="#555555")


def titled(axis: Any, finding: str, width: int = 48) -> None:
    """Gives a part of a figure its finding as its title, in lines of so many letters."""
    axis.set_title("\n".join(textwrap.wrap(finding, width)))


def apart(number: int) -> dict[str, float]:
    """Width and marker of the n-th line of some that may coincide: what is drawn earlier stays to be seen beneath."""
    return {"linewidth": max(5.0 - 1.1 * number, 1.0), "markersize": max(11.0 - 1.6 * number, 4.0)}
