"""What the engine is asked for, and what it gives."""

import dataclasses
import time

import numpy as np

from dsv32_jax.errors import UserError
from dsv32_jax.sampling import check_sampling
from dsv32_jax.tokenizer import StreamDecoder

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


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How a prompt is continued.

    Attributes:
      max_new_tokens: at most so many, at least 1.
      temperature, top_p: see `sampling.sample`; temperature 0 is greedy.
      seed: what is drawn depends on it, on the number of the continuation and on the position, never on other requests.
      n: continuations of the prompt, which is read once for all.
      stop: strings at which a continuation ends; they are left out of its text.
      stop_token_ids: ids at which it ends.
      ignore_eos: go on after an end-of-sentence token.
      logprobs: of each token, tell its log-probability, and so many of the likeliest tokens with theirs, before
        temperature and top-p; None: nothing of it.

    Raises:
      UserError: naming the field.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_p, self.seed)
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens: {self.max_new_tokens}; must be at least 1")
        if not 1 <= self.n <= MOST_CONTINUATIONS:
            raise UserError(f"n: {self.n}; must be in 1..{MOST_CONTINUATIONS}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise UserError(f"logprobs: {self.logprobs}; must be in 0..{MOST_LOGPROBS}")
        if len(self.stop) > MOST_STOPS or not all(self.stop):
            raise UserError(f"stop: must be at most {MOST_STOPS} strings, none of them empty")


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
      logprobs: of each token, where they were asked for.
      times: seconds since the request came, of each token.
    """

    decoder: StreamDecoder | None = dataclasses.field(repr=False)
    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str | None = None
    finish_reason: str | None = None
    logprobs: list[LogProbs] = dataclasses.field(default_factory=list, repr=False)
    times: list[float] = dataclasses.field(default_factory=list, repr=False)
    held: str = dataclasses.field(default="", repr=False)
    """The end of the text that has not been given out: it may be the beginning of a stop string."""

    def __post_init__(self) -> None:
        if self.decoder is not None:
            self.text = ""

    def add(self, token: int, params: SamplingParams, eos_ids: tuple[int, ...], now: float) -> str:
        """Takes a token, and ends where it must; returns the text that is certain now."""
        self.tokens.append(token)
        self.times.append(now)
        ends = token in params.stop_token_ids or (token in eos_ids and not params.ignore_eos)
        last = ends or len(self.tokens) == params.max_new_tokens
        if last:
            self.finish_reason = "stop" if ends else "length"
        if self.decoder is None:
            return ""
        piece = self.decoder.add(token) + (self.decoder.finish() if last else "")
        if params.stop:
            piece = self._up_to_stop(piece, params.stop, last)
        self.text = (self.text or "") + piece
        return piece

    def _up_to_stop(self, piece: str, stops: tuple[str, ...], last: bool) -> str:
        """What is certain with one more piece of text: up to a stop string, at which it ends, or to what may be one."""
        self.held += piece
        found = [at for stop in stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.finish_reason = "stop"
            piece, self.held = self.held[: min(found)], ""
        else:
            keep = 0 if last else max((overlap(self.held, stop) for stop in stops), default=0)
            cut = len(self.held) - keep
            piece, self.held = self.held[:cut], self.held[cut:]
        return piece


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt on its way.

    Attributes:
      number: its place in the order of all.
      prompt: its ids.
      params: how it is continued.
      completions: `params.n` of them.
      cached_tokens: of the prompt, how many were found in the cache when it began; None before.
      came: `time.monotonic()` when it was added.
    """

    number: int
    prompt: list[int]
    params: SamplingParams
    completions: list[Completion]
    cached_tokens: int | None = None
    came: float = dataclasses.field(default_factory=time.monotonic, repr=False)

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
