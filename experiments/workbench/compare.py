"""Two models in one table, or one model under two settings: quality, speed and memory.

The first, A, is the reference: of the second's answers it is told how far they are from the first's, see `quality`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dsv32_jax.common.units import human
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.bench.timer import device_timer, summary
from dsv32_jax.experiments.results import environment
from dsv32_jax.experiments.workbench.cost import Steps, Work, alternately, ratio
from dsv32_jax.experiments.workbench.quality import Reference, Texts
from dsv32_jax.experiments.workbench.settings import Setting, WeightsIn, description, differences, in_scheme
from dsv32_jax.experiments.workbench.tables import aligned, answered, number, share, times
from dsv32_jax.fidelity import EQUAL_FIELDS
from dsv32_jax.generate.compiling import all_at_once
from dsv32_jax.generate.language_model import LanguageModel

__all__ = ["compare", "lines"]


def compare(
    models: Sequence[LanguageModel],
    settings: Sequence[Setting],
    texts: Texts | None,
    work: Work,
    rounds: int = 7,
    *,
    weights_in: WeightsIn = in_scheme,
) -> dict[str, Any]:
    """Measures both models.

    Args:
      models: A and B, which may be one.
      settings: of A and of B.
      texts: for the quality; None leaves it out.
      work: the steps that are timed.
      rounds: how often each is.
      weights_in: makes the weights of a scheme.

    Returns:
      JSON-able: the environment, `timer`, `work`, `texts`, `changed` (the names of what the descriptions do not share),
      `speedup` of B over A, and `rows`, one for each, with `name`, `runs` (its `settings.description`),
      `tokens_per_second`, `seconds`, `memory` and `quality`.

    Raises:
      UserError: the models cannot be compared, or a setting does not go with its model.
    """
    check_comparable(*models)
    a, b = (
        setting.applied_to_weights(weights_in(m, setting.scheme)) for setting, m in zip(settings, models, strict=True)
    )
    runs = [description(lm, setting.contiguous) for lm, setting in zip((a, b), settings, strict=True)]
    rows: list[dict[str, Any]] = [
        {"name": setting.name, "runs": each} for setting, each in zip(settings, runs, strict=True)
    ]
    jobs = [job for lm, each in zip((a, b), settings, strict=True) for job in Steps.jobs(lm, work, each.contiguous)]
    decode_a, prompt_a, decode_b, prompt_b = all_at_once(jobs)
    timer, _ = device_timer()
    speedup = {}
    for phase, pair, tokens in (
        ("decode", [decode_a, decode_b], work.sequences),
        ("prompt", [prompt_a, prompt_b], work.prompt_tokens),
    ):
        seconds = alternately(timer, pair, rounds)
        speedup[phase] = ratio(*seconds)
        for row, of_row in zip(rows, seconds, strict=True):
            row.setdefault("seconds", {})[phase] = summary(of_row)
            row.setdefault("tokens_per_second", {})[phase] = tokens / row["seconds"][phase]["median"]
    rows[0]["memory"], rows[1]["memory"] = (
        Steps.of(lm, decode, prompt).memory()
        for lm, decode, prompt in ((a, decode_a, prompt_a), (b, decode_b, prompt_b))
    )
    del decode_a, prompt_a, decode_b, prompt_b  # their caches
    if texts is not None:
        reference = Reference(a, texts)
        for row, lm in zip(rows, (a, b), strict=True):
            row["quality"] = reference.measure(lm)
    return {
        **environment(),
        "timer": timer.name,
        "work": vars(work),
        "texts": None if texts is None else texts.describe(),
        "changed": differences(*runs),
        "speedup": speedup,
        "rows": rows,
    }


def check_comparable(first: LanguageModel, second: LanguageModel) -> None:
    """Raises UserError for models whose layers or vocabularies differ."""
    for field in EQUAL_FIELDS:
        values = getattr(first.config, field), getattr(second.config, field)
        if values[0] != values[1]:
            raise UserError(
                f"B: {field} is {values[1]}, and of A {values[0]}; models that are compared must have the same"
            )


def lines(content: Mapping[str, Any]) -> list[str]:
    """The result as lines of text."""
    rows, texts, work = content["rows"], content["texts"], content["work"]
    table: list[list[str]] = []

    def add(name: str, values: Sequence[str], change: str = "") -> None:
        table.append([name, *values, change])

    if texts is not None:
        quality = [row["quality"] for row in rows]
        perplexities = [each["perplexity"] for each in quality]
        add("perplexity", list(map(number4, perplexities)), f"{100 * (perplexities[1] / perplexities[0] - 1):+.2f}%")
        add("bits per byte", [number4(each["bits_per_byte"]) for each in quality])
        add("KL(A || row), nats", [f"{each['kl']:.3g}" for each in quality])
        add("same likeliest token as A", [share(each["top1_agreement"]) for each in quality])
        add("recall of A's chosen positions", [share(each["recall"]) for each in quality])
        add("A's attention on chosen positions", [share(each["attention_mass"]) for each in quality])
        add("needles answered", [answered(each["needles"]) for each in quality])
    for phase in ("prompt", "decode"):
        speeds = [number(row["tokens_per_second"][phase]) for row in rows]
        add(f"{phase} tokens/s", speeds, times(content["speedup"][phase]))
    for name, label in MEMORY.items():
        sizes = [row["memory"][name] for row in rows]
        change = "" if sizes[0] == sizes[1] else f"{100 * (sizes[1] / sizes[0] - 1):+.1f}%"
        add(label, list(map(human, sizes)), change)
    read = (
        "quality is left out"
        if texts is None
        else f"{texts['windows']} windows of {texts['tokens']} tokens ({texts['source']})"
    )
    return [
        *aligned(["", "A", "B", "B against A"], table),
        "",
        *(f"{letter}: {row['name']}" for letter, row in zip("AB", rows, strict=True)),
        f"what differs: {', '.join(content['changed']) or 'nothing'}",
        f"{content['device']}, {content['date']}; {read}",
        f"decode: {work['sequences']} x 1 token at context {work['context']}; prompt: {work['prompt_tokens']} tokens; "
        "in brackets: not beyond the spread of the repeats",
    ]


MEMORY = {
    "weights": "weights",
    "cache_per_token": "cache of a token",
    "decode_workspace": "workspace of a decode step",
    "prompt_workspace": "workspace of a prompt step",
}


def number4(value: float) -> str:
    """Four significant figures."""
    return number(value, 4)
