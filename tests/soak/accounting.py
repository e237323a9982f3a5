"""Judges the requests of a soak, and counts those that were lost and blocks that leaked."""

import dataclasses
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from dsv32_jax.engine.metrics import percentiles
from dsv32_jax.errors import UserError

__all__ = ["DROPPED", "Answer", "Expected", "Gauges", "Ledger", "Outcome", "failures", "gauges", "judge"]

DROPPED = "dropped"
"""The status of a request whose client disconnected on purpose."""
LOST = "lost"
FINISHED = ("stop", "length")
"""Reasons for which a choice may end."""
MAX_REASONS = 20
"""The most lost requests whose reasons are listed."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer of the server: texts and finish reasons by choice, and the tokens of all choices."""

    texts: tuple[str, ...]
    reasons: tuple[str | None, ...]
    tokens: int | None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The end of a request.

    Attributes:
      status: of HTTP, `DROPPED`, or the name of the client's error.
      seconds: from its first byte to its end.
      answer: where there was one; None for a stream that did not come to its end.
      code: of the error, which a stream may have after status 200.
      message: of the error.
      retry_after: the header.
      first: seconds to a stream's first event.
    """

    status: str
    seconds: float
    answer: Answer | None = None
    code: str | None = None
    message: str = ""
    retry_after: str | None = None
    first: float | None = None


@dataclasses.dataclass(frozen=True)
class Expected:
    """The right outcomes of a request.

    Attributes:
      refusal: statuses of which it must get one; empty if it must be answered.
      choices: of the answer.
      answer: the server's answer without load; None if it is not known.
      tokens: of the answer, where they are certain.
      drops: whether its client may disconnect.
      queues: whether a full queue may refuse it.
    """

    refusal: frozenset[str] = frozenset()
    choices: int = 1
    answer: Answer | None = None
    tokens: int | None = None
    drops: bool = False
    queues: bool = True


def judge(outcome: Outcome, expected: Expected, deadline: float) -> tuple[str, str]:
    """The verdict "finished", "refused", "expired", "dropped" or "lost", and the reason if it is lost.

    Args:
      outcome: of a request.
      expected: its right outcomes.
      deadline: seconds, before which no request may expire.
    """
    if outcome.status == "429" and expected.queues:
        if (outcome.retry_after or "").isdigit():
            return "refused", ""
        return LOST, f"429 with Retry-After {outcome.retry_after!r}"
    if outcome.status in expected.refusal:
        return "refused", ""
    if expected.refusal:
        return LOST, f"{_description(outcome)}; must be {' or '.join(sorted(expected.refusal))}"
    if outcome.status == DROPPED and expected.drops:
        return "dropped", ""
    if outcome.code == "deadline_exceeded" and outcome.status in ("200", "504"):
        if outcome.seconds < deadline:
            return LOST, f"expired after {outcome.seconds:.2f} s; its deadline is {deadline:g} s"
        return "expired", ""
    if outcome.status != "200" or outcome.code:
        return LOST, _description(outcome)
    return _judge_answer(outcome.answer, expected)


def _judge_answer(answer: Answer | None, expected: Expected) -> tuple[str, str]:
    if answer is None:
        return LOST, "a stream that ended before its end"
    if len(answer.texts) != expected.choices:
        return LOST, f"{len(answer.texts)} choices; must be {expected.choices}"
    if bad := [reason for reason in answer.reasons if reason not in FINISHED]:
        return LOST, f"finish_reason {bad[0]!r}"
    if expected.tokens is not None and answer.tokens != expected.tokens:
        return LOST, f"{answer.tokens} tokens; must be {expected.tokens}"
    if expected.answer is not None and answer != expected.answer:
        return LOST, f"other than alone: {answer}; alone {expected.answer}"
    return "finished", ""


def _description(outcome: Outcome) -> str:
    return " ".join(filter(None, (f"status {outcome.status}", outcome.code, outcome.message)))


class Ledger:
    """The account of all requests; any thread may add to it.

    Args:
      deadline: seconds, of every request.
    """

    def __init__(self, deadline: float):
        self.deadline = deadline
        self.verdicts: Counter[str] = Counter()
        self.reasons: list[str] = []
        self._statuses: dict[str, Counter[str]] = {}
        self._seconds: dict[str, list[float]] = {}
        self._first: list[float] = []
        self._lock = threading.Lock()

    def add(self, kind: str, outcome: Outcome, expected: Expected) -> str:
        """Judges a request; returns the verdict."""
        verdict, reason = judge(outcome, expected, self.deadline)
        with self._lock:
            status = f"{outcome.status} {outcome.code}" if outcome.status == "200" and outcome.code else outcome.status
            self._statuses.setdefault(kind, Counter())[status] += 1
            self.verdicts[verdict] += 1
            if verdict == LOST and len(self.reasons) < MAX_REASONS:
                self.reasons.append(f"{kind}: {reason}"[:600])
            if verdict == "finished":
                self._seconds.setdefault(kind.partition(",")[0], []).append(outcome.seconds)
                if outcome.first is not None:
                    self._first.append(outcome.first)
        return verdict

    @property
    def lost(self) -> int:
        """Requests that were lost."""
        return self.verdicts[LOST]

    def summary(self) -> dict[str, Any]:
        """Everything as plain numbers."""
        with self._lock:
            every = [value for seconds in self._seconds.values() for value in seconds]
            return {
                "requests": sum(self.verdicts.values()),
                "verdicts": dict(sorted(self.verdicts.items())),
                "lost": self.lost,
                "lost_because": list(self.reasons),
                "statuses": {kind: dict(sorted(counts.items())) for kind, counts in sorted(self._statuses.items())},
                "finished_seconds": {
                    "all": percentiles(every),
                    **{kind: percentiles(seconds) for kind, seconds in sorted(self._seconds.items())},
                },
                "first_event_seconds": percentiles(self._first),
            }


@dataclasses.dataclass(frozen=True)
class Gauges:
    """The values of `/metrics`: queues and blocks now, and counts so far."""

    running: int
    waiting: int
    in_use: int
    cached: int
    free: int
    steps: int
    generated_tokens: int
    preemptions: int
    evictions: int
    tokens_asked: int
    tokens_found: int
    failed_steps: int

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits, and no block is in use."""
        return not (self.running or self.waiting or self.in_use)

    def since(self, earlier: "Gauges") -> dict[str, Any]:
        """The changes of the counts since an earlier moment, and the hit rate between."""
        counts = ("steps", "generated_tokens", "preemptions", "evictions", "tokens_asked", "tokens_found")
        changes: dict[str, Any] = {name: getattr(self, name) - getattr(earlier, name) for name in counts}
        changes["hit_rate"] = changes["tokens_found"] / changes["tokens_asked"] if changes["tokens_asked"] else 0.0
        return changes


SAMPLES = {
    "running": "dsv32_sequences_running",
    "waiting": "dsv32_sequences_waiting",
    "in_use": 'dsv32_cache_blocks{state="in_use"}',
    "cached": 'dsv32_cache_blocks{state="cached"}',
    "free": 'dsv32_cache_blocks{state="free"}',
    "steps": "dsv32_steps_total",
    "generated_tokens": "dsv32_generated_tokens_total",
    "preemptions": "dsv32_preemptions_total",
    "evictions": "dsv32_cache_evictions_total",
    "tokens_asked": "dsv32_cache_tokens_asked_total",
    "tokens_found": "dsv32_cache_tokens_found_total",
    "failed_steps": "dsv32_failed_steps_total",
}


def gauges(text: str) -> Gauges:
    """Reads the gauges from Prometheus' text format.

    Raises:
      UserError: a sample is missing, or the text has another format.
    """
    try:
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    except ValueError as error:
        raise UserError(f"/metrics: not Prometheus' text format: {error}") from error
    values = {}
    for sample in samples:
        labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
        values[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    for name in SAMPLES.values():
        if name not in values:
            raise UserError(f"/metrics: {name} is missing")
    return Gauges(**{field: int(values[name]) for field, name in SAMPLES.items()})


def failures(result: Mapping[str, Any]) -> list[str]:
    """The reasons why a soak has failed, one line each; empty if it has not."""
    reasons = []
    if result["died"]:
        reasons.append(f"the server died, exit code {result['exit_code']}")
    if result["lost"]:
        reasons.append(f"{result['lost']} requests lost")
    if result["leaked"] is None:
        reasons.append("the blocks in use at the end are not known")
    elif result["leaked"]:
        reasons.append(f"{result['leaked']} blocks leaked")
    if result["stuck"]:
        reasons.append(f"{result['stuck']} sequences still run or wait")
    if result["failed_steps"]:
        reasons.append(f"{result['failed_steps']} steps failed")
    if not result["verdicts"].get("finished"):
        reasons.append("no request was answered")
    if not result["answers_at_the_end"]:
        reasons.append("the last request was not answered")
    if result["exit_code"] != 0 and not result["died"]:
        code = result["exit_code"]
        reasons.append("the server did not end after SIGTERM" if code is None else f"exit code {code} after SIGTERM")
    return reasons
