"""Splits texts of any length into windows that a model can read, and scores them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsv32_jax.common.progress import progress_bar
from dsv32_jax.errors import UserError
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.results import Score

__all__ = ["Window", "check_windows", "score_windows", "windows_of"]


class Window(NamedTuple):
    """A part of a text. Its last `new` tokens are in no window before it."""

    ids: list[int]
    new: int


def check_windows(window: int | None, stride: int | None) -> None:
    """Raises UserError for a window or a stride that would leave out tokens."""
    if window is not None and window < 2:
        raise UserError(f"--window {window}: must be at least 2")
    if stride is not None and stride < 1:
        raise UserError(f"--stride {stride}: must be at least 1")
    if window is not None and stride is not None and stride > window - 1:
        raise UserError(f"--stride {stride}: must be at most --window - 1 = {window - 1}, or tokens would be left out")


def windows_of(ids: Sequence[int], window: int, stride: int, bos: int | None = None) -> list[Window]:
    """Splits a text into windows of `window` tokens, each `stride` further on; a short text is one window.

    Every token but the first is new in exactly one window, where at least `window - stride` tokens stand before it, if
    the text has as many.

    Args:
      ids: of the whole text.
      window: tokens of a window, at least 2.
      stride: tokens from one window to the next, at most `window` - 1.
      bos: the beginning-of-sentence token; where the text begins with it, so does every window.
    """
    head = [bos] if bos is not None and list(ids[:1]) == [bos] else []
    body = list(ids[len(head) :])
    room = window - len(head)
    result, covered = [], 1 - len(head)  # without a head the first token has nothing before it
    for start in range(0, max(len(body), 1), stride):
        part = body[start : start + room]
        result.append(Window(head + part, start + len(part) - covered))
        covered = start + len(part)
        if covered >= len(body):
            break
    return result


def score_windows(
    m: LanguageModel, ids: Sequence[int], windows: Sequence[Window], out: np.ndarray | None = None
) -> Score:
    """Scores one text of any length; the result is that of `LanguageModel.score` where the text is one window.

    Args:
      m: the model.
      ids: of the whole text.
      windows: of `windows_of` these ids.
      out: float32 [1, T, V], the logits at every token of the text, each from the window whose next token is new.
    """
    parts: list[np.ndarray] = []
    at = 0
    with progress_bar("scoring", len(ids) - 1, "tokens") as advance:
        for number, (window_ids, new) in enumerate(windows):
            last = number + 1 == len(windows)
            logits = None if out is None else np.empty((1, len(window_ids), m.config.vocab_size), np.float32)
            score = m.score([window_ids], out=logits)
            parts.append(score.log_likelihoods[0, len(window_ids) - 1 - new :])
            if out is not None and logits is not None:
                kept_logits = logits[0, len(window_ids) - 1 - new : None if last else -1]
                out[0, at : at + len(kept_logits)] = kept_logits
                at += len(kept_logits)
            advance(new)
    log_likelihoods = np.concatenate(parts)[None]
    return Score.of(log_likelihoods, log_likelihoods.size)
