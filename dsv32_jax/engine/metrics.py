"""Counts and latencies of an engine."""

import dataclasses
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv32_jax.engine.blocks import PoolStatistics
from dsv32_jax.engine.request import Request

__all__ = ["Metrics", "percentiles"]

LATEST = 100_000
"""Latencies of each kind over which percentiles are taken."""


@dataclasses.dataclass
class Latencies:
    """Latencies of one kind, in seconds.

    Attributes:
      count, total: their number since the start, and their sum.
      latest: the latest `LATEST` of them.
    """

    count: int = 0
    total: float = 0.0
    latest: deque[float] = dataclasses.field(default_factory=lambda: deque(maxlen=LATEST))

    def extend(self, seconds: Sequence[float]) -> None:
        """Adds some more."""
        self.count += len(seconds)
        self.total += sum(seconds)
        self.latest.extend(seconds)

    def summary(self) -> dict[str, float] | None:
        """`percentiles` of the latest, and `count` and `sum` of all; None where there are none."""
        latest = percentiles(self.latest)
        return latest and latest | {"count": self.count, "sum": self.total}


@dataclasses.dataclass
class Metrics:
    """Counts since the start, and latencies.

    Attributes:
      steps, step_tokens: the model's steps so far, and the tokens that they computed.
      prompt_tokens, cached_tokens: tokens of prompts that have begun, and those of them that were found in the cache.
      generated_tokens: tokens that were handed out.
      preemptions: times that a sequence had to give back its blocks.
      drafted_tokens, accepted_tokens: drafts that were tried, and those that were right, of an engine that speculates.
      finished: completions by `finish_reason`.
      queued: from a request's arrival to its first step.
      first_token: from its arrival to its first token.
      between_tokens: from one token of a completion to the next.
      started: `time.monotonic()` of the start.
    """

    steps: int = 0
    step_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    finished: Counter[str] = dataclasses.field(default_factory=Counter)
    queued: Latencies = dataclasses.field(default_factory=Latencies)
    first_token: Latencies = dataclasses.field(default_factory=Latencies)
    between_tokens: Latencies = dataclasses.field(default_factory=Latencies)
    started: float = dataclasses.field(default_factory=time.monotonic)

    def prompt_started(self, request: Request, cached: int) -> None:
        """Counts a request whose prompt goes into its first step."""
        self.prompt_tokens += len(request.prompt)
        self.cached_tokens += cached
        self.queued.extend([time.monotonic() - request.arrived])

    def tokens_generated(self, completions: list[list[float]]) -> None:
        """Counts one more token of each of these completions.

        Args:
          completions: when the tokens of each came, in seconds after its request, the new one's last.
        """
        self.generated_tokens += len(completions)
        self.first_token.extend([times[0] for times in completions if len(times) == 1])
        self.between_tokens.extend([times[-1] - times[-2] for times in completions if len(times) > 1])

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafts that were right."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else 0.0

    def summary(self, cache: PoolStatistics, running: int, waiting: int) -> dict[str, Any]:
        """Everything as plain numbers.

        Args:
          cache: the pool's statistics now.
          running, waiting: the number of such sequences now.
        """
        seconds = time.monotonic() - self.started
        return {
            "seconds": seconds,
            "steps": self.steps,
            "step_tokens": self.step_tokens,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "generated_tokens": self.generated_tokens,
            "generated_tokens_per_second": self.generated_tokens / seconds if seconds else 0.0,
            "preemptions": self.preemptions,
            "drafted_tokens": self.drafted_tokens,
            "accepted_tokens": self.accepted_tokens,
            "acceptance_rate": self.acceptance_rate,
            "finished": dict(self.finished),
            "running": running,
            "waiting": waiting,
            "queued_seconds": self.queued.summary(),
            "first_token_seconds": self.first_token.summary(),
            "between_tokens_seconds": self.between_tokens.summary(),
            "cache": {**dataclasses.asdict(cache), "hit_rate": cache.hit_rate},
        }


def percentiles(values: Any) -> dict[str, float] | None:
    """p50, p90 and p99 by linear interpolation, and the mean; None where there are no values."""
    if not len(values):
        return None
    array = np.fromiter(values, float)
    p50, p90, p99 = np.percentile(array, (50, 90, 99)).tolist()
    return {"p50": p50, "p90": p90, "p99": p99, "mean": float(array.mean())}
