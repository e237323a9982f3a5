"""Checks a prompt and its parameters, and makes the request that an engine queues."""

import dataclasses
from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np
from jax import Array

from dsv32_jax.common.arguments import instance
from dsv32_jax.engine.blocks import BLOCK_SIZE
from dsv32_jax.engine.request import Completion, Request, SamplingParams
from dsv32_jax.engine.scheduler import Scheduler, Sequence
from dsv32_jax.errors import UserError
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.prompts import BYTES

__all__ = ["Admitted", "admit", "resolve", "rows_of"]

Admitted = tuple[Request, list[Sequence]]
"""A request, and the sequence of each of its completions; the others are siblings of the first."""


def resolve(lm: LanguageModel, params: SamplingParams | None) -> SamplingParams:
    """Checks parameters against a model, and completes them: with the checkpoint's temperature and top_p where they are
    None, and with the ids of special tokens whose texts are stop strings.
    """
    params = instance("params", SamplingParams() if params is None else params, SamplingParams, "SamplingParams")
    temperature, top_p = lm.sampling(params.temperature, params.top_p, params.seed)
    ids, vocabulary = list(params.stop_token_ids), lm.config.vocab_size
    if outside := [id for id in ids if id >= vocabulary]:
        raise UserError(f"stop_token_ids: {outside[0]}; must be in 0..{vocabulary - 1}")
    for stop in params.stop:
        if lm.tokenizer is None:
            raise UserError("stop: the checkpoint has no tokenizer.json; give stop_token_ids")
        encoded = lm.tokenizer.encode(stop)
        special = [id for id in encoded if id in lm.tokenizer.special_ids]
        if special and len(encoded) > 1:
            raise UserError(f"stop: {stop!r} has a special token beside other text; the token must be alone")
        ids += special
    return dataclasses.replace(
        params,
        temperature=temperature,
        top_p=top_p,
        stop_token_ids=tuple(dict.fromkeys(ids)),
    )


def rows_of(lm: LanguageModel, prompts: Iterable[Any]) -> list[list[int]]:
    """Token ids of prompts: of several, of one text, or of none."""
    if not isinstance(prompts, str | np.ndarray | Array):
        if isinstance(prompts, (*BYTES, Mapping, Set)):
            raise UserError(f"prompts: {type(prompts).__name__}; must be texts or lists of token ids, in an order")
        prompts = list(instance("prompts", prompts, Iterable, "texts or lists of token ids"))
        if not prompts:
            return []
    return lm.rows(prompts)


def admit(
    lm: LanguageModel,
    scheduler: Scheduler,
    ids: list[int],
    params: SamplingParams,
    salt: bytes = b"",
    *,
    prompt: int | None = None,
) -> Admitted:
    """Makes a request that can run.

    Args:
      lm: the model.
      scheduler: that will run it.
      ids: the prompt.
      params: as `resolve` returns them.
      salt: see `BlockTable`.
      prompt: its number among several, for errors.

    Raises:
      UserError: the prompt could never run.
    """
    name = "prompt" if prompt is None else f"prompt {prompt}"
    try:
        new_tokens = lm.new_tokens([ids], params.max_new_tokens)
    except UserError as error:
        raise UserError(str(error) if prompt is None else f"{name}: {error}") from error
    if params.max_new_tokens is None:
        new_tokens = max(1, min(new_tokens, scheduler.pool.num_blocks * BLOCK_SIZE - len(ids) + 1))
        params = dataclasses.replace(params, max_new_tokens=new_tokens)
    instance("salt", salt, bytes, "bytes")
    sequences = [Sequence(list(ids), new_tokens, salt) for _ in range(params.n)]
    sequences[0].siblings = sequences[1:]
    try:
        scheduler.check(sequences[0])
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    completions = [Completion(lm.tokenizer.stream_decoder() if lm.tokenizer else None) for _ in sequences]
    return Request(-1, ids, params, completions), sequences
