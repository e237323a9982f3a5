"""Texts of any length, in windows that a model can read."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsv32_jax.common.progress import progress_bar
from dsv32_jax.errors import UserError
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.results import Score

__all__ = ["Window", "check_windows", "score_windows", "windows_of"]


class Window(NamedTuple):
    """A stretch of a text. `new` of its last tokens are in no window before it."""

    ids: list[int]
    new: int


def check_windows(window: int | None, stride: int | None) -> None:
    """Raises UserError for lengths that no text can be read with."""
    if window is not None and window < 2:
        raise UserError(f"--window {window}: must be at least 2")
    if stride is not None and stride < 1:
        raise UserError(f"--stride {stride}: must be at least 1")
    if window is not None and stride is not None and stride > window - 1:
        raise UserError(f"--stride {stride}: must be at most --window - 1 = {window - 1}, or tokens would be left out")


def windows_of(ids: Sequence[int], window: int, stride: int, bos: int | None = None) -> list[Window]:
    """A text in windows of `window` tokens, each `stride` further on; one window where it fits.

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
    result, read = [], 1 - len(head)  # without a head the first token has nothing before it
    for start in range(0, max(len(body), 1), stride):
        stretch = body[start : start + room]
        result.append(Window(head + stretch, start + len(stretch) - read))
        read = start + len(stretch)
        if read >= len(body):
            break
    return result


def score_windows(
    m: LanguageModel, ids: Sequence[int], windows: Sequence[Window], out: np.ndarray | None = None
) -> Score:
    """`LanguageModel.score` of one text of any length; the same as that where the text is one window.

    Args:
      m: the model.
      ids: of the whole text.
      windows: of `windows_of` these ids.
      out: float32 [1, T, V], the logits at every token of the text, each from the window in which what follows is new.
    """
    parts: list[np.ndarray] = []
    at = 0
    with progress_bar("scoring", len(ids) - 1, "tokens") as advance:
        for number, (stretch, new) in enumerate(windows):
            last = number + 1 == len(windows)
            logits = None if out is None else np.empty((1, len(stretch), m.config.vocab_size), np.float32)
            score = m.score([stretch], out=logits)
            parts.append(score.log_likelihoods[0, len(stretch) - 1 - new :])
            if out is not None and logits is not None:
                taken = logits[0, len(stretch) - 1 - new : None if last else -1]
                out[0, at : at + len(taken)] = taken
                at += len(taken)
            advance(new)
    log_likelihoods = np.concatenate(parts)[None]
    return Score.of(log_likelihoods, log_likelihoods.size)
