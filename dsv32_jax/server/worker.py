"""The thread that owns the engine. Nothing else calls JAX.

Commands reach it as functions in a queue, which it runs between two steps. It sends its items to the event loop once
after each step. No request can end the thread.
"""

import asyncio
import dataclasses
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from dsv32_jax.engine.engine import Engine
from dsv32_jax.engine.request import Event, LogProbs, Request
from dsv32_jax.errors import UserError
from dsv32_jax.server.api_request import ApiRequest
from dsv32_jax.server.errors import ApiError, failed, from_user_error

__all__ = ["Accepted", "Job", "Piece", "Usage", "Worker"]

SUMMARY_SECONDS = 2.0
"""How long a summary waits for the thread, which may compile a step; then the previous summary is used."""
FAILED_STEP_SECONDS = 0.1
"""Pause after a step that failed, so that an engine that always fails does not fill processor and log."""

logger = logging.getLogger("dsv32_jax.server")


class Accepted(NamedTuple):
    """The engine has taken a job's prompts."""


class Began(NamedTuple):
    """One of a job's prompts has gone into its first step."""


class Piece(NamedTuple):
    """A token of one choice; `text` may be empty, `finish_reason` is that of the choice's last token, None before."""

    choice: int
    token: int
    text: str
    logprobs: LogProbs | None
    finish_reason: str | None


class Usage(NamedTuple):
    """The last item of a job whose choices have all ended."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


Item = Accepted | Began | Piece | Usage | ApiError


@dataclasses.dataclass(eq=False)
class Job:
    """A client's request in the worker.

    Attributes:
      api_request: the request, checked.
      deadline: by the worker's clock.
      items: for the event loop: `Accepted`, `Piece`s, and `Usage` or `ApiError` as the last.
      waiting: prompts that have not begun; only the event loop uses it.
      engine_requests: one for each prompt; only the thread uses them, and `sent`.
      sent: pieces so far, by choice.
    """

    api_request: ApiRequest
    deadline: float
    items: asyncio.Queue[Item] = dataclasses.field(default_factory=asyncio.Queue)
    waiting: int = 0
    engine_requests: list[Request] = dataclasses.field(default_factory=list)
    sent: Counter[int] = dataclasses.field(default_factory=Counter)


class Worker:
    """Runs an engine for an event loop.

    Args:
      engine: nobody else may use it from `start` to `stop`.
      max_queue: the most prompts that wait.
      deadline: seconds that a job may take.
      warmup: whether the engine is warmed up before the worker is ready.
      clock: returns seconds.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_queue: int,
        deadline: float,
        warmup: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.engine = engine
        self.max_queue = max_queue
        self.deadline = deadline
        self.warmup = warmup
        self.clock = clock
        self.ready = False
        self.queued = 0
        self.failed_steps = 0
        self._ended_with_error = engine.metrics.finished["error"]
        self._summary = engine.summary()
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._outbox: list[tuple[Job, Item]] = []
        self._jobs: dict[Job, int] = {}  # used by the thread; the number of prompts that have begun
        self._job_of: dict[Request, Job] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._main, name="dsv32-engine", daemon=True)

    # ---- for the event loop ----

    def start(self) -> None:
        """Starts the thread, which warms the engine up, if `warmup` says so, and then runs it."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def check_room(self, prompts: int) -> None:
        """Raises `ApiError` 429 if there is no room for so many more prompts to wait."""
        if prompts > self.max_queue:
            raise ApiError(400, f"prompt: {prompts} of them; at most {self.max_queue} can wait here", param="prompt")
        if self.queued + prompts > self.max_queue:
            message = f"{self.queued} prompts wait already, at most {self.max_queue} can; try again later"
            raise ApiError(429, message, code="queue_full", headers={"retry-after": "1"})

    def submit(self, request: ApiRequest) -> Job:
        """Queues a job; raises `ApiError` 429 if there is no room."""
        self.check_room(len(request.prompts))
        job = Job(request, self.clock() + self.deadline, waiting=len(request.prompts))
        self.queued += job.waiting
        self._inbox.put(partial(self._add, job))
        return job

    def cancel(self, job: Job) -> None:
        """Ends a job whose client has gone; its blocks are free before the next step. It may have ended already."""
        self._inbox.put(partial(self._fail, job, ApiError(499, "cancelled")))

    def end_all(self, error: ApiError) -> None:
        """Ends every job."""
        self._inbox.put(partial(self._fail_all, error))

    async def summary(self) -> dict[str, Any]:
        """`Engine.summary`, or the previous one where the thread is busy for too long."""
        if self.ready and self.alive:
            future: Future[dict[str, Any]] = Future()
            self._inbox.put(partial(self._summarise, future))
            try:
                self._summary = await asyncio.wait_for(asyncio.wrap_future(future), SUMMARY_SECONDS)
            except TimeoutError:
                pass
        return self._summary

    def stop(self, seconds: float) -> bool:
        """Ends all jobs and the thread; returns whether it ended in time. May be called from any thread."""
        self._inbox.put(self._stop)
        if self._thread.ident is not None:
            self._thread.join(seconds)
        return not self.alive

    def _deliver(self, items: list[tuple[Job, Item]]) -> None:
        for job, item in items:
            no_longer_waiting = int(isinstance(item, Began))
            if isinstance(item, Usage | ApiError):
                no_longer_waiting = job.waiting
            job.waiting -= no_longer_waiting
            self.queued -= no_longer_waiting
            if not isinstance(item, Began):
                job.items.put_nowait(item)

    def _set_ready(self) -> None:
        self.ready = True

    # ---- the thread ----

    def _main(self) -> None:
        try:
            if self.warmup:
                self.engine.warmup()
            self._call_in_loop(self._set_ready)
            while not self._stopping:
                self._run_commands(wait=not self.engine.busy)
                self._expire()
                if self.engine.busy:
                    self._step()
                self._flush()
        except Exception:
            logger.critical("the engine's thread has ended", exc_info=True)
        finally:
            self._run_commands(wait=False)
            self._fail_all(ApiError(503, "the server has stopped", code="stopped"))
            self._flush()

    def _run_commands(self, wait: bool) -> None:
        """Runs all commands of the queue; with `wait` at least one, for which it waits."""
        while True:
            try:
                command = self._inbox.get(block=wait)
            except Empty:
                return
            wait = False
            try:
                command()
            except Exception:
                logger.exception("a command failed")

    def _add(self, job: Job) -> None:
        self._jobs[job] = 0
        try:
            for ids in job.api_request.prompts:
                request = self.engine.add(ids, job.api_request.params, salt=job.api_request.salt)
                job.engine_requests.append(request)
                self._job_of[request] = job
        except UserError as error:
            self._fail(job, from_user_error(error, job.api_request.names))
        except Exception:
            logger.exception("a request could not be added")
            self._fail(job, failed())
        else:
            self._outbox.append((job, Accepted()))

    def _step(self) -> None:
        try:
            events = self.engine.step()
        except Exception:
            logger.exception("a step failed; its requests end")
            self.failed_steps += 1
            self._fail_all(failed())
            time.sleep(FAILED_STEP_SECONDS)
            return
        for job, begun_before in self._jobs.items():
            if begun_before < len(job.engine_requests):
                self._jobs[job] = sum(request.cached_tokens is not None for request in job.engine_requests)
                self._outbox += [(job, Began())] * (self._jobs[job] - begun_before)
        for event in events:
            self._send_piece(self._job_of[event.request], event)
        if self.engine.metrics.finished["error"] != self._ended_with_error:
            self._ended_with_error = self.engine.metrics.finished["error"]
            for job in list(self._jobs):
                if any(completion.error for request in job.engine_requests for completion in request.completions):
                    self._fail(job, failed())  # the engine's log says why

    def _send_piece(self, job: Job, event: Event) -> None:
        """Sends a token to the event loop; a step may have several of one choice."""
        choice = job.engine_requests.index(event.request) * job.api_request.params.n + event.index
        completion = event.request.completions[event.index]
        index = job.sent[choice]
        job.sent[choice] += 1
        logprobs = completion.logprobs[index] if completion.logprobs else None
        last = completion.finish_reason is not None and job.sent[choice] == len(completion.tokens)
        piece = Piece(choice, event.token, event.text, logprobs, completion.finish_reason if last else None)
        self._outbox.append((job, piece))
        if all(request.finished for request in job.engine_requests) and job.sent.total() == _tokens(job):
            self._close(job)
            prompt_tokens = sum(len(request.prompt) for request in job.engine_requests)
            cached_tokens = sum(request.cached_tokens or 0 for request in job.engine_requests)
            self._outbox.append((job, Usage(prompt_tokens, _tokens(job), cached_tokens)))

    def _fail(self, job: Job, error: ApiError) -> None:
        """Ends a job with an error, unless it has ended."""
        if job not in self._jobs:
            return
        self._close(job)
        self._outbox.append((job, error))
        for request in job.engine_requests:
            if not request.finished:
                try:
                    self.engine.cancel(request)
                except Exception:
                    logger.exception("a request could not be cancelled")

    def _fail_all(self, error: ApiError) -> None:
        for job in list(self._jobs):
            self._fail(job, error)

    def _close(self, job: Job) -> None:
        del self._jobs[job]
        for request in job.engine_requests:
            del self._job_of[request]

    def _expire(self) -> None:
        now = self.clock()
        for job in [job for job in self._jobs if now > job.deadline]:
            self._fail(job, ApiError(504, f"not done within {self.deadline:g} s", code="deadline_exceeded"))

    def _summarise(self, future: "Future[dict[str, Any]]") -> None:
        if future.set_running_or_notify_cancel():
            future.set_result(self.engine.summary())

    def _stop(self) -> None:
        self._stopping = True

    def _flush(self) -> None:
        outbox, self._outbox = self._outbox, []
        if outbox:
            self._call_in_loop(partial(self._deliver, outbox))

    def _call_in_loop(self, call: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the loop is closed
            logger.debug("the event loop has ended", exc_info=True)


def _tokens(job: Job) -> int:
    return sum(len(completion.tokens) for request in job.engine_requests for completion in request.completions)
