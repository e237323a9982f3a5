"""Scores of the lightning indexer over a paged context."""

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic
from pallas_kernels.arguments import E4M3, FLOAT32, FLOATS, INT32, check, check_layer
from pallas_kernels.backend import KERNEL, launched, resolve, without_gradient
from pallas_kernels.cache_format import index_block_bytes
from pallas_kernels.chunking import CHUNK_BYTES
from pallas_kernels.indexer_logits import mosaic_gpu, reference
from pallas_kernels.indexer_logits.mosaic_gpu import unsupported
from pallas_kernels.operators import callable_package

__all__ = ["indexer_logits", "unsupported"]

callable_package(__name__)


def check_arguments(op, queries, head_weights, index, layer, block_tables, sequence, positions) -> None:
    """Raises ValueError for arguments of `indexer_logits` that have other dtypes or ranks, or do not go together."""
    of_index = "layers blocks bytes" if getattr(index, "dtype", None) == jnp.uint8 else "layers blocks 64 D"
    check(
        op,
        queries=(queries, (*FLOATS, *E4M3), "T H D"),
        head_weights=(head_weights, FLOAT32, "T H"),
        index=(index, (*FLOATS, "uint8"), of_index),
        block_tables=(block_tables, INT32, "S N"),
        sequence=(sequence, INT32, "T"),
        positions=(positions, INT32, "T"),
    )
    count, heads, _ = queries.shape
    if head_weights.shape != (count, heads):
        raise ValueError(f"head_weights of shape {head_weights.shape} do not go with queries of shape {queries.shape}")
    if sequence.shape != (count,) or positions.shape != (count,):
        raise ValueError(
            f"sequence of shape {sequence.shape} and positions of shape {positions.shape} are not [T] of queries of "
            f"shape {queries.shape}"
        )
    check_layer(op, layer, index.shape[0])


def check_forms(op: str, queries: jax.Array, index: jax.Array) -> None:
    """Raises ValueError if the queries and the cache of index keys are not of one form and width."""
    fp8, width = index.dtype == jnp.uint8, queries.shape[2]
    if fp8 != (queries.dtype == jnp.float8_e4m3fn):
        form = "FP8 (uint8) needs queries float8_e4m3fn" if fp8 else f"{index.dtype} needs float queries"
        raise ValueError(f"{op}: an index in {form}, not {queries.dtype}")
    if index.shape[2:] != ((index_block_bytes(width),) if fp8 else (64, width)):
        raise ValueError(f"{op}: an index of shape {index.shape} does not hold keys of width {width}, as queries have")


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
      index: the cache of index keys, all layers (see `cache_format`).
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
      ValueError: other dtypes or ranks than these, shapes or forms do not go together, or no such layer.
      BackendError: the kernel was asked for and does not take these arguments, or there is no such GPU.
    """
    arrays = (queries, head_weights, index, layer, block_tables, sequence, positions)
    check_arguments("indexer_logits", *arrays)
    chosen = resolve(backend, "indexer_logits", KERNEL, unsupported(queries, index))
    check_forms("indexer_logits", queries, index)
    if chosen == "reference":
        return reference.indexer_logits(*arrays, chunk_bytes)

    def kernel(*arrays: jax.Array) -> jax.Array:
        return mosaic_gpu.indexer_logits(*arrays, interpret=mosaic.interpret_on(chosen))

    layer = jnp.asarray(layer, jnp.int32)
    arrays = (queries, head_weights, index, layer, block_tables, sequence, positions)
    return without_gradient(launched(kernel, "indexer_logits", chosen), "indexer_logits")(*arrays)
