"""Scores and selection on Hopper: the two kernels, chunk after chunk, over one buffer of scores."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import indexer_logits, top_k, tuning
from pallas_kernels.indexer_logits import mosaic_gpu as logits_kernel
from pallas_kernels.paging import BLOCK_SIZE
from pallas_kernels.top_k import mosaic_gpu as selection_kernel

ROW_BLOCKS = 4
"""Rows of scores are a multiple of so many blocks: what the selection's copies take."""


def unsupported(queries, head_weights, index, layer, block_tables, sequence, positions, k: int) -> str | None:
    """What the two kernels do not take of these arguments; None if they take all."""
    width = -(-block_tables.shape[1] // ROW_BLOCKS) * ROW_BLOCKS * BLOCK_SIZE
    return indexer_logits.unsupported(queries, index) or top_k.unsupported((queries.shape[0], width), jnp.float32, k)


def index_select(
    queries: jax.Array,
    head_weights: jax.Array,
    index: jax.Array,
    layer: int | jax.Array,
    block_tables: jax.Array,
    sequence: jax.Array,
    positions: jax.Array,
    k: int,
    chunk_bytes: int,
    interpret: Any = None,
) -> jax.Array:
    """See `pallas_kernels.index_select`."""
    count = queries.shape[0]
    if count == 0:
        return jnp.zeros((0, k), jnp.int32)
    block_tables = jnp.pad(block_tables, ((0, 0), (0, -block_tables.shape[1] % ROW_BLOCKS)), constant_values=-1)
    width = block_tables.shape[1] * BLOCK_SIZE

    def select(tokens: tuple[jax.Array, ...]) -> jax.Array:
        queries, head_weights, sequence, positions = tokens
        scores = logits_kernel.indexer_logits(
            queries, head_weights, index, layer, block_tables, sequence, positions, fill=False, interpret=interpret
        )
        return selection_kernel.top_k(scores, k, lengths=jnp.minimum(positions + 1, width), interpret=interpret)

    chunk = tuning.index_select_chunk(count, max(1, chunk_bytes // (4 * width)))
    tokens = (queries, head_weights, sequence, positions)
    if chunk >= count:
        return select(tokens)
    pad = -count % chunk

    def chunked(x: jax.Array, padding: int = 0) -> jax.Array:
        x = jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1), constant_values=padding)
        return x.reshape(-1, chunk, *x.shape[1:])

    # Padding tokens see nothing: their position is -1.
    chunks = (chunked(queries), chunked(head_weights), chunked(sequence), chunked(positions, -1))
    return jax.lax.map(select, chunks).reshape(-1, k)[:count]
