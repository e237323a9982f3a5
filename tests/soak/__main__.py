"""A soak of `dsv32 serve`: python -m tests.soak

For a bounded time, a real server with a small cache and a short queue gets right requests, wrong requests, requests
whose clients disconnect, and floods of them. Every request is accounted for. One that was neither refused nor dropped
by its client must end with a finish_reason, or at its deadline; its answer must be the same as without load, where that
is known. Afterwards no block may be in use. Exit code 1: a request was lost, a block leaked, or the server died.
"""

import dataclasses
import random
import secrets
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dsv32_jax.engine.metrics import percentiles
from dsv32_jax.errors import UserError
from dsv32_jax.experiments import command_line
from dsv32_jax.experiments.results import RESULTS, environment, write_json
from tests.soak.accounting import Answer, Gauges, Ledger, failures, gauges, judge
from tests.soak.client import SLACK_SECONDS, Client
from tests.soak.server import SHOWN, Process
from tests.soak.traffic import MODEL, WORDS, Question, Sizes, Traffic, questions

RESULT = RESULTS / "soak.json"
START_SECONDS = 900.0
"""How long the server may compile its steps."""
PROBE_SECONDS = 0.2
PROBE_PATIENCE = 5.0
"""After which a probe counts as not answered."""
DRAIN_SECONDS = 30.0
END_SECONDS = DRAIN_SECONDS + 30.0
"""From SIGTERM: the drain, and what connections and the engine's thread get after it."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a soak and its server; see the flags.

    Raises:
      UserError: naming the flag.
    """

    model: str = "demo"
    seconds: float = 60.0
    clients: int = 8
    seed: int = 0
    cache_tokens: int = 512
    max_queue: int = 6
    max_sequences: int = 6
    max_step_tokens: int = 32
    max_body_bytes: int = 64 * 1024
    deadline: float = 30.0

    def __post_init__(self) -> None:
        for name in ("seconds", "deadline"):
            if not 0 < getattr(self, name) <= 24 * 3600:
                raise UserError(f"--{name}: {getattr(self, name)}; must be above 0, and no more than a day")
        for name, low, high in (("clients", 1, 256), ("max_sequences", 3, 64), ("max_queue", 2, 64)):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"--{name.replace('_', '-')}: {getattr(self, name)}; must be in {low}..{high}")

    @property
    def flags(self) -> list[str]:
        """The flags of `dsv32 serve`."""
        names = ("cache_tokens", "max_queue", "max_sequences", "max_step_tokens", "max_body_bytes", "deadline")
        pairs = [(f"--{name.replace('_', '-')}", str(getattr(self, name))) for name in names]
        pairs += [("--model", self.model), ("--name", MODEL), ("--drain-seconds", str(DRAIN_SECONDS))]
        return [word for pair in pairs for word in pair]


class Prober:
    """Requests /health and /metrics again and again."""

    def __init__(self, client: Client):
        self.answered = 0
        self.failed: list[str] = []
        self.seconds: list[float] = []
        self._client, self._ended = client, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Prober":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(PROBE_SECONDS):
            for path in ("/health", "/metrics"):
                started = time.monotonic()
                try:
                    status = str(self._client.get(path, PROBE_PATIENCE).status_code)
                except Exception as error:  # whatever it is, there was no answer
                    status = type(error).__name__
                self.seconds.append(time.monotonic() - started)
                if status == "200":
                    self.answered += 1
                else:
                    self.failed.append(f"{path}: {status}")

    def summary(self) -> dict[str, Any]:
        """Counts, the share that was answered 200, and the times."""
        count = len(self.seconds)
        return {
            "count": count,
            "availability": self.answered / count if count else None,
            "failed": self.failed[:20],
            "seconds": percentiles(self.seconds),
            "slowest_seconds": max(self.seconds, default=None),
        }


def wait_ready(server: Process, client: Client) -> None:
    """Waits until the server takes requests; raises `UserError` if it ends, or is not ready in time."""
    end = time.monotonic() + START_SECONDS
    while client_status(client, "/health/ready") != "200":
        if not server.alive:
            raise UserError(
                server.with_output(f"the server ended with exit code {server.exit_code} before it was ready")
            )
        if time.monotonic() > end:
            raise UserError(server.with_output(f"the server is not ready after {START_SECONDS:g} s"))
        time.sleep(0.2)


def client_status(client: Client, path: str) -> str:
    """The status of a GET, or the name of the error."""
    try:
        return str(client.get(path, PROBE_PATIENCE).status_code)
    except Exception as error:
        return type(error).__name__


def read_gauges(client: Client) -> Gauges:
    """The gauges of the server now; raises `UserError`, and httpx2's errors."""
    return gauges(client.get("/metrics", PROBE_PATIENCE).text)


def ask_alone(client: Client, ledger: Ledger, settings: Settings) -> tuple[Sizes, list[tuple[Question, Answer]]]:
    """Sends every question twice, one at a time, for its answer without load, and every wrong request once.

    The second time, the prompt may be in the cache, which must change nothing. The second requests and the wrong ones
    are entered into the ledger; a full queue can refuse none of them now.

    Raises:
      UserError: a question was not answered at all.
    """
    words = WORDS * 2
    body = {"model": MODEL, "prompt": " ".join(words), "max_tokens": 1}
    response = client.post("/v1/completions", body)
    if response.status_code != 200:
        raise UserError(f"the first request: status {response.status_code} {response.text[:300]}")
    words_per_token = len(words) / response.json()["usage"]["prompt_tokens"]
    sizes = Sizes(
        settings.cache_tokens,
        words_per_token,
        settings.max_sequences,
        settings.max_queue,
        settings.max_body_bytes,
    )
    known = []
    for question in questions(sizes, random.Random(settings.seed)):
        call = question.call(None)
        outcome = client.send(call)
        verdict, reason = judge(outcome, call.expected, settings.deadline)
        if verdict != "finished" or outcome.answer is None:
            raise UserError(f"the question {question.kind!r}, alone: {verdict}: {reason or outcome.message}")
        known.append((question, outcome.answer))
        again = question.call(outcome.answer, kind="alone again")
        ledger.add(again.kind, client.send(again), again.expected)
    for call in Traffic(sizes, known, random.Random(settings.seed)).refusals():
        ledger.add(call.kind, client.send(call), dataclasses.replace(call.expected, queues=False))
    return sizes, known


class Load:
    """Clients in threads, which run until `ended` is set.

    Args:
      address, key: of the server.
      settings: of the soak.
      ledger: gets every request.
      sizes, known: of `ask_alone`.
    """

    def __init__(
        self,
        address: str,
        key: str,
        settings: Settings,
        ledger: Ledger,
        sizes: Sizes,
        known: list[tuple[Question, Answer]],
    ):
        self.ended = threading.Event()
        self.errors: list[str] = []
        self._address, self._key, self._settings, self._ledger = address, key, settings, ledger
        self._sizes, self._known = sizes, known
        self._flood = threading.Lock()
        self._threads = [
            threading.Thread(target=self._guarded, args=(number,), daemon=True) for number in range(settings.clients)
        ]

    def run(self, server: Process) -> int:
        """Runs for the soak's seconds, or until the server dies; returns the number of clients that did not end."""
        for thread in self._threads:
            thread.start()
        end = time.monotonic() + self._settings.seconds
        while time.monotonic() < end and server.alive:
            time.sleep(0.1)
        self.ended.set()
        end = time.monotonic() + self._settings.deadline + 2 * SLACK_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return sum(thread.is_alive() for thread in self._threads)

    def _guarded(self, number: int) -> None:
        try:
            self._client(number)
        except Exception as error:  # an answer that this program does not understand, for instance
            self.errors.append(f"client {number}: {type(error).__name__}: {error}")

    def _client(self, number: int) -> None:
        rng = random.Random(self._settings.seed * 1000 + number + 1)
        traffic = Traffic(self._sizes, self._known, rng)
        with (
            Client(self._address, self._key, self._settings.deadline) as client,
            ThreadPoolExecutor(self._sizes.burst) as pool,
        ):
            while not self.ended.is_set():
                calls = traffic.draw()
                if len(calls) > 1 and not self._flood.acquire(blocking=False):
                    calls = calls[:1]  # one flood at a time is enough
                try:
                    outcomes = list(pool.map(client.send, calls)) if len(calls) > 1 else [client.send(calls[0])]
                finally:
                    if len(calls) > 1:
                        self._flood.release()
                for call, outcome in zip(calls, outcomes, strict=True):
                    self._ledger.add(call.kind, outcome, call.expected)
                if outcomes[-1].status == "429":
                    self.ended.wait(rng.uniform(0.2, 1.0))


def wait_idle(server: Process, client: Client, seconds: float) -> Gauges | None:
    """The gauges when nothing runs, or when time is up; None if the server did not send them."""
    latest, end = None, time.monotonic() + seconds
    while server.alive and time.monotonic() < end and not (latest and latest.idle):
        try:
            latest = read_gauges(client)
        except Exception:  # busy or dead: the next look tells
            latest = None
        time.sleep(0.1)
    return latest


def end_in_a_stream(server: Process, client: Client, known: list[tuple[Question, Answer]], ledger: Ledger) -> None:
    """Sends SIGTERM while a request runs, which must still be answered."""
    question, answer = max(known, key=lambda each: each[1].tokens or 0)
    call = question.call(answer, stream=True, kind="at SIGTERM")
    accepted = threading.Event()
    # It is accepted before the signal: a request that comes during a drain is rightly refused.
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(client.send, call, accepted.set)
        sending.add_done_callback(lambda _: accepted.set())
        accepted.wait()
        server.terminate()
        ledger.add(call.kind, sending.result(), call.expected)


def soak(settings: Settings, say: Any = print) -> dict[str, Any]:
    """Runs a soak; returns the result.

    Raises:
      UserError: the server does not start, or does not answer before the load.
    """
    key = secrets.token_hex(16)
    ledger = Ledger(settings.deadline)
    result: dict[str, Any] = {"settings": dataclasses.asdict(settings)}
    started = time.monotonic()
    with Process(settings.flags, key) as server:
        server.listen(START_SECONDS)
        with Client(server.address, key, settings.deadline) as client:
            wait_ready(server, client)
            result["start_seconds"] = time.monotonic() - started
            say(f"{settings.model} is ready after {result['start_seconds']:.0f} s")
            sizes, known = ask_alone(client, ledger, settings)
            say(f"{len(known)} questions answered alone; {settings.clients} clients for {settings.seconds:g} s")
            before, loaded = read_gauges(client), time.monotonic()
            load = Load(server.address, key, settings, ledger, sizes, known)
            with Prober(client) as prober:
                unfinished = load.run(server)
            result["load_seconds"] = time.monotonic() - loaded
            result["probes"] = prober.summary()
            after = wait_idle(server, client, settings.deadline + SLACK_SECONDS)
            result["under_load"] = after.since(before) if after else None
            result["blocks_at_the_end"] = (
                {name: getattr(after, name) for name in ("in_use", "cached", "free")} if after else None
            )
            result["leaked"] = after.in_use if after else None
            result["stuck"] = after.running + after.waiting if after else 0
            result["failed_steps"] = after.failed_steps if after else 0
            result["answers_at_the_end"] = False
            if server.alive:
                question, answer = known[0]
                call = question.call(answer, kind="after the load")
                result["answers_at_the_end"] = ledger.add(call.kind, client.send(call), call.expected) == "finished"
            result["died"] = not server.alive
            ended = time.monotonic()
            if server.alive:
                end_in_a_stream(server, client, known, ledger)
            result["exit_code"] = server.end(END_SECONDS)
            result["end_seconds"] = time.monotonic() - ended
        lines = [line for line in server.output() if not line.startswith("serving ")]
        result |= ledger.summary()
        result["lost"] += unfinished + len(load.errors)
        result["lost_because"] += load.errors + ["a client whose request never ended"] * unfinished
        result["server_log"] = lines[-40:]
    result["failures"] = failures(result)
    return {**environment(), **result}


def report(result: dict[str, Any]) -> str:
    """The summary, in a few lines."""
    verdicts = ", ".join(f"{count} {name}" for name, count in result["verdicts"].items())
    probes, load = result["probes"], result["under_load"] or {}
    seconds = result["finished_seconds"]["all"] or {}
    lines = [
        f"{result['requests']} requests: {verdicts}; lost {result['lost']}, blocks leaked {result['leaked']}",
        f"health: {probes['count']} probes, available {probes['availability'] or 0:.2%}",
        f"under load: {load.get('preemptions')} preemptions, {load.get('evictions')} evictions, "
        f"hit rate {load.get('hit_rate', 0):.1%}, {load.get('generated_tokens')} tokens",
        f"seconds of a finished request: p50 {seconds.get('p50', 0):.2f}, p99 {seconds.get('p99', 0):.2f}",
        f"exit code {result['exit_code']} {result['end_seconds']:.1f} s after SIGTERM",
        *(f"LOST: {reason}" for reason in result["lost_because"]),
        *(f"log: {line}" for line in result["server_log"][-SHOWN:]),
        *(f"FAILED: {reason}" for reason in result["failures"]),
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    default = Settings()
    parser = command_line.parser(__doc__)
    parser.add_argument("--model", default=default.model, help="a checkpoint with a tokenizer, or demo")
    parser.add_argument("--seconds", type=float, default=default.seconds, help="of the load, after the warm-up")
    parser.add_argument("--clients", type=int, default=default.clients)
    parser.add_argument("--seed", type=int, default=default.seed, help="of what the clients ask for")
    parser.add_argument(
        "--cache-tokens", type=int, default=default.cache_tokens, help="few, so that there is too little"
    )
    parser.add_argument("--max-queue", type=int, default=default.max_queue)
    parser.add_argument("--max-sequences", type=int, default=default.max_sequences)
    parser.add_argument("--max-step-tokens", type=int, default=default.max_step_tokens)
    parser.add_argument("--deadline", type=float, default=default.deadline, help="seconds; long requests run into it")
    parser.add_argument("--out", type=Path, default=RESULT)
    try:
        arguments = vars(parser.parse_args(argv))
        out: Path = arguments.pop("out")
        result = soak(Settings(**arguments), say=lambda line: print(line, flush=True))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_json(out, result)
    print(report(result), flush=True)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    command_line.run(main)
