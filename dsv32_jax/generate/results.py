"""What the calls of a `LanguageModel` return."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Answer", "Generation", "Piece", "Score"]


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    tokens: int32 [B, N], N = `max_new_tokens`; -1 after a row's end-of-sentence token.
    texts: one text a row (special tokens left out), or None without a tokenizer.
    finish_reasons: "stop" (end of sentence) or "length", one a row.
    """

    tokens: np.ndarray
    texts: list[str] | None
    finish_reasons: list[str]


@dataclasses.dataclass(frozen=True)
class Score:
    """What `score` returns.

    log_likelihoods: float32 [B, T - 1]; entry t is log p(ids[t + 1] | ids[: t + 1]), 0 where that token is absent.
    tokens: how many tokens were scored (each row's first has nothing before it).
    log_likelihood: their sum. perplexity: exp(-log_likelihood / tokens).
    """

    log_likelihoods: np.ndarray = dataclasses.field(repr=False)
    tokens: int
    log_likelihood: float
    perplexity: float

    @staticmethod
    def of(log_likelihoods: np.ndarray, tokens: int) -> "Score":
        """The score of log-likelihoods float32 [B, T - 1], of which `tokens` are of present tokens."""
        total = float(log_likelihoods.sum(dtype=np.float64))
        try:
            perplexity = math.exp(-total / tokens)
        except OverflowError:
            perplexity = math.inf
        return Score(log_likelihoods, tokens, total, perplexity)


class Piece(NamedTuple):
    """One newly generated token of one row; `text` is what it completes (None without a tokenizer)."""

    row: int
    token: int
    text: str | None


@dataclasses.dataclass(frozen=True)
class Answer:
    """What `chat` returns.

    text: the answer, without the reasoning before it.
    reasoning: what the model wrote before "</think>"; None where it did not reason.
    finish_reason: "stop", or "length" where the tokens ran out, maybe in the middle of the reasoning.
    tokens: int32 [N], all that was generated.
    messages: the conversation with this answer at its end; add a message to it to go on.
    """

    text: str
    reasoning: str | None
    finish_reason: str
    tokens: np.ndarray = dataclasses.field(repr=False)
    messages: list[Mapping[str, Any]] = dataclasses.field(repr=False)

    def __str__(self) -> str:
        return self.text
