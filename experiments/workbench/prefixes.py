"""What it is worth that requests share the blocks of equal prefixes: the same requests, served without and with it."""

from typing import Any

import jax

from dsv32_jax.engine.engine import Engine
from dsv32_jax.experiments.bench.timer import summary
from dsv32_jax.experiments.studies.serving import GROUP, SHARED, Prompts, Sizes, served, workload
from dsv32_jax.experiments.workbench.cost import ratio
from dsv32_jax.experiments.workbench.tables import aligned, number, times
from dsv32_jax.generate.language_model import LanguageModel

__all__ = ["lines", "measure"]

ON_CPU, ON_GPU = (4, 256, 8), (32, 4096, 64)
"""Requests, tokens of each prompt, and tokens that each is continued by."""


def measure(
    m: LanguageModel, rounds: int = 3, sizes: tuple[int, int, int] | None = None, **limits: Any
) -> dict[str, Any]:
    """Serves requests of which three quarters of each prompt are the same, by two engines in turns.

    Args:
      m: the model.
      rounds: how often each serves them, beside the first time, which compiles.
      sizes: see `ON_CPU`.
      limits: other arguments of both `Engine`s.

    Returns:
      JSON-able: `requests`, `prompt`, `new`, `shared` (the share of a prompt), `group` (how many requests share it),
      `speedup` of sharing, and `rows`, each with `name`, `seconds` of them all, `requests_per_second`,
      `first_token_seconds`, `peak_blocks` of the cache in use, and `computed_tokens`, of prompts and new.
    """
    count, prompt, new = sizes or (ON_CPU if jax.default_backend() == "cpu" else ON_GPU)
    work = workload(count, 1, Sizes((prompt, prompt), (new, new)), Prompts(m), shared=True)
    room: dict[str, Any] = {"cache_tokens": count * (prompt + new + 64), "max_sequences": count, **limits}
    engines = {name: Engine(m, **room, sharing=name == "shared") for name in ("apart", "shared")}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    last: dict[str, dict[str, Any]] = {}
    for turn in range(rounds + 1):
        for name, engine in engines.items():
            last[name] = served(engine, work)
            if turn:
                seconds[name].append(last[name]["seconds"])
    return {
        "requests": count,
        "prompt": prompt,
        "new": new,
        "shared": SHARED,
        "group": min(GROUP, count),
        "speedup": ratio(seconds["apart"], seconds["shared"]),
        "rows": [
            {
                "name": f"prefixes: {name}",
                "seconds": summary(seconds[name]),
                "requests_per_second": count / summary(seconds[name])["median"],
                "first_token_seconds": last[name]["first_token_seconds"],
                "peak_blocks": last[name]["peak_blocks"],
                "computed_tokens": last[name]["summary"]["step_tokens"],
            }
            for name in engines
        ],
    }


def lines(content: dict[str, Any]) -> list[str]:
    """The result as lines of text."""
    rows = [
        [
            row["name"],
            number(row["requests_per_second"]),
            number(1e3 * row["first_token_seconds"]["p50"]),
            f"{row['computed_tokens']:,}",
            str(row["peak_blocks"]),
            times(content["speedup"]) if row["name"].endswith("shared") else "",
        ]
        for row in content["rows"]
    ]
    return [
        f"{content['requests']} requests at once, each of {content['prompt']} tokens and {content['new']} new ones; "
        f"{content['shared']:.0%} of a prompt is that of {content['group']}",
        *aligned(["row", "requests/s", "first token ms", "tokens computed", "peak blocks", "faster"], rows),
    ]
