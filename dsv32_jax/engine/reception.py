"""Requests as they come, are read, and go: what an engine does besides steps."""

import itertools
from collections import deque
from collections.abc import Iterable
from typing import Any

from dsv32_jax.common.arguments import instance
from dsv32_jax.engine.admission import Admitted, admitted, resolved, rows_of
from dsv32_jax.engine.changes import Changing
from dsv32_jax.engine.metrics import Metrics
from dsv32_jax.engine.request import Event, Request, SamplingParams
from dsv32_jax.engine.scheduler import Scheduler, Sequence
from dsv32_jax.engine.streams import Outbox, Stream
from dsv32_jax.errors import UserError
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.snapshot import Snapshot

__all__ = ["Reception"]


class Reception(Changing):
    """Takes requests, ends them, and hands out their events.

    Args:
      lm: the model that will run them.
      scheduler: that plans its steps.
    """

    def __init__(self, lm: LanguageModel, scheduler: Scheduler):
        super().__init__()
        self.lm = lm
        self.options = lm.options
        self._made_of = Snapshot(lm)
        self.scheduler = scheduler
        self.metrics = Metrics()
        self._numbers = itertools.count()
        self._owner: dict[Sequence, tuple[Request, int]] = {}
        self._leaving: deque[Request] = deque()  # cancelled, and still to be ended
        self._outbox = Outbox()

    def step(self) -> list[Event]:
        """See `Engine.step`."""
        raise NotImplementedError

    def check_unedited(self) -> None:
        """Raises `UserError` if the model is not what it was when the engine was made: the cache has values of it."""
        if not self._made_of.shows(self.lm):
            raise UserError(
                "the model, its options or its config were edited after this Engine was made, and its cache holds what "
                "the old ones computed; make a new Engine, or edit another model: `m.with_parts(weights=...)`"
            )

    def add(self, prompt: Any, params: SamplingParams | None = None, *, salt: bytes = b"") -> Request:
        """Queues a prompt.

        Args:
          prompt: a text, or ids.
          params: how it is continued.
          salt: only prompts with equal salts find each other's blocks in the cache; of a tenant, say.

        Raises:
          UserError: an argument is wrong, the prompt could never run (it does not fit into the cache with what may
            follow it), or the model was edited.
        """
        self.check_unedited()
        rows = self.lm.rows(prompt)
        if len(rows) > 1:
            raise UserError(f"prompt: {len(rows)} of them; add one after the other")
        new = admitted(self.lm, self.scheduler, rows[0], resolved(self.lm, params), salt)
        request, _ = new
        try:
            self.change(self._enqueue, [new])
            return request
        except BaseException:
            self._give_up([request])  # nobody will know of it
            raise

    def cancel(self, request: Request) -> None:
        """Ends a request; its blocks are free for the next step."""
        self._check_known(request)
        if not request.finished:
            self._give_up([request])

    def stream(self, request: Request) -> Stream:
        """Events of one request as they come, also those of before, while all others go on too.

        Leaving the stream cancels the request: see `Stream`.

        Raises:
          UserError: it is another engine's.
        """
        self._check_known(request)
        return Stream(request, self._step_for_readers, self.cancel)

    def generate(self, prompts: Iterable[Any], params: SamplingParams | None = None) -> list[Request]:
        """Adds prompts, and runs until they have all ended; an exception cancels them.

        Args:
          prompts: texts, or lists of ids; also one text alone.
          params: of all.

        Raises:
          UserError: naming the prompt that is wrong, by its number; none has been added then. Or the model was edited.
        """
        self.check_unedited()
        rows, params = rows_of(self.lm, prompts), resolved(self.lm, params)
        new = [admitted(self.lm, self.scheduler, ids, params, prompt=number) for number, ids in enumerate(rows)]
        requests = [request for request, _ in new]
        try:
            for request in requests:
                request.readers += 1  # its events are not for `step`
            self.change(self._enqueue, new)
            while not all(request.finished for request in requests):
                self._step_for_readers()
            return requests
        except BaseException:
            self._give_up(requests)
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

    def _enqueue(self, new: list[Admitted]) -> None:
        for request, sequences in new:
            request.number = next(self._numbers)
            self._owner |= {sequence: (request, n) for n, sequence in enumerate(sequences)}
            self.scheduler.add(sequences[0])

    def _give_up(self, requests: list[Request]) -> None:
        """Cancels what still runs of requests."""
        self._leaving.extend(requests)
        self.settle_or_leave()

    def settle(self) -> None:
        """Ends the requests that were cancelled."""
        while self._leaving:
            request = self._leaving[0]
            for sequence, (owner, n) in list(self._owner.items()):
                if owner is request:
                    request.completions[n].finish_reason = "cancelled"
                    self._finish(sequence)
            self._leaving.popleft()

    def _finish(self, sequence: Sequence) -> None:
        """Of a completion that has its `finish_reason`."""
        self.scheduler.finish(sequence)
        request, n = self._owner.pop(sequence)
        self.metrics.finished[request.completions[n].finish_reason or ""] += 1
