"""The table of docs/serving.md from results/serving_*.json: `python -m experiments.studies.serving_report`."""

import json
from pathlib import Path
from typing import Any

from dsv32_jax.experiments import command_line
from dsv32_jax.experiments.command_line import writable
from dsv32_jax.experiments.pages import between, table
from dsv32_jax.experiments.results import RESULTS

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
RUNS = {
    "engine": "engine",
    "engine_shared": "engine, shared prefixes",
    "engine_filled": "engine, twice as many in the same cache",
    "engine_filled_shared": "engine, twice as many in the same cache, shared prefixes",
    "engine_shared_fourfold": "engine, four times as many in the same cache, shared prefixes",
    "engine_speculating": "engine, speculating",
}
OF_ALL = "requests_per_second_of_all"
"""Field of the requests/s of all runs, in the run with their median."""
HEAD = [
    "at a time",
    "way",
    "requests/s",
    "ratio",
    "while requests wait",
    "between tokens",
    "P99",
    "a request's mean",
    "P99",
    "cache used",
    "lost",
]


def rows_of(row: dict[str, Any]) -> list[list[str]]:
    """Rows of the table for one number of requests at a time: the static batch, then the engine's runs."""
    base = row["naive"]
    runs = {"static batches": base} | {name: row[key] for key, name in RUNS.items() if key in row}
    return [
        [
            str(row["concurrency"]),
            name,
            f"{run['requests_per_second']:.3f}",
            *(f"{run[ratio]:.2f}x" if ratio in run else "" for ratio in ("ratio", "steady_ratio")),
            *milliseconds(run["between_tokens_seconds"]),
            *milliseconds(run.get("per_output_token_seconds")),
            f"{run['utilisation']:.1%}" if run["utilisation"] else "",
            "" if run is base else f"{run['lost']} of {run['requests'] * len(run.get(OF_ALL, [0]))}",
        ]
        for name, run in runs.items()
    ]


def milliseconds(percentiles: dict[str, float] | None) -> list[str]:
    """Median and P99, where there are any."""
    return ["", ""] if percentiles is None else [f"{percentiles[key] * 1e3:.1f} ms" for key in ("p50", "p99")]


def tables(results: Path = RESULTS) -> str:
    """The tables of all results, one for each setting, in the order of their requests at a time."""
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in results.glob("serving_*.json")]
    rows: dict[str, list[dict[str, Any]]] = {}
    for content in sorted(contents, key=lambda one: (one["model"] == "demo", -one["layers"], one["date"])):
        rows.setdefault(setting_of(content), []).extend(content["rows"])
    parts = []
    for setting, setting_rows in rows.items():
        setting_rows.sort(key=lambda row: row["concurrency"])
        saved = [f"at {row['concurrency']} {row['prefix']['saved']:.1%}" for row in setting_rows if "prefix" in row]
        ideal, without_prompts = (
            ", ".join(f"at {row['concurrency']} {without_idle_rows(row, prompts):.2f}x" for row in setting_rows)
            for prompts in (True, False)
        )
        parts += [
            setting,
            table(HEAD, [line for row in setting_rows for line in rows_of(row)]),
            f"A prefix that is in the cache saves, of the time to read it: {', '.join(saved)}. "
            f"Static batches whose idle rows took no time would have these ratios: {ideal}; "
            f"if reading prompts took none either, {without_prompts}.{repeats(setting_rows)}",
        ]
    return "\n\n".join(parts)


def repeats(rows: list[dict[str, Any]]) -> str:
    """A sentence on the spread of the runs of which each number is the median; empty where there was only one run."""
    runs = [rates for row in rows for run in row.values() if isinstance(run, dict) and (rates := run.get(OF_ALL))]
    if not runs:
        return ""
    apart = sorted(max(run) / min(run) - 1 for run in runs)
    return (
        f" Each row is the middle one of {len(runs[0])} runs by requests/s; the fastest of them was "
        f"{apart[len(apart) // 2]:.0%} above the slowest in the median of the rows, {apart[-1]:.0%} at most."
    )


def setting_of(content: dict[str, Any]) -> str:
    """Describes the setting of a result."""
    prompt, new = (" to ".join(map(str, content["sizes"][key])) for key in ("prompt", "new"))
    return (
        f"{content['device']}, JAX {content['versions']['jax']}, {content['date']}; {content['model']}, "
        f"{content['layers']} layers; prompts of {prompt} tokens, {new} new ones; "
        f"{content['step_tokens']} tokens a step for each that runs, at least {content.get('least_step_tokens', 64)}."
    )


def without_idle_rows(row: dict[str, Any], prompts: bool = True) -> float:
    """How many times as fast static batches would be if a step, at its own time, always had a token for each row.

    Args:
      row: of one number of requests at a time.
      prompts: whether reading them takes its time; without, no scheduling of that many at a time could be faster.
    """
    base = row["naive"]
    steps = base["generated_tokens_per_second"] * base["seconds"] / row["concurrency"]
    reading = base["first_token_seconds"] if prompts else 0.0
    return base["seconds"] / (reading + steps * base["between_tokens_seconds"]["p50"])


def main() -> None:
    """The command."""
    writable(PAGE).write_text(between(PAGE.read_text(encoding="utf-8"), "serving", tables()), encoding="utf-8")


if __name__ == "__main__":
    command_line.run(main)
