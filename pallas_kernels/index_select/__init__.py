"""Scores and selection as one op that never holds all scores."""

import jax

from pallas_kernels import mosaic
from pallas_kernels.arguments import check_size
from pallas_kernels.backend import KERNEL, launched, resolve
from pallas_kernels.index_select import mosaic_gpu, reference
from pallas_kernels.indexer_logits import check_arguments, check_forms
from pallas_kernels.operators import callable_package

__all__ = ["SCORE_BYTES", "index_select"]

callable_package(__name__)

SCORE_BYTES = 100 * 2**20
"""The default budget: a tenth of the scores of 4096 tokens over 65,536 keys; 396 tokens a chunk there."""


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
    chunk_bytes: int = SCORE_BYTES,
    backend: str = "auto",
) -> jax.Array:
    """`top_k(indexer_logits(...), k)` in chunks of tokens, so that scores take at most `chunk_bytes` of memory.

    Source: DeepSeek-V3.2-Exp report, section 1 (lightning indexer and token selection).

    Args:
      queries, head_weights, index, layer, block_tables, sequence, positions: see `indexer_logits`.
      k: how many positions a token gets.
      chunk_bytes: budget for the scores of a chunk; one token's scores are always held whole. In the reference these
        are [tokens, heads, context] float32, in the kernels [tokens, context].
      backend: "auto", "mosaic_gpu", "interpret" or "reference".

    Returns:
      int32 [T, k] logical positions, present ones first, then -1 where fewer than k are visible.

    Raises:
      ValueError: as of `indexer_logits`, or k is no int or less than 1.
      BackendError: a named kernel backend does not take these arguments, or there is no such GPU.
    """
    arguments = (queries, head_weights, index, layer, block_tables, sequence, positions)
    check_arguments("index_select", *arguments)
    check_size("index_select", k=k)
    chosen = resolve(backend, "index_select", KERNEL, mosaic_gpu.unsupported(*arguments, k))
    check_forms("index_select", queries, index)
    if chosen == "reference":
        return reference.index_select(*arguments, k, chunk_bytes)
    interpret = mosaic.interpret_on(chosen)
    # Positions have no gradient, in the reference either; the kernels are not differentiated to find that out.
    queries, head_weights, index = jax.lax.stop_gradient((queries, head_weights, index))
    rest = (layer, block_tables, sequence, positions)

    def kernel(*arrays: jax.Array) -> jax.Array:
        return mosaic_gpu.index_select(*arrays, *rest, k, chunk_bytes, interpret)

    return launched(kernel, "index_select", chosen)(queries, head_weights, index)
