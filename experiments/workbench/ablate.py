"""What each change is worth: one row a change, with time, memory and quality beside the row without it.

Every row is the same model under another `Setting`; `ablations` says which. A row's steps are timed in turns with those
of the row that it is compared with, so that a machine that slows down slows both. Quality is measured beside the model
as it was loaded.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from dsv32_jax.common.progress import progress_bar
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.bench.timer import device_timer, summary
from dsv32_jax.experiments.results import environment, write_json
from dsv32_jax.experiments.workbench.ablations import YOURS, Row
from dsv32_jax.experiments.workbench.cost import Steps, Work, alternately, ratio
from dsv32_jax.experiments.workbench.quality import Reference, Texts
from dsv32_jax.experiments.workbench.settings import STORED, Setting, description, differences, in_scheme
from dsv32_jax.generate.compiling import all_at_once
from dsv32_jax.generate.language_model import LanguageModel

__all__ = ["ablate"]

PHASES = ("decode", "prompt")
NO_ROOM = "RESOURCE_EXHAUSTED"
"""What XLA's errors begin with where memory does not suffice."""

WeightsIn = Callable[[LanguageModel, str], LanguageModel]
"""Makes a model with its weights in another scheme, as `settings.in_scheme` does."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A row with its compiled steps, which rows to come are timed beside."""

    content: dict[str, Any]
    steps: Steps


class Bench:
    """What all rows share.

    Args:
      m: the model as it was loaded.
      texts: for the quality; None leaves it out.
      work: the steps that are timed.
      rounds: how often each is.
      weights_in: makes the weights of a scheme.
    """

    def __init__(self, m: LanguageModel, texts: Texts | None, work: Work, rounds: int, weights_in: WeightsIn):
        self.m, self.work, self.rounds, self.weights_in = m, work, rounds, weights_in
        self.timer, _ = device_timer()
        self.reference = None if texts is None else Reference(m, texts)
        self._other_weights: tuple[str, LanguageModel] | None = None
        self._qualities: dict[str, dict[str, Any]] = {}

    def model(self, setting: Setting) -> LanguageModel:
        """The model under a setting. Beside the stored weights it keeps those of one other scheme, the last."""
        if setting.scheme == STORED:
            return setting.applied_to_weights(self.m)
        if self._other_weights is None or self._other_weights[0] != setting.scheme:
            self._other_weights = None  # the memory may not hold two
            self._other_weights = (setting.scheme, self.weights_in(self.m, setting.scheme))
        return setting.applied_to_weights(self._other_weights[1])

    def quality(self, lm: LanguageModel, runs: dict[str, Any]) -> dict[str, Any] | None:
        """Of what a description says; the same computation is not done twice."""
        if self.reference is None:
            return None
        key = json.dumps({**runs, "blocks": None}, sort_keys=True)
        if key not in self._qualities:
            as_loaded = not differences({**runs, "blocks": None}, {**description(self.m), "blocks": None})
            self._qualities[key] = self.reference.measure(self.m if as_loaded else lm)
        return self._qualities[key]

    def measure(self, row: Row, number: int, before: Measured | None) -> Measured:
        """Compiles and measures a row, beside the one that it is compared with.

        Raises:
          UserError: the setting does not go with the model.
        """
        lm = self.model(row.setting)
        runs = description(lm, row.setting.contiguous)
        jobs: list[Callable[[], Any]] = [*Steps.jobs(lm, self.work, row.setting.contiguous)]
        jobs.append(partial(self.quality, lm, runs))
        decode, prompt, quality = all_at_once(jobs)
        steps = Steps.of(lm, decode, prompt)
        content: dict[str, Any] = {
            "number": number,
            "name": row.name,
            "group": row.group,
            "step": row.step,
            "against": None if before is None else before.content["number"],
            "changes": [] if before is None else differences(before.content["runs"], runs),
            "runs": runs,
            "seconds": {},
            "speedup": {},
            "memory": steps.memory(),
            "quality": quality,
        }
        for phase in PHASES:
            if before is None:
                continue
            pair = alternately(self.timer, [getattr(before.steps, phase), getattr(steps, phase)], self.rounds)
            content["speedup"][phase] = ratio(*pair)
            content["seconds"][phase] = summary(pair[1])
            before.content["seconds"].setdefault(phase, summary(pair[0]))
        return Measured(content, steps)

    def alone(self, row: Measured) -> None:
        """Times a row that no other is compared with."""
        for phase in PHASES:
            if phase not in row.content["seconds"]:
                (times,) = alternately(self.timer, [getattr(row.steps, phase)], self.rounds)
                row.content["seconds"][phase] = summary(times)


def ablate(
    m: LanguageModel,
    rows: Sequence[Row],
    texts: Texts | None,
    work: Work,
    rounds: int = 7,
    *,
    weights_in: WeightsIn = in_scheme,
    out: Path | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Measures every row.

    A row that does not go with the model, or has no room in memory, is left out, with the reason; those that were to be
    compared with it are compared with the one before it, if there is one. What the user named is refused instead.

    Args:
      m: the model as it was loaded.
      rows: of `ablations.plan`.
      texts: for the quality; None leaves it out.
      work: the steps that are timed.
      rounds: how often each is.
      weights_in: makes the weights of a scheme.
      out: a file to which the results are written after each row.
      more: what else the results shall say.

    Returns:
      JSON-able: the environment, `timer`, `work`, `texts`, `left_out` (the reason by row), and `rows`, each with
      `number`, `name`, `group`, `step` (see `ablations.Row`), `against` (the number of another row), `changes` (what it
      changes of that: one thing), `runs` (`settings.description`), `seconds` and `speedup` by phase ("decode",
      "prompt"), `memory` and `quality`.

    Raises:
      UserError: a setting that the user named does not go with the model.
    """
    bench = Bench(m, texts, work, rounds, weights_in)
    content: dict[str, Any] = {
        **environment(),
        **more,
        "timer": bench.timer.name,
        "work": vars(work),
        "texts": None if texts is None else texts.describe(),
        "left_out": dict(more.get("left_out", {})),
        "rows": [],
    }
    kept: dict[int, Measured] = {}
    failed: set[int] = set()

    def basis(number: int | None) -> int | None:
        """The row that one is compared with: the one before it, where that failed."""
        while number in failed:
            number = rows[number].against
        return number

    with progress_bar("measuring", len(rows), "rows") as advance:
        for number, row in enumerate(rows):
            before = basis(row.against)
            try:
                kept[number] = bench.measure(row, number, None if before is None else kept[before])
                content["rows"].append(kept[number].content)
            except (UserError, jax.errors.JaxRuntimeError) as error:
                reason = reason_of(error)
                baseline = row.against is None and isinstance(error, UserError)
                if reason is None or row.group == YOURS or baseline:
                    raise
                failed.add(number)
                content["left_out"][row.name] = reason
            needed = {basis(later.against) for later in rows[number + 1 :]}
            for done in [each for each in kept if each not in needed]:
                bench.alone(kept[done])
                del kept[done]  # its caches and programs
            if out is not None:
                write_json(out, content)
            advance(1)
    return content


def reason_of(error: Exception) -> str | None:
    """Why a row is left out; None for an error that is none of its own."""
    if isinstance(error, UserError):
        return str(error)
    return "no room in the device's memory" if NO_ROOM in str(error) else None
