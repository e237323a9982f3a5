"""The results as a table on the terminal, as tables of the kernels' pages, and as a figure."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv32_jax.experiments.bench.shapes import SHAPES
from dsv32_jax.experiments.command_line import writable
from dsv32_jax.experiments.pages import drawing, signed
from dsv32_jax.experiments.results import RESULTS, read_result

NAME = "kernels"
RESULT = RESULTS / f"{NAME}.json"
PAGES = Path(__file__).parent.parent.parent / "docs" / "kernels"
CURVE = "attention_curve.png"
SPARSE_WINS, DENSE_WINS = "#0072B2", "#D55E00"
"""Of the areas between the curves: the colours of the two."""
MARKED = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
HEADINGS = ("shape", "time", "spread", "TFLOP/s", "GB/s", "roofline", "memory", "reference", "peer", "target")


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table, by `HEADINGS`."""
    if "error" in row:
        return [row["shape"], f"failed: {row['error'][:60]}", *[""] * (len(HEADINGS) - 2)]
    times, bound, reference, peer = row["seconds"], row["roofline"], row.get("reference"), row.get("peer")
    return [
        row["shape"] + ("" if row["backend"] == "mosaic_gpu" else f" ({row['backend']})"),
        duration(times["median"]),
        f"{duration(times['min'])} to {duration(times['max'])}",
        "" if row["tflops"] is None else f"{row['tflops']:.0f}" if row["tflops"] >= 10 else f"{row['tflops']:.2g}",
        f"{row['gbytes_per_second']:.0f}",
        "" if bound is None else f"{bound['fraction']:.0%} ({bound['bound']})",
        size(row["memory"]),
        beside(reference),
        "" if peer is None else f"{peer['ratio']:.2f}x ({peer['name']})",
        verdict(row),
    ]


def beside(reference: dict[str, Any] | None) -> str:
    """How much faster than the reference; its tokens where its time is scaled."""
    if reference is None:
        return ""
    if "error" in reference:
        return "did not run"
    part = f", {reference['measured_tokens']} tokens scaled"
    scaled = reference["seconds_scaled_to_shape"] != reference["measured_seconds"]
    return f"{reference['ratio']:.1f}x" + (part if scaled else "")


def reached(row: dict[str, Any]) -> float | None:
    """The number that the row's target speaks of, if it was measured."""
    if "target" not in row or "error" in row:
        return None
    measured = row.get(row["target"]["of"]) or {}
    return measured.get("fraction" if row["target"]["of"] == "roofline" else "ratio")


def verdict(row: dict[str, Any]) -> str:
    """The target, and whether it is reached."""
    if "target" not in row:
        return ""
    target, value = row["target"], reached(row)
    floor, goal, enough, within = (target.get(name) for name in ("floor", "goal", "enough", "within"))
    asked = f"{floor:g} / {goal:g}" + (" of the reference" if target["of"] == "reference" else "")
    asked += f" or {enough:.0%}" if enough else ""
    asked += f" and {duration(within)}" if within else ""
    if value is None:
        return f"{asked}: not measured"
    saturated = enough is not None and row["roofline"] is not None and row["roofline"]["fraction"] >= enough
    if (value >= goal or saturated) and (within is None or row["seconds"]["median"] <= within):
        return f"{asked}: goal"
    return f"{asked}: " + ("floor" if value >= floor else "missed")


def duration(seconds: float) -> str:
    """With three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * size:
            return f"{three(seconds / size)} {unit}"
    return f"{three(seconds / 1e-6)} us"


def three(number: float) -> str:
    """Three digits, never an exponent."""
    return f"{number:.3g}" if number < 999.5 else f"{number:.0f}"


def dense(row: dict[str, Any]) -> float | None:
    """Of a row of the whole attention: the best dense time that was measured, in seconds."""
    times = []
    reference, peer = row.get("reference"), row.get("peer")
    if reference is not None and "error" not in reference:
        times.append(reference["seconds_scaled_to_shape"])
    if peer is not None:
        times.append(peer["seconds"])
    return min(times, default=None)


def print_table(content: dict[str, Any]) -> None:
    """All rows on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in ("op", *HEADINGS):
        table.add_column(heading, justify="left" if heading in ("op", "shape", "target") else "right", no_wrap=True)
    devices = dict.fromkeys(device for device, _, _ in groups(content))
    for device, op, rows in groups(content):
        for n, row in enumerate(rows):
            shown = op if len(devices) == 1 else f"{op}, {device}"
            table.add_row(shown if n == 0 else "", *cells(row), end_section=n + 1 == len(rows))
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a file has no width
    console.print(table)


def groups(content: dict[str, Any]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """(device, op, rows) in the order of the shapes."""
    runs = {run["time"]: run for run in content["runs"]}
    rows_of: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in content["rows"]:
        rows_of.setdefault((runs[row["run"]]["device"], row["op"]), []).append(row)
    return [(device, op, rows) for (device, op), rows in rows_of.items()]


# ---- pages -----------------------------------------------------------------------------------------------------


def markdown(content: dict[str, Any], op: str) -> str:
    """The table of an op for its page, one for each device."""
    runs = {run["time"]: run for run in content["runs"]}
    parts = []
    for device, name, rows in groups(content):
        if name != op:
            continue
        its_runs = [runs[time] for time in dict.fromkeys(row["run"] for row in rows)]
        lines = [f"{device}; " + "; ".join(sentence(run) for run in its_runs) + ".", ""]
        table = [attention_cells(row) for row in rows] if op == "attention" else [cells(row) for row in rows]
        headings = ATTENTION_HEADINGS if op == "attention" else HEADINGS
        # A column that nothing is in is left out.
        kept = [n for n in range(len(headings)) if n == 0 or any(line[n] for line in table)]
        lines.append("| " + " | ".join(headings[n] for n in kept) + " |")
        lines.append("|" + "|".join(" --- " if n == 0 else " ---: " for n in kept) + "|")
        lines += ["| " + " | ".join(line[n].replace("|", "/") for n in kept) + " |" for line in table]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n" if parts else "Not measured yet.\n"


ATTENTION_HEADINGS = (
    *("shape", "time", "memory", "dense, stock JAX", "its time", "its memory", "faster by"),
    *("dense, published", "its time", "faster by"),
)


def attention_cells(row: dict[str, Any]) -> list[str]:
    """A row of the whole attention, beside the dense ones: what JAX has itself, and the best published kernel."""
    if "error" in row:
        return [*cells(row)[:3], *[""] * (len(ATTENTION_HEADINGS) - 3)]
    line = [row["shape"], duration(row["seconds"]["median"]), size(row["memory"])]
    reference, peer = row.get("reference"), row.get("peer")
    if reference is None or "error" in reference:
        line += ["did not run", "", "", ""]
    else:
        seconds = duration(reference["seconds_scaled_to_shape"])
        line += [reference["name"], seconds, size(reference["memory"]), f"{reference['ratio']:.2f}x"]
    if peer is None:
        return [*line, "", "", ""]
    return [*line, "; ".join(peer["rows"]), duration(peer["seconds"]), f"{peer['ratio']:.2f}x"]


def size(memory: dict[str, int]) -> str:
    """Temporaries and outputs together: what the call needs beside its inputs."""
    total = sum(memory.values())
    return f"{three(total / 1e9)} GB" if total >= 1e9 else f"{three(total / 1e6)} MB"


def sentence(run: dict[str, Any]) -> str:
    """When, with what, and what the device itself reached."""
    rates = run["roofline"]["ceilings"]
    shown = [
        f"{label} {three(rates[name] / 1e12)} {unit}"
        for name, label, unit in (("copy", "copy", "TB/s"), ("bf16", "bf16", "TFLOP/s"), ("fp8", "FP8", "TFLOP/s"))
        if rates[name] is not None
    ]
    return f"{run['date']}, jax {run['versions']['jax']}; {run['timer']}; {', '.join(shown)}"


def with_tables(page: str, content: dict[str, Any]) -> str:
    """A page with the table of each op between its markers, `<!-- bench:OP -->` and `<!-- /bench -->`."""
    for _, op, _ in MARKED.findall(page):
        if op not in SHAPES:
            raise ValueError(f"bench:{op}: no such op; ops are {', '.join(SHAPES)}")
    return MARKED.sub(lambda match: match[1] + markdown(content, match[2]) + match[3], page)


def write_pages(pages: Path = PAGES) -> list[Path]:
    """Writes the measured tables into the kernels' pages, and the figure; returns what it wrote."""
    writable(pages)
    content = read_result(NAME)
    written = []
    for path in sorted(pages.glob("*.md")):
        page = path.read_text(encoding="utf-8")
        if MARKED.search(page):
            path.write_text(with_tables(page, content), encoding="utf-8")
            written.append(path)
    if curve(content):
        written.append(draw(content, pages / CURVE))
    return written


def curve(content: dict[str, Any]) -> list[tuple[str, list[tuple[int, float, float]]]]:
    """By device: (tokens of a prompt, our seconds, best dense seconds), where both were measured."""
    curves = []
    for device, op, rows in groups(content):
        points = [
            (row["dims"]["tokens"], row["seconds"]["median"], best)
            for row in rows
            if op == "attention" and row["dims"]["kind"] == "prefill" and "error" not in row and (best := dense(row))
        ]
        if len(points) > 1:
            curves.append((device, sorted(points)))
    return curves


def draw(content: dict[str, Any], file: Path) -> Path:
    """Time of a prompt's attention in one layer by its length, sparse and dense, and which of them is faster where."""
    plt, save = drawing(file.parent)
    figure, axes = plt.subplots(figsize=(7, 4.4))
    curves = curve(content)
    for device, points in curves:
        lengths = [length for length, _, _ in points]
        ours, theirs = np.array([seconds for _, *seconds in points]).T * 1e3
        suffix = f", {device}" if len(curves) > 1 else ""
        axes.plot(lengths, ours, label=f"sparse: scores, selection, attention{suffix}")
        axes.plot(lengths, theirs, label=f"the fastest dense kernel{suffix}")
        axes.fill_between(lengths, ours, theirs, where=theirs >= ours, interpolate=True, color=SPARSE_WINS, alpha=0.15)
        axes.fill_between(lengths, ours, theirs, where=theirs <= ours, interpolate=True, color=DENSE_WINS, alpha=0.15)
    ticks: Sequence[int] = sorted({point[0] for _, points in curves for point in points})
    axes.set(xscale="log", yscale="log", xlabel="tokens of the prompt", ylabel="ms for the attention of one layer")
    axes.set_title("\n".join(crossing(points) for _, points in curves))
    axes.set_xticks(ticks, list(map(tokens, ticks)))
    axes.minorticks_off()
    axes.legend(loc="upper left")
    runs = {run["time"]: run for run in content["runs"]}
    times = dict.fromkeys(row["run"] for row in content["rows"] if row["op"] == "attention")
    made = dict.fromkeys(f"{runs[n]['device']}, JAX {runs[n]['versions']['jax']}, {runs[n]['date']}" for n in times)
    signed(figure, "one layer at full width; shaded: the difference\n" + "; ".join(made))
    return save(figure, file.stem)


def crossing(points: list[tuple[int, float, float]]) -> str:
    """A sentence on where sparse attention overtakes dense attention, by the points of `curve`."""
    (first, ours, theirs), (last, our_last, their_last) = points[0], points[-1]
    ends = f"{speed(theirs / ours)} at {tokens(first)} tokens, {speed(their_last / our_last)} at {tokens(last)}"
    slower = [length for length, our, their in points if our > their]
    faster = [length for length, our, their in points if our <= their]
    if not slower or not faster or max(slower) > min(faster):
        return f"Sparse attention is {ends}"
    return f"Sparse attention wins beyond {tokens(max(slower))} to {tokens(min(faster))} tokens:\n{ends}"


def speed(ratio: float) -> str:
    """'4.6 times as fast', or slow, of the ratio of the other's time to one's own."""
    return f"{ratio:.1f} times as fast" if ratio >= 1 else f"{1 / ratio:.1f} times as slow"


def tokens(number: int) -> str:
    """'32k' of 32768."""
    return f"{number // 1024}k" if number >= 1024 else str(number)
