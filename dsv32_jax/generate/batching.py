"""Rows of token ids as flat batches of the host: pieces of prompts, block tables, padding."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jax import Array

from dsv32_jax.model.cache import BLOCK_SIZE
from dsv32_jax.model.model import Batch, Options
from pallas_kernels.paging import slots_of

__all__ = ["block_tables", "chunks", "host_batch", "padded", "prompt_batch"]

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
    kernels = options.runs_kernels
    smallest = SMALLEST_CHUNK_FOR_KERNELS if kernels else SMALLEST_CHUNK
    largest = LARGEST_CHUNK_FOR_KERNELS if kernels and not all_logits else LARGEST_CHUNK
    for start in range(0, length, largest):
        stop = min(start + largest, length)
        yield start, stop, padded(stop - start, smallest)


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
    return host_batch(
        ids=ids,
        positions=positions,
        slots=slots_of(positions, sequence, table[None]),
        sequence=sequence,
        block_tables=table[None],
        logit_rows=logit_rows,
    )


def host_batch(
    *,
    ids: np.ndarray | Array,
    positions: np.ndarray,
    slots: np.ndarray,
    sequence: np.ndarray,
    block_tables: np.ndarray,
    logit_rows: np.ndarray,
) -> Batch:
    """A batch whose arrays of the host are int32 and stay there.

    A jitted function takes them over in a tenth of the time of `jnp.asarray`.
    """
    return Batch(*map(_int32, (ids, positions, slots, sequence, block_tables, logit_rows)))


def _int32(array: np.ndarray | Array) -> Any:
    """The array with int32 values. Any, because jitted functions take NumPy arrays where a `Batch` has JAX's."""
    return array if isinstance(array, Array) else np.asarray(array, np.int32)
