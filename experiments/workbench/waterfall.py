"""The figure of `ablate`: from row to row, what each change does to the time of a step."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv32_jax.experiments.pages import drawing
from dsv32_jax.experiments.workbench.ablate_table import finding, label
from dsv32_jax.experiments.workbench.tables import number

__all__ = ["draw"]

FASTER, SLOWER, UNSURE = "#0072B2", "#D55E00", "#999999"
"""Okabe and Ito's blue and vermilion, which the colour-blind tell apart, and a grey."""
TITLE_WIDTH = 60


def draw(content: Mapping[str, Any], path: Path) -> Path:
    """Draws the rows of a result, a panel for each phase, and returns the file.

    Args:
      content: of `ablate`.
      path: of the PNG file.

    Raises:
      UserError: matplotlib is not installed.
    """
    plt, save = drawing(path.parent)
    rows = content["rows"]
    figure, axes = plt.subplots(1, 2, figsize=(13, 2.4 + 0.34 * len(rows)), sharey=True, facecolor="white")
    for axis, phase in zip(axes, ("decode", "prompt"), strict=True):
        panel(axis, content, phase)
    axes[0].set_yticks(range(len(rows)), [label(row) for row in rows])
    axes[0].invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (FASTER, SLOWER, UNSURE)]
    names = ("faster than the row that it is compared with", "slower", "not beyond the spread of the repeats")
    below = -45 / (34 * len(rows))
    axes[0].legend(handles, names, loc="upper right", bbox_to_anchor=(1, below), frameon=False, fontsize=8)
    axes[1].annotate(
        source(content),
        (1, below),
        xycoords="axes fraction",
        ha="right",
        va="top",
        fontsize=8,
        color="#444444",
    )
    return save(figure, path.stem)


def panel(axis: Any, content: Mapping[str, Any], phase: str) -> None:
    """The rows of one phase: each a bar from the time of the row that it is compared with to its own, a mark."""
    for place, row in enumerate(content["rows"]):
        own = milliseconds(row, phase)
        low, high = (1e3 * time for time in row["seconds"][phase]["quartiles"])
        right = max(own, high)
        if row["against"] is not None:
            other = own * row["speedup"][phase]["median"]  # as measured beside it
            colour = UNSURE
            if row["speedup"][phase]["differs"]:
                colour = FASTER if own < other else SLOWER
            axis.barh(place, other - own, left=own, height=0.6, color=colour)
            right = max(right, other)
        axis.plot([low, high], [place, place], color="black", linewidth=1)
        axis.plot([own], [place], marker="|", markersize=13, color="black")
        axis.annotate(f"  {number(own)}", (right, place), va="center", fontsize=8)
    axis.set_xscale("log")
    axis.margins(x=0.15)
    axis.xaxis.set_major_locator(locator())
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.grid(axis="x", color="#dddddd")
    axis.set_axisbelow(True)
    axis.set_title("\n".join(textwrap.wrap(finding(content, phase), TITLE_WIDTH)), fontsize=10, loc="left")
    axis.set_xlabel(f"milliseconds of a {phase} step (logarithmic)")


def locator() -> Any:
    """Ticks at 1, 2 and 5 of each power of ten."""
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1, 2, 5))


def milliseconds(row: Mapping[str, Any], phase: str) -> float:
    """The median time of a row's step."""
    return 1e3 * row["seconds"][phase]["median"]


def source(content: Mapping[str, Any]) -> str:
    """What was measured, where and when, in three lines."""
    work = content["work"]
    return (
        f"{content['model']}; {content['mode']}\n"
        f"decode: {work['sequences']} x 1 token, prompt: {work['prompt_tokens']} tokens, context {work['context']}\n"
        f"{content['device']}, JAX {content['versions']['jax']}, {content['date']}"
    )
