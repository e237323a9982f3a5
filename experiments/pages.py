"""Tools for reports of results: tables in Markdown, pages with parts between markers, figures."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv32_jax.errors import UserError
from dsv32_jax.experiments.command_line import require


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
    """matplotlib's pyplot without a screen, and `save(figure, name)`, which returns the file."""
    require("figures", "matplotlib", extra="train")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def save(figure: Any, name: str) -> Path:
        file = directory / f"{name}.png"
        figure.tight_layout()
        figure.savefig(file, dpi=100)
        plt.close(figure)
        return file

    return plt, save
