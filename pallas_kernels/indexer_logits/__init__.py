"""Scores of the lightning indexer over a paged context."""

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic
from pallas_kernels.backend import KERNEL, resolve, without_gradient
from pallas_kernels.chunking import CHUNK_BYTES
from pallas_kernels.indexer_logits import mosaic_gpu, reference
from pallas_kernels.indexer_logits.mosaic_gpu import unsupported

__all__ = ["indexer_logits", "unsupported"]


def indexer_logits(
    queries: jax.Array,
    head_weights: jax.Array,
    index: jax.Array,
    layer: int | jax.Array,
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
      layer: which layer; an array does as well.
      block_tables: int32 [S, N], -1 where there is no block; a token's blocks up to its position must be there.
      sequence: int32 [T], row of the block tables. The kernel is fast where tokens of a sequence are neighbours.
      positions: int32 [T], position of each token; -1 for padding, whose row is all -inf.
      chunk_bytes: budget of the reference for [tokens, H, N * 64] float32, which never exists whole.
      backend: "auto", "mosaic_gpu", "interpret" or "reference". The kernel takes the FP8 form with keys of width 128
        and up to 64 heads; it has no gradient.

    Returns:
      float32 [T, N * 64].

    Raises:
      ValueError: shapes do not go together, or no such layer.
    """
    count, heads, _ = queries.shape
    if head_weights.shape != (count, heads):
        raise ValueError(f"head_weights of shape {head_weights.shape} do not go with queries of shape {queries.shape}")
    if sequence.shape != (count,) or positions.shape != (count,):
        raise ValueError(
            f"sequence of shape {sequence.shape} and positions of shape {positions.shape} are not [T] of queries of "
            f"shape {queries.shape}"
        )
    if isinstance(layer, int) and not 0 <= layer < index.shape[0]:
        raise ValueError(f"layer {layer} is not in a cache of {index.shape[0]} layers")
    chosen = resolve(backend, "indexer_logits", KERNEL, unsupported(queries, index))
    if chosen == "reference":
        return reference.indexer_logits(
            queries, head_weights, index, layer, block_tables, sequence, positions, chunk_bytes
        )

    def kernel(*arrays: jax.Array) -> jax.Array:
        return mosaic_gpu.indexer_logits(*arrays, interpret=mosaic.interpret_on(chosen))

    layer = jnp.asarray(layer, jnp.int32)
    arrays = (queries, head_weights, index, layer, block_tables, sequence, positions)
    return without_gradient(kernel, "indexer_logits")(*arrays)
