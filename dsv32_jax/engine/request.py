"""Requests to the engine, and their results: parameters, completions, events."""

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
    "MAX_CONTINUATIONS",
    "MAX_LOGPROBS",
    "MAX_STOPS",
    "Completion",
    "Event",
    "LogProbs",
    "Request",
    "SamplingParams",
]

MAX_CONTINUATIONS = 16
"""Continuations of one prompt: each takes a token of every step."""
MAX_LOGPROBS = 20
"""Likeliest tokens that are reported beside a sampled one."""
MAX_STOPS = 16
"""Stop strings of one request."""
COLLECTIONS = (list, tuple, set, frozenset, range)


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How a prompt is continued.

    Attributes:
      max_new_tokens: the greatest number of tokens, at least 1. None: as many as `generate` makes, or as fit into the
        cache.
      temperature, top_p: see `sampling.sample`; temperature 0 is greedy. None: as the checkpoint's generation config
        says, and greedy where it says nothing (`LanguageModel.sampling_defaults`). `Engine.add` replaces None by
        numbers.
      seed: the sampled tokens depend on it, on the number of the continuation and on the position, never on other
        requests.
      n: continuations of the prompt, which is read once for all.
      stop: strings at which a continuation ends; its text does not include them. A single string counts as a list of
        one. The text of a special token, which is in no text, ends it where the token comes; `Engine.add` adds its id
        to `stop_token_ids`.
      stop_token_ids: ids at which it ends.
      ignore_eos: go on after an end-of-sentence token.
      logprobs: report the log-probability of each token, and so many of the likeliest tokens with theirs, before
        temperature and top-p; None: report none.

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
        max_new_tokens, logprobs = self.max_new_tokens, self.logprobs
        checked = {
            "max_new_tokens": None if max_new_tokens is None else integer("max_new_tokens", max_new_tokens, 1),
            "temperature": None if temperature is None else float(temperature),
            "top_p": None if top_p is None else float(top_p),
            "seed": int(self.seed),
            "n": integer("n", self.n, 1, MAX_CONTINUATIONS),
            "stop": _stops(self.stop),
            "stop_token_ids": _stop_token_ids(self.stop_token_ids),
            "ignore_eos": boolean("ignore_eos", self.ignore_eos),
            "logprobs": None if logprobs is None else integer("logprobs", logprobs, 0, MAX_LOGPROBS),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # frozen for others

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken; for parameters of a request, which have no None."""
        return not self.temperature

    @property
    def nucleus(self) -> bool:
        """Whether only the likeliest tokens are drawn from; for parameters of a request, which have no None."""
        return self.top_p is not None and self.top_p < 1


def _stops(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    stops = tuple(instance("stop", value, COLLECTIONS, "a string or a list of strings"))
    for stop in stops:
        instance("stop", stop, str, "a string or a list of strings")
        check_text("stop", stop)
    if len(stops) > MAX_STOPS or not all(stops):
        raise UserError(f"stop: must be at most {MAX_STOPS} strings, none of them empty")
    return stops


def _stop_token_ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    ids = instance("stop_token_ids", value, COLLECTIONS, "a list of token ids")
    return tuple(integer("stop_token_ids", id, 0) for id in ids)


@dataclasses.dataclass(frozen=True)
class LogProbs:
    """Log-probabilities of a sampled token, and of the likeliest tokens by id, the likeliest first."""

    token: float
    likeliest: dict[int, float]


@dataclasses.dataclass(eq=False)
class Completion:
    """One continuation.

    Attributes:
      decoder: turns the tokens into text; None without a tokenizer.
      tokens: the sampled ids, a final end-of-sentence or stop token included.
      text: of the tokens, without special tokens, and only up to a stop string; None without a tokenizer.
      finish_reason: "stop", "length", "cancelled" or "error"; None while it goes on.
      error: with "error", what happened, in one line.
      logprobs: of each token, where the request asked for them.
      times: seconds from the request's arrival to each token.
      withheld: the end of the text that has not been handed out, since a stop string may begin there.
    """

    decoder: StreamDecoder | None = dataclasses.field(repr=False)
    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str | None = None
    finish_reason: str | None = None
    error: str | None = None
    logprobs: list[LogProbs] = dataclasses.field(default_factory=list, repr=False)
    times: list[float] = dataclasses.field(default_factory=list, repr=False)
    withheld: str = dataclasses.field(default="", repr=False)

    def __post_init__(self) -> None:
        if self.decoder is not None:
            self.text = ""

    def fail(self, error: str) -> None:
        """Ends it with "error"."""
        self.finish_reason, self.error = "error", error

    def add(self, token: int, params: SamplingParams, eos_ids: tuple[int, ...], elapsed: float) -> str:
        """Appends a token, and sets `finish_reason` where it ends the completion; returns the text that is new."""
        self.tokens.append(token)
        self.times.append(elapsed)
        stops = token in params.stop_token_ids or (token in eos_ids and not params.ignore_eos)
        last = stops or len(self.tokens) == params.max_new_tokens
        piece = ""
        if self.decoder is not None:
            piece = self.decoder.add(token) + (self.decoder.finish() if last else "")
            if params.stop:
                piece, stop_found = self._up_to_stop(piece, params.stop, last)
                stops = stops or stop_found
            self.text = (self.text or "") + piece
        if stops or last:  # last of all: a completion with a reason is whole
            self.finish_reason = "stop" if stops else "length"
        return piece

    def _up_to_stop(self, piece: str, stops: Sequence[str], last: bool) -> tuple[str, bool]:
        """Adds a piece of text; returns the text up to the first stop string, or to the beginning of what may become
        one, and whether there is a stop string.
        """
        self.withheld += piece
        begins = [begin for stop in stops if (begin := self.withheld.find(stop)) >= 0]
        keep = 0 if last else max((overlap(self.withheld, stop) for stop in stops), default=0)
        cut = min(begins) if begins else len(self.withheld) - keep
        piece, self.withheld = self.withheld[:cut], "" if begins else self.withheld[cut:]
        return piece, bool(begins)


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt in an engine.

    Attributes:
      number: of the request, counted from 0 in the order of all.
      prompt: its ids.
      params: how it is continued, without None for temperature and top_p.
      completions: `params.n` of them.
      cached_tokens: tokens of the prompt that were found in the cache when it began; None before.
      arrived: `time.monotonic()` when it was added.
      readers: streams that read it, and calls of `Engine.generate`; without one, `Engine.step` returns its events.
      unread: (completion, token, text) of events that nobody has read yet.
    """

    number: int
    prompt: list[int]
    params: SamplingParams
    completions: list[Completion]
    cached_tokens: int | None = None
    arrived: float = dataclasses.field(default_factory=time.monotonic, repr=False)
    readers: int = dataclasses.field(default=0, repr=False)
    unread: deque[tuple[int, int, str]] = dataclasses.field(default_factory=deque, repr=False)

    @property
    def finished(self) -> bool:
        """Whether all its completions have ended."""
        return all(completion.finish_reason for completion in self.completions)

    @property
    def tokens(self) -> np.ndarray:
        """The tokens of all completions, int32 [n, N], -1 behind the end of the shorter ones."""
        longest = max(len(completion.tokens) for completion in self.completions)
        tokens = np.full((len(self.completions), longest), -1, np.int32)
        for row, completion in zip(tokens, self.completions, strict=True):
            row[: len(completion.tokens)] = completion.tokens
        return tokens


@dataclasses.dataclass(slots=True)
class Event:
    """A new token of a request.

    Attributes:
      request: that it belongs to.
      index: of the completion.
      token: its id.
      text: that the token adds to the completion's text; empty while it may belong to a stop string or to a character
        that is not whole.
    """

    request: Request
    index: int
    token: int
    text: str
