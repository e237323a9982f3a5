"""Adds, streams and cancels requests: what an engine does besides steps."""

import itertools
from collections import deque
from collections.abc import Iterable
from typing import Any

from dsv32_jax.common.arguments import instance
from dsv32_jax.engine.admission import Admitted, admit, resolve, rows_of
from dsv32_jax.engine.metrics import Metrics
from dsv32_jax.engine.request import Event, Request, SamplingParams
from dsv32_jax.engine.scheduler import Scheduler, Sequence
from dsv32_jax.engine.streams import Outbox, Stream
from dsv32_jax.engine.transactions import Transactional
from dsv32_jax.errors import UserError
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.snapshot import Snapshot

__all__ = ["RequestIntake"]


class RequestIntake(Transactional):
    """Takes requests, ends them, and hands out their events.

    Args:
      lm: the model that will run them.
      scheduler: that plans its steps.
    """

    def __init__(self, lm: LanguageModel, scheduler: Scheduler):
        super().__init__()
        self.lm = lm
        self.options = lm.options
        self._snapshot = Snapshot(lm)
        self.scheduler = scheduler
        self.metrics = Metrics()
        self._numbers = itertools.count()
        self._owner: dict[Sequence, tuple[Request, int]] = {}
        self._cancelled: deque[Request] = deque()  # by their readers; their sequences still have to be ended
        self._outbox = Outbox()

    def step(self) -> list[Event]:
        """See `Engine.step`."""
        raise NotImplementedError

    def check_unedited(self) -> None:
        """Raises `UserError` if the model was edited after the engine was made: the cache has values of the old one."""
        if not self._snapshot.shows(self.lm):
            raise UserError(
                "the model, its options or its config were edited after this Engine was made, and its cache holds what "
                "the old ones computed; make a new Engine, or edit another model: `m.with_parts(weights=...)`"
            )

    def add(self, prompt: Any, params: SamplingParams | None = None, *, salt: bytes = b"") -> Request:
        """Queues a prompt.

        Args:
          prompt: a text, or ids.
          params: how it is continued.
          salt: only prompts with equal salts share blocks in the cache; for instance one for each tenant.

        Raises:
          UserError: an argument is wrong, the prompt could never run (it does not fit into the cache with the tokens
            that may follow it), or the model was edited.
        """
        self.check_unedited()
        rows = self.lm.rows(prompt)
        if len(rows) > 1:
            raise UserError(f"prompt: {len(rows)} of them; add one after the other")
        admitted = admit(self.lm, self.scheduler, rows[0], resolve(self.lm, params), salt)
        request, _ = admitted
        try:
            self.transact(self._enqueue, [admitted])
            return request
        except BaseException:
            self._cancel_all([request])  # the caller does not get it
            raise

    def cancel(self, request: Request) -> None:
        """Ends a request; its blocks are free for the next step."""
        self._check_known(request)
        if not request.finished:
            self._cancel_all([request])

    def stream(self, request: Request) -> Stream:
        """Events of one request as they come, earlier ones included, while all others go on too.

        Leaving the stream cancels the request: see `Stream`.

        Raises:
          UserError: the request is another engine's.
        """
        self._check_known(request)
        return Stream(request, self._step_for_readers, self.cancel)

    def generate(self, prompts: Iterable[Any], params: SamplingParams | None = None) -> list[Request]:
        """Adds prompts, and runs until they have all ended; an exception cancels them.

        Args:
          prompts: texts, or lists of ids; also one text alone.
          params: of all.

        Raises:
          UserError: a prompt is wrong, which the error names by its number, or the model was edited; none has been
            added then.
        """
        self.check_unedited()
        rows, params = rows_of(self.lm, prompts), resolve(self.lm, params)
        admitted = [admit(self.lm, self.scheduler, ids, params, prompt=number) for number, ids in enumerate(rows)]
        requests = [request for request, _ in admitted]
        try:
            for request in requests:
                request.readers += 1  # so that `step` does not return its events
            self.transact(self._enqueue, admitted)
            while not all(request.finished for request in requests):
                self._step_for_readers()
            return requests
        except BaseException:
            self._cancel_all(requests)
            raise
        finally:
            for request in requests:
                request.readers -= 1

    def _check_known(self, request: Request) -> None:
        instance("request", request, Request, "what `add` returned")
        with self.lock:
            if not request.finished and all(owner is not request for owner, _ in list(self._owner.values())):
                raise UserError(f"request: number {request.number} is not one of this engine's")

    def _step_for_readers(self) -> None:
        self._outbox.for_readers(self.step)

    def _enqueue(self, admitted: list[Admitted]) -> None:
        for request, sequences in admitted:
            request.number = next(self._numbers)
            self._owner |= {sequence: (request, n) for n, sequence in enumerate(sequences)}
            self.scheduler.add(sequences[0])

    def _cancel_all(self, requests: list[Request]) -> None:
        """Cancels the completions of these requests that still run."""
        self._cancelled.extend(requests)
        self.apply_or_defer()

    def apply_deferred(self) -> None:
        """Ends the requests that were cancelled."""
        while self._cancelled:
            request = self._cancelled[0]
            for sequence, (owner, n) in list(self._owner.items()):
                if owner is request:
                    request.completions[n].finish_reason = "cancelled"
                    self._finish(sequence)
            self._cancelled.popleft()

    def _finish(self, sequence: Sequence) -> None:
        """Ends the sequence of a completion that has its `finish_reason`, and counts it."""
        self.scheduler.finish(sequence)
        request, n = self._owner.pop(sequence)
        self.metrics.finished[request.completions[n].finish_reason or ""] += 1
