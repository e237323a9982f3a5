"""Block tables: from a sequence's logical positions to the physical blocks and slots of the cache."""

import jax
import jax.numpy as jnp
import numpy as np

BLOCK_SIZE = 64
"""Tokens in one block of the cache."""


def physical_slots(positions: jax.Array, sequence: jax.Array, block_tables: jax.Array) -> jax.Array:
    """Returns slots (block * 64 + offset) of logical positions; -1 stays -1.

    Args:
      positions: int32 [T, K], logical positions in the token's sequence or -1.
      sequence: int32 [T], row of `block_tables`.
      block_tables: int32 [S, N], physical block of each logical block, -1 where there is none.

    Returns:
      int32 [T, K].
    """
    at = jnp.maximum(positions, 0)
    block = block_tables[sequence[:, None], at // BLOCK_SIZE]
    return jnp.where((positions >= 0) & (block >= 0), block * BLOCK_SIZE + at % BLOCK_SIZE, -1)


def slots_of(positions: np.ndarray, sequence: np.ndarray, block_tables: np.ndarray) -> np.ndarray:
    """`physical_slots` of one position for each token, [T], on the host."""
    block = block_tables[sequence, positions // BLOCK_SIZE]
    return np.where((positions >= 0) & (block >= 0), block * BLOCK_SIZE + positions % BLOCK_SIZE, -1)


def split_slots(slots: jax.Array, num_blocks: int) -> tuple[jax.Array, jax.Array]:
    """(block, offset) of slots for a scatter; a slot of -1 becomes a block past the end, which `mode="drop"` skips."""
    return jnp.where(slots >= 0, slots // BLOCK_SIZE, num_blocks), slots % BLOCK_SIZE
