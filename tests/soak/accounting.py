"""What counts as lost and as leaked."""

import dataclasses
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from dsv32_jax.engine.metrics import percentiles
from dsv32_jax.errors import UserError

__all__ = ["DROPPED", "Answer", "Gauges", "Ledger", "Outcome", "Wanted", "failures", "gauges", "judge"]

DROPPED = "dropped"
"""The status of a request whose client went away, as it meant to."""
LOST = "lost"
FINISHED = ("stop", "length")
"""Reasons for which a choice may end."""
MOST_REASONS = 20
"""Lost requests that are told of one by one."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a server said: texts and finish reasons by choice, and the tokens of all choices."""

    texts: tuple[str, ...]
    reasons: tuple[str | None, ...]
    tokens: int | None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a request ended.

    Attributes:
      status: of HTTP, `DROPPED`, or the name of the client's error.
      seconds: from its first byte to its end.
      answer: where there was one; None of a stream that did not come to its end.
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
class Wanted:
    """What is right for a request.

    Attributes:
      refusal: statuses of which it must get one; empty: it must be answered.
      choices: of the answer.
      answer: what the server said when it had nothing else to do; None: nobody asked it then.
      tokens: of the answer, where they are certain.
      drops: its client may go away.
      queues: a full queue may refuse it.
    """

    refusal: frozenset[str] = frozenset()
    choices: int = 1
    answer: Answer | None = None
    tokens: int | None = None
    drops: bool = False
    queues: bool = True


def judge(outcome: Outcome, wanted: Wanted, deadline: float) -> tuple[str, str]:
    """ "finished", "refused", "expired", "dropped" or "lost", and of a lost one why.

    Args:
      outcome: of a request.
      wanted: what would be right.
      deadline: seconds, before which no request may expire.
    """
    if outcome.status == "429" and wanted.queues:
        if (outcome.retry_after or "").isdigit():
            return "refused", ""
        return LOST, f"429 with Retry-After {outcome.retry_after!r}"
    if outcome.status in wanted.refusal:
        return "refused", ""
    if wanted.refusal:
        return LOST, f"{_said(outcome)}; must be {' or '.join(sorted(wanted.refusal))}"
    if outcome.status == DROPPED and wanted.drops:
        return "dropped", ""
    if outcome.code == "deadline_exceeded" and outcome.status in ("200", "504"):
        if outcome.seconds < deadline:
            return LOST, f"expired after {outcome.seconds:.2f} s; its deadline is {deadline:g} s"
        return "expired", ""
    if outcome.status != "200" or outcome.code:
        return LOST, _said(outcome)
    return _judge_answer(outcome.answer, wanted)


def _judge_answer(answer: Answer | None, wanted: Wanted) -> tuple[str, str]:
    if answer is None:
        return LOST, "a stream that ended before its end"
    if len(answer.texts) != wanted.choices:
        return LOST, f"{len(answer.texts)} choices; must be {wanted.choices}"
    if bad := [reason for reason in answer.reasons if reason not in FINISHED]:
        return LOST, f"finish_reason {bad[0]!r}"
    if wanted.tokens is not None and answer.tokens != wanted.tokens:
        return LOST, f"{answer.tokens} tokens; must be {wanted.tokens}"
    if wanted.answer is not None and answer != wanted.answer:
        return LOST, f"other than alone: {answer}; alone {wanted.answer}"
    return "finished", ""


def _said(outcome: Outcome) -> str:
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

    def add(self, kind: str, outcome: Outcome, wanted: Wanted) -> str:
        """Judges a request; returns the verdict."""
        verdict, why = judge(outcome, wanted, self.deadline)
        with self._lock:
            status = f"{outcome.status} {outcome.code}" if outcome.status == "200" and outcome.code else outcome.status
            self._statuses.setdefault(kind, Counter())[status] += 1
            self.verdicts[verdict] += 1
            if verdict == LOST and len(self.reasons) < MOST_REASONS:
                self.reasons.append(f"{kind}: {why}"[:600])
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
            every = [seconds for found in self._seconds.values() for seconds in found]
            return {
                "requests": sum(self.verdicts.values()),
                "verdicts": dict(sorted(self.verdicts.items())),
                "lost": self.lost,
                "lost_because": list(self.reasons),
                "statuses": {kind: dict(sorted(found.items())) for kind, found in sorted(self._statuses.items())},
                "finished_seconds": {
                    "all": percentiles(every),
                    **{kind: percentiles(found) for kind, found in sorted(self._seconds.items())},
                },
                "first_event_seconds": percentiles(self._first),
            }


@dataclasses.dataclass(frozen=True)
class Gauges:
    """What `/metrics` said: queues and blocks now, and counts so far."""

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
        """Nothing runs or waits, and no block is held."""
        return not (self.running or self.waiting or self.in_use)

    def since(self, earlier: "Gauges") -> dict[str, Any]:
        """What happened between two moments."""
        counts = ("steps", "generated_tokens", "preemptions", "evictions", "tokens_asked", "tokens_found")
        found: dict[str, Any] = {name: getattr(self, name) - getattr(earlier, name) for name in counts}
        found["hit_rate"] = found["tokens_found"] / found["tokens_asked"] if found["tokens_asked"] else 0.0
        return found


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
    """Of Prometheus' text format.

    Raises:
      UserError: a sample is missing, or this is no such text.
    """
    try:
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    except ValueError as error:
        raise UserError(f"/metrics: not Prometheus' text format: {error}") from error
    found = {}
    for sample in samples:
        labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
        found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    for name in SAMPLES.values():
        if name not in found:
            raise UserError(f"/metrics: {name} is missing")
    return Gauges(**{field: int(found[name]) for field, name in SAMPLES.items()})


def failures(result: Mapping[str, Any]) -> list[str]:
    """Why a soak has failed, one line each; empty: it has not."""
    found = []
    if result["died"]:
        found.append(f"the server died, exit code {result['exit_code']}")
    if result["lost"]:
        found.append(f"{result['lost']} requests lost")
    if result["leaked"] is None:
        found.append("the blocks in use at the end are not known")
    elif result["leaked"]:
        found.append(f"{result['leaked']} blocks leaked")
    if result["stuck"]:
        found.append(f"{result['stuck']} sequences still run or wait")
    if result["failed_steps"]:
        found.append(f"{result['failed_steps']} steps failed")
    if not result["verdicts"].get("finished"):
        found.append("no request was answered")
    if not result["answers_at_the_end"]:
        found.append("the last request was not answered")
    if result["exit_code"] != 0 and not result["died"]:
        code = result["exit_code"]
        found.append("the server did not end after SIGTERM" if code is None else f"exit code {code} after SIGTERM")
    return found
