"""What the engine is asked for, and what it gives."""

import dataclasses
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv32_jax.common.arguments import boolean, instance, integer
from dsv32_jax.errors import UserError
from dsv32_jax.generate.messages import check_text
from dsv32_jax.generate.sampling import check_sampling
from dsv32_jax.generate.tokenizer import StreamDecoder

__all__ = [
    "MOST_CONTINUATIONS",
    "MOST_LOGPROBS",
    "MOST_STOPS",
    "Completion",
    "Event",
    "LogProbs",
    "Request",
    "SamplingParams",
]

MOST_CONTINUATIONS = 16
"""Of one prompt: each costs a place in every step."""
MOST_LOGPROBS = 20
"""Alternatives that are told of a token."""
MOST_STOPS = 16
"""Stop strings of one request."""
COLLECTIONS = (list, tuple, set, frozenset, range)


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How a prompt is continued.

    Attributes:
      max_new_tokens: at most so many, at least 1. None: as many as `generate` makes, or as fit into the cache.
      temperature, top_p: see `sampling.sample`; temperature 0 is greedy. None: as the checkpoint's generation config
        says, and greedy where it says nothing (`LanguageModel.sampling_defaults`). `Engine.add` puts numbers in the
        place of None.
      seed: what is drawn depends on it, on the number of the continuation and on the position, never on other requests.
      n: continuations of the prompt, which is read once for all.
      stop: strings at which a continuation ends; they are left out of its text. One string alone is that one string.
        The text of a special token, which is in no text, ends it where the token comes; `Engine.add` adds its id to
        `stop_token_ids`.
      stop_token_ids: ids at which it ends.
      ignore_eos: go on after an end-of-sentence token.
      logprobs: of each token, tell its log-probability, and so many of the likeliest tokens with theirs, before
        temperature and top-p; None: nothing of it.

    NumPy's numbers become Python's, and lists tuples.

    Raises:
      UserError: a field has another type, or is out of its range; it names the field.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    n: int = 1
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        temperature, top_p = self.temperature, self.top_p
        check_sampling(0.0 if temperature is None else temperature, 1.0 if top_p is None else top_p, self.seed)
        most, logprobs = self.max_new_tokens, self.logprobs
        checked = {
            "max_new_tokens": None if most is None else integer("max_new_tokens", most, 1),
            "temperature": None if temperature is None else float(temperature),
            "top_p": None if top_p is None else float(top_p),
            "seed": int(self.seed),
            "n": integer("n", self.n, 1, MOST_CONTINUATIONS),
            "stop": _stops(self.stop),
            "stop_token_ids": _stop_token_ids(self.stop_token_ids),
            "ignore_eos": boolean("ignore_eos", self.ignore_eos),
            "logprobs": None if logprobs is None else integer("logprobs", logprobs, 0, MOST_LOGPROBS),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # frozen for others

    @property
    def greedy(self) -> bool:
        """Takes the likeliest token; of a request, which has no None."""
        return not self.temperature

    @property
    def nucleus(self) -> bool:
        """Draws from the likeliest tokens alone; of a request, which has no None."""
        return self.top_p is not None and self.top_p < 1


def _stops(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    stops = tuple(instance("stop", value, COLLECTIONS, "a string or a list of strings"))
    for stop in stops:
        instance("stop", stop, str, "a string or a list of strings")
        check_text("stop", stop)
    if len(stops) > MOST_STOPS or not all(stops):
        raise UserError(f"stop: must be at most {MOST_STOPS} strings, none of them empty")
    return stops


def _stop_token_ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    ids = instance("stop_token_ids", value, COLLECTIONS, "a list of token ids")
    return tuple(integer("stop_token_ids", id, 0) for id in ids)


@dataclasses.dataclass(frozen=True)
class LogProbs:
    """Log-probabilities of a drawn token, and of the likeliest ones by id, the likeliest first."""

    token: float
    likeliest: dict[int, float]


@dataclasses.dataclass(eq=False)
class Completion:
    """One continuation.

    Attributes:
      tokens: what was drawn, a final end-of-sentence or stop token included.
      text: what they say, without special tokens, and only up to a stop string; None without a tokenizer.
      finish_reason: "stop", "length", "cancelled" or "error"; None while it goes on.
      error: of "error", what happened, in one line.
      logprobs: of each token, where they were asked for.
      times: seconds since the request came, of each token.
    """

    decoder: StreamDecoder | None = dataclasses.field(repr=False)
    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str | None = None
    finish_reason: str | None = None
    error: str | None = None
    logprobs: list[LogProbs] = dataclasses.field(default_factory=list, repr=False)
    times: list[float] = dataclasses.field(default_factory=list, repr=False)
    held: str = dataclasses.field(default="", repr=False)
    """The end of the text that has not been given out: it may be the beginning of a stop string."""

    def __post_init__(self) -> None:
        if self.decoder is not None:
            self.text = ""

    def fail(self, error: str) -> None:
        """Ends it with "error"."""
        self.finish_reason, self.error = "error", error

    def add(self, token: int, params: SamplingParams, eos_ids: tuple[int, ...], now: float) -> str:
        """Takes a token, and ends where it must; returns the text that is certain now."""
        self.tokens.append(token)
        self.times.append(now)
        stops = token in params.stop_token_ids or (token in eos_ids and not params.ignore_eos)
        last = stops or len(self.tokens) == params.max_new_tokens
        piece = ""
        if self.decoder is not None:
            piece = self.decoder.add(token) + (self.decoder.finish() if last else "")
            if params.stop:
                piece, reached = self._up_to_stop(piece, params.stop, last)
                stops = stops or reached
            self.text = (self.text or "") + piece
        if stops or last:  # at the end: who has a reason is whole
            self.finish_reason = "stop" if stops else "length"
        return piece

    def _up_to_stop(self, piece: str, stops: Sequence[str], last: bool) -> tuple[str, bool]:
        """What is certain with one more piece of text, up to a stop string or to what may be one; the first, if any."""
        self.held += piece
        ends = [at for stop in stops if (at := self.held.find(stop)) >= 0]
        keep = 0 if last else max((overlap(self.held, stop) for stop in stops), default=0)
        cut = min(ends) if ends else len(self.held) - keep
        piece, self.held = self.held[:cut], "" if ends else self.held[cut:]
        return piece, bool(ends)


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt on its way.

    Attributes:
      number: its place in the order of all.
      prompt: its ids.
      params: how it is continued, without None for temperature and top_p.
      completions: `params.n` of them.
      cached_tokens: of the prompt, how many were found in the cache when it began; None before.
      came: `time.monotonic()` when it was added.
      readers: streams that read it, and calls of `Engine.generate`; the events of others are for `Engine.step`.
      unread: (completion, token, text) of events that nobody has been given yet.
    """

    number: int
    prompt: list[int]
    params: SamplingParams
    completions: list[Completion]
    cached_tokens: int | None = None
    came: float = dataclasses.field(default_factory=time.monotonic, repr=False)
    readers: int = dataclasses.field(default=0, repr=False)
    unread: deque[tuple[int, int, str]] = dataclasses.field(default_factory=deque, repr=False)

    @property
    def finished(self) -> bool:
        """All its completions have ended."""
        return all(completion.finish_reason for completion in self.completions)

    @property
    def tokens(self) -> np.ndarray:
        """int32 [n, N] of all completions, -1 behind the end of the shorter ones."""
        longest = max(len(completion.tokens) for completion in self.completions)
        found = np.full((len(self.completions), longest), -1, np.int32)
        for row, completion in zip(found, self.completions, strict=True):
            row[: len(completion.tokens)] = completion.tokens
        return found


@dataclasses.dataclass(slots=True)
class Event:
    """A token that has come.

    Attributes:
      request: whose.
      index: of the completion.
      token: its id.
      text: what is certain now of the completion's text that was not before.
    """

    request: Request
    index: int
    token: int
    text: str
