"""Rows of token ids as flat batches: pieces of prompts, block tables, padding.

With these a loop of steps of one's own is short; `experiments/generate_jitted.py` is one in a single compiled program:

    rows = m.rows(["The lighthouse", "To install a package on Debian, you"])  # lists of ids, checked
    tables = block_tables(len(rows), max(map(len, rows)) + new_tokens, m.config.max_position_embeddings)
    cache = KVCache.create(m.config, tables.size, m.options)
    model = m.prepared_model()
    logits, cache = model(batch_of(ids, positions, sequence, tables, logit_rows), cache, m.options)

The last line belongs into a jitted function, to which the cache is donated.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv32_jax.model.cache import BLOCK_SIZE
from dsv32_jax.model.model import Batch, Options
from pallas_kernels.paging import physical_slots, slots_of

__all__ = ["batch_of", "block_tables", "chunks", "padded", "prompt_batch", "prompt_pieces"]

# A prompt is read in pieces of a power of two between these, so that `step` is compiled for few shapes.
SMALLEST_CHUNK, LARGEST_CHUNK = 16, 512
SMALLEST_CHUNK_FOR_KERNELS, LARGEST_CHUNK_FOR_KERNELS = 128, 2048
"""With kernels a shorter piece saves little time, since weights are read for it all the same, and must be compiled; a
piece of 2048 tokens takes twice the time of one of 512. References would need memory for every head's scores."""


def padded(length: int, smallest: int) -> int:
    """The smallest power of two that is at least `length` and at least `smallest`, itself a power of two."""
    return max(smallest, 1 << (length - 1).bit_length())


def chunks(length: int, options: Options, *, all_logits: bool = False) -> Iterator[tuple[int, int, int]]:
    """Yields (start, stop, size) of the pieces of a prompt; size is the power of two that the piece is padded to.

    Pieces whose logits are all returned stay short: those of 2048 tokens would take a gigabyte.
    """
    smallest, largest = _chunk_sizes(options, all_logits)
    for start in range(0, length, largest):
        stop = min(start + largest, length)
        yield start, stop, padded(stop - start, smallest)


def _chunk_sizes(options: Options, all_logits: bool = False) -> tuple[int, int]:
    """The smallest and the largest size of a prompt's pieces."""
    if not options.runs_kernels:
        return SMALLEST_CHUNK, LARGEST_CHUNK
    return SMALLEST_CHUNK_FOR_KERNELS, LARGEST_CHUNK if all_logits else LARGEST_CHUNK_FOR_KERNELS


def block_tables(rows: int, tokens: int, max_tokens: int) -> np.ndarray:
    """Block tables for rows of up to `tokens` tokens.

    Args:
      rows: their number.
      tokens: of the longest row.
      max_tokens: of any row, the config's `max_position_embeddings`.

    Returns:
      int32 [rows, N]: row r has the blocks r*N .. (r+1)*N - 1. N is a power of two, so that few shapes are compiled.
    """
    blocks = 1 << (-(-tokens // BLOCK_SIZE) - 1).bit_length()
    blocks = min(blocks, -(-max_tokens // BLOCK_SIZE))
    return np.arange(rows * blocks, dtype=np.int32).reshape(rows, blocks)


def prompt_batch(row: list[int], start: int, stop: int, size: int, table: np.ndarray, logit_rows: np.ndarray) -> Batch:
    """Tokens start..stop of one row as a flat batch of `size` tokens; padding has position and slot -1."""
    positions, sequence = np.arange(start, start + size), np.zeros(size, np.int32)
    positions[stop - start :] = -1
    ids = np.zeros(size, np.int32)
    ids[: stop - start] = row[start:stop]
    return batch_of(ids, positions, sequence, table[None], logit_rows)


def prompt_pieces(rows: list[list[int]], tables: np.ndarray, options: Options) -> Batch:
    """All tokens of all rows, one row after the other, in pieces for `jax.lax.scan`; NumPy arrays.

    Args:
      rows: B rows of ids, see `LanguageModel.rows`.
      tables: int32 [B, N], see `block_tables`.
      options: of the run; with kernels pieces are larger.

    Returns:
      A batch whose arrays have the piece as their first axis. `logit_rows` [pieces, B] has the last token of each row,
      in the piece that has it, and else -1: the sum of all pieces' logits [B, V] is those after every prompt.
    """
    lengths = np.array([len(row) for row in rows])
    ends = np.cumsum(lengths)
    smallest, largest = _chunk_sizes(options)
    size = min(padded(int(ends[-1]), smallest), largest)
    pieces = -(-int(ends[-1]) // size)

    def flat(values: np.ndarray, padding: int) -> np.ndarray:
        return np.pad(values, (0, pieces * size - len(values)), constant_values=padding)

    batch = batch_of(
        flat(np.concatenate(rows), 0),
        flat(np.concatenate([np.arange(length) for length in lengths]), -1),
        flat(np.repeat(np.arange(len(rows)), lengths), 0),
        tables,
        np.where(np.arange(pieces)[:, None] == (ends - 1) // size, (ends - 1) % size, -1),
    )
    of_tokens = {name: getattr(batch, name).reshape(pieces, size) for name in ("ids", "positions", "slots", "sequence")}
    of_pieces: Any = np.broadcast_to(batch.block_tables, (pieces, *tables.shape))
    return dataclasses.replace(batch, **of_tokens, block_tables=of_pieces)


def batch_of(
    ids: np.ndarray | Array,
    positions: np.ndarray | Array,
    sequence: np.ndarray | Array,
    tables: np.ndarray | Array,
    logit_rows: np.ndarray | Array,
) -> Batch:
    """The batch of these tokens, whose slots follow from their positions.

    On the host, where all but the ids are NumPy arrays, it has NumPy arrays, which a jitted function takes over in a
    tenth of the time of `jnp.asarray`; in a jitted function it has that function's.

    Args:
      ids, positions, sequence: integers [T], as in `Batch`; padding has position -1, and any id of the vocabulary.
      tables: int32 [S, N], see `block_tables`; positions must be less than 64 N.
      logit_rows: integers [R], as in `Batch`.
    """
    on_host = not any(isinstance(array, Array) for array in (positions, sequence, tables))
    xp: Any = np if on_host else jnp
    at, table_rows = xp.asarray(positions), xp.asarray(tables)
    of = xp.where(at >= 0, sequence, 0)
    slots = slots_of(at, of, table_rows) if on_host else physical_slots(at[:, None], of, table_rows)[:, 0]
    return Batch(*map(_int32, (ids, at, slots, of, table_rows, logit_rows)))


def _int32(array: np.ndarray | Array) -> Any:
    """The array with int32 values. Any, because jitted functions take NumPy arrays where a `Batch` has JAX's."""
    return array.astype(jnp.int32) if isinstance(array, Array) else np.asarray(array, np.int32)
