"""Scores and selection as one op that never holds all scores."""

import jax

from pallas_kernels.backend import resolve
from pallas_kernels.chunking import CHUNK_BYTES
from pallas_kernels.index_select import reference


def index_select(
    queries: jax.Array,
    head_weights: jax.Array,
    index: jax.Array,
    layer: int,
    block_tables: jax.Array,
    sequence: jax.Array,
    positions: jax.Array,
    *,
    k: int,
    chunk_bytes: int = CHUNK_BYTES,
    backend: str = "auto",
) -> jax.Array:
    """`top_k(indexer_logits(...), k)` in chunks of tokens; arguments as there.

    Returns:
      int32 [T, k] logical positions, -1 where fewer than k are visible.
    """
    resolve(backend, "index_select")
    return reference.index_select(
        queries, head_weights, index, layer, block_tables, sequence, positions, k, chunk_bytes
    )
