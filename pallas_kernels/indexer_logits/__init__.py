"""Scores of the lightning indexer over a paged context."""

import jax

from pallas_kernels.backend import resolve
from pallas_kernels.chunking import CHUNK_BYTES
from pallas_kernels.indexer_logits import reference


def indexer_logits(
    queries: jax.Array,
    head_weights: jax.Array,
    index: jax.Array,
    layer: int,
    block_tables: jax.Array,
    sequence: jax.Array,
    positions: jax.Array,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    backend: str = "auto",
) -> jax.Array:
    """I[t, s] = key_scale[s] * sum_h w[t, h] * relu(q[t, h] . k[s]) for s <= position of t, else -inf.

    Source: DeepSeek-V3.2-Exp report, equation 1; `fp8_index` in the official `inference/kernel.py`.

    Args:
      queries: [T, H, D]; float8_e4m3fn values when the keys are FP8 (their scales belong into `head_weights`).
      head_weights: float32 [T, H], every factor of the query side included.
      index: the cache of index keys, all layers (see `cache_write`).
      layer: which layer.
      block_tables: int32 [S, N].
      sequence: int32 [T], row of the block tables.
      positions: int32 [T], position of each token; -1 for padding, whose row is all -inf.
      chunk_bytes: budget for [tokens, H, N * 64] float32, which never exists whole.
      backend: "auto" or "reference".

    Returns:
      float32 [T, N * 64].
    """
    resolve(backend, "indexer_logits")
    return reference.indexer_logits(queries, head_weights, index, layer, block_tables, sequence, positions, chunk_bytes)
