"""The loop that generates tokens, all rows together, and the programs that it runs."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv32_jax.common.arguments import integer
from dsv32_jax.errors import UserError
from dsv32_jax.generate import batching
from dsv32_jax.generate.flat_model import FlatModel, flat_step
from dsv32_jax.generate.sampling import NOT_FINITE, not_finite, row_keys, sample
from dsv32_jax.model.cache import KVCache

__all__ = ["decode", "programs"]


def decode(
    flat: FlatModel,
    rows: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float,
    top_p: float,
    seed: int,
    end_ids: Sequence[int],
) -> Iterator[np.ndarray]:
    """Yields int32 [B] a step, -1 for rows that have ended, until all have.

    The next step is started before the tokens of this one are fetched, so that the device does not wait for the host.
    A row that has ended is therefore computed once more, and the result is dropped.

    Args:
      flat: the model.
      rows: prompts.
      max_new_tokens: of each row.
      temperature, top_p, seed: see `sampling.sample` and `sampling.row_keys`.
      end_ids: tokens after which a row has ended.

    Raises:
      UserError: logits are not finite.
    """
    lengths = np.array([len(row) for row in rows], np.int32)
    tables = batching.block_tables(len(rows), int(lengths.max()) + max_new_tokens, flat.config.max_position_embeddings)
    logits, cache = _prefill(flat, rows, tables)
    numbers = np.arange(len(rows), dtype=np.int32)
    greedy, nucleus = temperature == 0, top_p < 1

    def draw(logits: Array, n: int) -> Array:
        keys = None if greedy else row_keys(seed, numbers, lengths + n)
        return sample(logits, keys, temperature, top_p, greedy=greedy, nucleus=nucleus)

    running = np.ones(len(rows), bool)
    ids = draw(logits, 0)
    for n in range(max_new_tokens):
        if n + 1 < max_new_tokens:
            positions = np.where(running, lengths + n, -1)
            logits, cache = flat.step(batching.batch_of(ids, positions, numbers, tables, numbers), cache)
            next_ids = draw(logits, n + 1)
        fetched = np.where(running, ids, -1).astype(np.int32)
        if (fetched == NOT_FINITE).any():
            number = int(np.argmax(fetched == NOT_FINITE))
            raise not_finite(number, int(lengths[number]) + n - 1)
        yield fetched
        running = running & ~np.isin(fetched, end_ids)
        if n + 1 == max_new_tokens or not running.any():
            return
        ids = next_ids


def _prefill(flat: FlatModel, rows: list[list[int]], tables: np.ndarray) -> tuple[Array, KVCache]:
    """Logits [B, V] after the last token of each prompt, and a cache that holds the prompts."""
    cache = flat.new_cache(tables)
    last = []
    for row, table in zip(rows, tables, strict=True):
        for start, stop, size in batching.chunks(len(row), flat.options):
            # Only the last chunk's logits are used; -1 computes none and keeps the shape.
            logit_rows = np.array([stop - start - 1 if stop == len(row) else -1], np.int32)
            logits, cache = flat.step(batching.prompt_batch(row, start, stop, size, table, logit_rows), cache)
            if stop == len(row):
                last.append(logits)
    return jnp.concatenate(last), cache


def programs(flat: FlatModel, lengths: Sequence[int], max_new_tokens: int) -> list[Callable[[], Any]]:
    """Jobs that compile each program which `decode` runs for prompts of these lengths together.

    Raises:
      UserError: there is no length, or one is out of range.
    """
    longest = flat.config.max_position_embeddings
    lengths = [integer("lengths", length, 1, longest) for length in lengths]
    if not lengths:
        raise UserError("lengths: none; give the number of tokens of each prompt")
    new = integer("max_new_tokens", max_new_tokens, 1, longest - max(lengths))
    tables = batching.block_tables(len(lengths), max(lengths) + new, longest)
    cache = jax.eval_shape(lambda: flat.new_cache(tables))
    sizes = sorted({size for length in lengths for *_, size in batching.chunks(length, flat.options)})

    def compile_step(tokens: int, table: np.ndarray) -> Any:
        zeros = np.zeros(tokens, np.int32)
        batch = batching.batch_of(zeros, zeros, zeros, table, np.zeros(len(table), np.int32))
        return flat_step.lower(flat.leaves, flat.structure, batch, cache, flat.options).compile()

    steps = [*((size, tables[:1]) for size in sizes), (len(lengths), tables)]
    return [functools.partial(compile_step, *step) for step in steps]
