"""Converts prompts of any accepted form into checked rows of token ids."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import Array

from dsv32_jax.config import ModelConfig
from dsv32_jax.errors import UserError
from dsv32_jax.generate.messages import check_text
from dsv32_jax.generate.tokenizer import Tokenizer

__all__ = ["BYTES", "Prompts", "is_one", "rows_of"]

BYTES = (bytes, bytearray, memoryview)
"""Sequences of numbers that are no token ids."""

Prompts = str | Sequence[Any] | np.ndarray | Array


def is_one(prompts: Prompts) -> bool:
    """Whether prompts are one sequence by themselves: a text or ids [T], not a list of these or ids [B, T]."""
    if isinstance(prompts, np.ndarray | Array):
        return prompts.ndim == 1
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | np.integer))


def rows_of(prompts: Prompts, config: ModelConfig, tokenizer: Tokenizer | None) -> list[list[int]]:
    """Returns one list of ids for each prompt, without the absent positions at the right.

    Args:
      prompts: ids [T] or [B, T] (-1 absent at the right), a text, or a list of texts or id lists. A text gets the
        beginning-of-sentence token in front.
      config: has the size of the vocabulary and the longest row.
      tokenizer: encodes texts; None where the checkpoint has none.

    Raises:
      UserError: naming the prompt and position that is wrong.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, BYTES):
        raise UserError(f"prompt: {type(prompts).__name__}; must be a text: decode it first")
    if isinstance(prompts, np.ndarray | Array):
        array = np.asarray(prompts)
        if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
            raise UserError(f"token ids: {array.dtype} {list(array.shape)}; must be int32 [T] or [B, T]")
        prompts = list(np.atleast_2d(array))
    elif not isinstance(prompts, Sequence):
        raise UserError(f"prompt: of type {type(prompts).__name__}; must be a text, token ids, or a list of these")
    elif is_one(prompts):
        prompts = [prompts]
    if not len(prompts):
        raise UserError("prompt: none given")
    return [_row(number, prompt, config, tokenizer) for number, prompt in enumerate(prompts)]


def _row(
    number: int, prompt: str | Sequence[int] | np.ndarray | Array, config: ModelConfig, tokenizer: Tokenizer | None
) -> list[int]:
    if isinstance(prompt, BYTES):
        raise UserError(f"prompt {number}: {type(prompt).__name__}; must be a text: decode it first")
    if isinstance(prompt, str):
        if tokenizer is None:
            raise UserError("prompt: the checkpoint has no tokenizer.json; give token ids instead of text")
        if not prompt:
            raise UserError(f"prompt {number}: empty; it must have at least one character")
        prompt = tokenizer.encode(check_text(f"prompt {number}", prompt), bos=True)
    try:
        ids = np.asarray(prompt)
    except ValueError:  # lists of different lengths, one in the other
        ids = np.array(None)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise UserError(f"prompt {number}: must be a text or a flat list of integer token ids")
    (present,) = np.nonzero(ids != -1)
    if not present.size:
        raise UserError(f"prompt {number}: empty; it must have at least one token")
    ids = ids[: present[-1] + 1]
    (wrong,) = np.nonzero((ids < 0) | (ids >= config.vocab_size))
    if wrong.size:
        place = f"prompt {number}, position {wrong[0]}"
        if ids[wrong[0]] == -1:
            raise UserError(f"{place}: -1 in the middle; absent positions are at the right")
        raise UserError(
            f"{place}: token {ids[wrong[0]]} is not in 0..{config.vocab_size - 1} (vocab_size {config.vocab_size})"
        )
    if len(ids) > config.max_position_embeddings:
        raise UserError(
            f"prompt {number}: {len(ids)} tokens is longer than the cache can be; "
            f"at most max_position_embeddings = {config.max_position_embeddings}"
        )
    return ids.tolist()
