"""The results of `ablate` as two tables of a terminal, and in one sentence."""

import math
import textwrap
from collections.abc import Mapping
from typing import Any

from dsv32_jax.experiments.workbench import prefixes
from dsv32_jax.experiments.workbench.cost import megabytes
from dsv32_jax.experiments.workbench.tables import WIDEST, aligned, answered, number, share, times

__all__ = ["finding", "lines"]


PHASES = ("decode", "prompt")
TIME = ["row", "vs", "decode ms", "+-", "faster", "prompt ms", "+-", "faster"]
MEMORY = ["row", "weights, MB", "token in the cache, kB", "decode workspace, MB", "prompt workspace, MB"]
QUALITY = ["row", "perplexity", "bits/byte", "KL, nats", "same best", "recall", "attention", "needles"]


def lines(content: Mapping[str, Any]) -> list[str]:
    """The tables, and what they are of, as lines of text."""
    rows, texts, work = content["rows"], content["texts"], content["work"]
    if not rows:
        return [*prefixes.lines(content["prefixes"]), "", f"{content['device']}, {content['date']}; {content['model']}"]
    result = ["time of a step", *fitting(TIME, [[label(row), *time_cells(row)] for row in rows])]
    result += ["", "memory", *fitting(MEMORY, [[label(row), *memory_cells(row["memory"])] for row in rows])]
    if texts is not None:
        quality = [[label(row), *quality_cells(row["quality"])] for row in rows]
        result += ["", "quality, beside the model as loaded", *fitting(QUALITY, quality)]
    for name, reason in content["left_out"].items():
        result += textwrap.wrap(f"left out: {name}: {reason}", WIDEST)
    if "prefixes" in content:
        result += ["", *prefixes.lines(content["prefixes"])]
    read = "quality is left out" if texts is None else f"{texts['windows']} windows of {texts['tokens']} tokens"
    result += [
        "",
        *textwrap.wrap(finding(content, "decode"), WIDEST),
        *textwrap.wrap(finding(content, "prompt"), WIDEST),
        f"{content['device']}, {content['date']}; {content['model']}; {read}",
        f"decode: {work['sequences']} x 1 token at context {work['context']}; prompt: {work['prompt_tokens']} tokens",
        "+-: half the width of the middle half of the times; faster: than row vs, in brackets: not beyond the spread",
    ]
    return result


def label(row: Mapping[str, Any]) -> str:
    """A row's number and name."""
    return f"{row['number']} {row['name']}"


def fitting(head: list[str], rows: list[list[str]]) -> list[str]:
    """A table in the width of a terminal; names of rows are cut where they are too long for that."""
    (beside, *_) = aligned(["", *head[1:]], [["", *row[1:]] for row in rows])
    room = WIDEST - len(beside)
    cut = [[name if len(name) <= room else f"{name[: room - 3]}...", *cells] for name, *cells in rows]
    return aligned(head, cut)


def time_cells(row: Mapping[str, Any]) -> list[str]:
    """The cells of `TIME`."""
    cells = ["" if row["against"] is None else str(row["against"])]
    for phase in PHASES:
        seconds = row["seconds"][phase]
        low, high = seconds["quartiles"]
        cells += [number(1e3 * seconds["median"]), number(1e3 * (high - low) / 2, 2), times(row["speedup"].get(phase))]
    return cells


def memory_cells(memory: Mapping[str, int]) -> list[str]:
    """The cells of `MEMORY`."""
    of_token = f"{memory['cache_per_token'] / 1e3:.1f}"
    return [megabytes(memory["weights"]), of_token, *(megabytes(memory[f"{phase}_workspace"]) for phase in PHASES)]


def quality_cells(quality: Mapping[str, Any]) -> list[str]:
    """The cells of `QUALITY`."""
    return [
        number(quality["perplexity"], 4),
        number(quality["bits_per_byte"], 4),
        f"{quality['kl']:.2g}",
        share(quality["top1_agreement"]),
        share(quality["recall"]),
        share(quality["attention_mass"]),
        answered(quality["needles"]),
    ]


def finding(content: Mapping[str, Any], phase: str) -> str:
    """What the rows say of a phase, in one sentence."""
    rows = {row["number"]: row for row in content["rows"]}
    compared = [row for row in rows.values() if row["against"] is not None]
    real = [row for row in compared if row["speedup"][phase]["differs"]]
    if not real:
        return f"A {phase} step: no change is beyond the spread of the repeats"
    if (steps := [row for row in compared if row["step"]]) and any(row in real for row in steps):
        # Each is measured beside the row before it; times of rows far apart may be those of another clock rate.
        whole = math.prod(row["speedup"][phase]["median"] for row in steps)
        best = (max if whole > 1 else min)(steps, key=lambda row: row["speedup"][phase]["median"])
        return (
            f"A {phase} step is {as_fast(whole)} as the baseline's; the largest share: {best['name']} "
            f"({number(best['speedup'][phase]['median'])}x)"
        )
    most = max(real, key=lambda row: max(row["speedup"][phase]["median"], 1 / row["speedup"][phase]["median"]))
    return f"A {phase} step: the largest change is {most['name']}, {as_fast(most['speedup'][phase]['median'])}"


def as_fast(ratio: float) -> str:
    """A ratio of speeds in words."""
    return f"{number(ratio)} times as fast" if ratio > 1 else f"{number(1 / ratio)} times as slow"
