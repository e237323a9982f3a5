"""What a step of a model costs in time and memory, beside the same step of another."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax

from dsv32_jax.errors import UserError
from dsv32_jax.experiments.bench import timer as timing
from dsv32_jax.experiments.workbench.steps import Step, StepShape
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.model.cache import BLOCK_SIZE, KVCache

__all__ = ["Steps", "Work", "alternately", "megabytes", "ratio"]

ON_CPU, ON_GPU = (1, 512, 128), (32, 8192, 2048)
"""Sequences of a decode step, tokens of a sequence, tokens of a prompt's step, by default. On a GPU, the scores of such
a prompt's step, all at once, still have room at full width."""


@dataclasses.dataclass(frozen=True)
class Work:
    """The steps that are timed.

    Attributes:
      sequences: of the decode step; the prompt's step is one sequence's.
      context: tokens of a sequence, a multiple of 64.
      prompt_tokens: of the prompt's step, its last ones.
    """

    sequences: int
    context: int
    prompt_tokens: int

    @staticmethod
    def of(
        m: LanguageModel, sequences: int | None = None, context: int | None = None, prompt_tokens: int | None = None
    ) -> "Work":
        """What is given, and else a size that this device and this model take.

        Raises:
          UserError: a number is out of range.
        """
        defaults = ON_CPU if jax.default_backend() == "cpu" else ON_GPU
        longest = m.config.max_position_embeddings // BLOCK_SIZE * BLOCK_SIZE
        context = min(defaults[1], longest) if context is None else context
        work = Work(
            defaults[0] if sequences is None else sequences,
            context,
            min(defaults[2], context) if prompt_tokens is None else prompt_tokens,
        )
        work.shape("decode", False)
        work.shape("prompt", False)
        if context > m.config.max_position_embeddings:
            raise UserError(
                f"context {context}: the model takes at most max_position_embeddings = "
                f"{m.config.max_position_embeddings}"
            )
        return work

    def shape(self, phase: str, contiguous: bool) -> StepShape:
        """Of the "decode" or the "prompt" step."""
        if phase == "decode":
            return StepShape(sequences=self.sequences, context=self.context, contiguous=contiguous)
        return StepShape(phase="prefill", context=self.context, tokens=self.prompt_tokens, contiguous=contiguous)


@dataclasses.dataclass(frozen=True)
class Steps:
    """The compiled steps of one model."""

    decode: Step
    prompt: Step
    cache_bytes_per_token: int

    @staticmethod
    def jobs(lm: LanguageModel, work: Work, contiguous: bool = False) -> list[Callable[[], Step]]:
        """What compiles the decode and the prompt step, for several threads."""
        lm.flat_model()  # once: the threads share it
        return [lambda phase=phase: Step(lm, work.shape(phase, contiguous)) for phase in ("decode", "prompt")]  # type: ignore[misc]

    @staticmethod
    def of(lm: LanguageModel, decode: Step, prompt: Step) -> "Steps":
        """Of what the jobs gave."""
        options = lm.options
        return Steps(decode, prompt, KVCache.bytes_per_token(lm.config, options.cache_form, options.act_quant))

    def memory(self) -> dict[str, int]:
        """Bytes of the weights, of a token in the cache, and of what each compiled step needs beside its arguments."""
        return {
            "weights": self.decode.memory["weights"],
            "cache_per_token": self.cache_bytes_per_token,
            "decode_workspace": self.decode.memory["temporary"],
            "prompt_workspace": self.prompt.memory["temporary"],
        }


def alternately(timer: timing.Timer, steps: Sequence[Step], rounds: int) -> list[list[float]]:
    """Seconds of each step in each round.

    The steps take turns, each round in the opposite order, so that a machine that slows down slows all of them.
    """
    times: list[list[float]] = [[] for _ in steps]
    for step in steps:
        jax.block_until_ready(step())
    for number in range(rounds):
        order = range(len(steps)) if number % 2 == 0 else reversed(range(len(steps)))
        for index in order:
            times[index].append(timer.once(steps[index], timing.MOST_SPIN))
    return times


def ratio(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """How many times as fast the second is, from rounds in which both ran.

    Returns:
      `median`, `min` and `max` over rounds, and `differs`: it is beyond the spread, as the same one was faster in every
      round and the middle halves of their times do not overlap. By chance the first alone happens in one of
      2^(rounds - 1) comparisons of equals.
    """
    ratios = [a / b for a, b in zip(before, after, strict=True)]
    low, high = min(ratios), max(ratios)
    (least, most), (own_least, own_most) = (timing.summary(list(times))["quartiles"] for times in (before, after))
    return {
        "median": statistics.median(ratios),
        "min": low,
        "max": high,
        "differs": (low > 1 and own_most < least) or (high < 1 and own_least > most),
    }


def megabytes(count: float) -> str:
    """A number of bytes for a table: MB of 10^6, three figures."""
    size = count / 1e6
    return f"{size:.{max(0, 2 - math.floor(math.log10(size)))}f}" if 0 < size < 100 else f"{size:,.0f}"
