"""The table and the figure of `dsv32 diagnose`."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv32_jax.common.units import human
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.command_line import require
from dsv32_jax.experiments.pages import drawing
from dsv32_jax.experiments.workbench.diagnose import title_of

__all__ = ["check_figure", "draw", "lines_of"]

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
"""Of the largest parts: those of Okabe and Ito, which readers with any colour vision tell apart."""
REST, WAITING = "#999999", "#FFFFFF"
WIDTH_OF_A_LETTER = 0.9
"""Percent of a bar: a name is written where it has room."""


def lines_of(row: Mapping[str, Any]) -> list[str]:
    """A row of the result as a table for a terminal."""
    if "error" in row:
        return [f"{title_of(row['shape'])}: {row['error']}"]
    seconds, profiled = row["seconds"], row["profiled"]
    low, high = (1e3 * quartile for quartile in seconds["quartiles"])
    under = f"under the profiler {1e3 * profiled['seconds']:.3f}"
    if profiled["without_graphs"]:
        under += f", without CUDA graphs {1e3 * profiled['without_graphs']:.3f}"
    lines = [
        f"{title_of(row['shape'])}: {1e3 * seconds['median']:.3f} ms a step ({low:.3f} to {high:.3f}; {under}); "
        f"the device works for {row['busy']:.0%} of it",
        f"  {'part':<20}{'ms':>10}{'share':>8}{'bytes':>11}{'operations':>12}{'bound, ms':>11}  reached",
    ]
    for part in row["parts"]:
        line = f"  {part['part']:<20}{1e3 * part['seconds']:>10.3f}{part['share']:>8.1%}"
        if "bytes" in part:
            line += f"{human(part['bytes']):>11}{number(sum(part['operations'].values())):>12}"
        if part["bound"]:
            bound = part["bound"]
            line += f"{1e3 * bound['seconds']:>11.3f}  {bound['of_time']:.0%} ({bound['by']})"
        lines.append(line)
    rest = {"waiting": "nothing runs"} | ({"difference": "within graphs"} if profiled["without_graphs"] else {})
    lines += [
        f"  {label:<20}{1e3 * row[name]['seconds']:>10.3f}{row[name]['share']:>8.1%}" for name, label in rest.items()
    ]
    if any(part["bound"] and part["bound"]["of_time"] > 1 for part in row["parts"]):
        lines.append("  above 100%: its data was still in the caches, and the bound counts the device's memory")
    memory = row["memory"]
    purposes = ", ".join(f"{name} {human(size)}" for name, size in memory["purposes"].items())
    most = memory["device_peak"]
    peak = f"; most in this process {human(most)} of {human(memory['device_limit'])}" if most else ""
    lines.append(f"  memory: {human(memory['needed'])}: {purposes}{peak}")
    return [*lines, f"  {row['verdict']['text']}"]


def number(operations: float) -> str:
    """A number of operations for people: "3.2 G"."""
    return human(operations).removesuffix("B").rstrip().replace("k", "K") if operations else "-"


def check_figure(path: Path) -> None:
    """Raises UserError for a name that is no PNG's, for a missing folder, or where matplotlib is not installed."""
    if path.suffix != ".png":
        raise UserError(f"--figure {path}: must end in .png")
    if not path.parent.is_dir() or path.is_dir():
        raise UserError(f"--figure {path}: cannot be written: its folder does not exist or it is a directory")
    require("--figure", "matplotlib", extra="train")


def draw(content: Mapping[str, Any], path: Path) -> Path:
    """Draws a result of `diagnose.diagnose` into a PNG file.

    Raises:
      UserError: no step of it was measured.
    """
    rows = [row for row in content["rows"] if "error" not in row]
    if not rows:
        raise UserError(f"--figure {path}: no step was measured, so there is nothing to draw")
    plt, save = drawing(path.parent)
    totals: dict[str, float] = {}
    for row in rows:
        for part in row["parts"]:
            totals[part["part"]] = totals.get(part["part"], 0.0) + part["share"]
    colours = dict(zip(sorted(totals, key=lambda name: -totals[name]), COLOURS, strict=False))
    tall = 0.6 * len(rows)  # inches
    figure, (axes, below) = plt.subplots(2, 1, figsize=(11, tall + 2.4), height_ratios=(tall, 0.6), facecolor="white")
    below.axis("off")
    for at, row in enumerate(rows):
        bar(axes, at, row, colours)
    labels = [f"{title_of(row['shape'])}\n{1e3 * row['seconds']['median']:.3g} ms" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the profiled step (%); dark: the least time that the part can take on this device")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    patches = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (*colours.values(), REST)]
    patches.append(plt.Rectangle((0, 0), 1, 1, facecolor=WAITING, edgecolor=REST, hatch="///"))
    names = [*colours, "other parts", "nothing runs"]
    below.legend(patches, names, ncols=5, fontsize=8, loc="upper right", frameon=False)
    longest = max(rows, key=lambda row: row["seconds"]["median"])
    finding = f"{title_of(longest['shape'])}: {longest['verdict']['text']}"
    axes.set_title("\n".join(textwrap.wrap(finding, 95)), fontsize=10, loc="left")
    footer = f"{content['model']}, {content['layers']} layers, {content['device']}, {content['date']}"
    below.text(0, 0.1, footer, fontsize=7, color="#555555")
    return save(figure, path.stem)


def bar(axes: Any, at: int, row: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    """One step's parts, the largest first, and the time in which nothing ran."""
    whole = sum(part["seconds"] for part in row["parts"]) + row["waiting"]["seconds"]
    left = 0.0
    for part in row["parts"]:
        width, colour = 100 * part["seconds"] / whole, colours.get(part["part"], REST)
        axes.barh(at, width, left=left, color=colour, alpha=0.45, edgecolor="white", linewidth=0.8)
        if part["bound"]:
            axes.barh(at, width * min(1.0, part["bound"]["of_time"]), left=left, color=colour, height=0.8)
        if width > WIDTH_OF_A_LETTER * len(part["part"]):
            axes.text(left + width / 2, at, part["part"], ha="center", va="center", fontsize=7)
        left += width
    axes.barh(at, 100 - left, left=left, facecolor=WAITING, edgecolor=REST, hatch="///", linewidth=0.5)
