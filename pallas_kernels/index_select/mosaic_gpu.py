"""Scores and selection on Hopper: the two kernels, chunk after chunk, over one buffer of scores."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import indexer_logits, top_k
from pallas_kernels.index_select.config import chunk_tokens
from pallas_kernels.indexer_logits import mosaic_gpu as logits_kernel
from pallas_kernels.paging import BLOCK_SIZE
from pallas_kernels.top_k import mosaic_gpu as selection_kernel

ROW_BLOCKS = 4
"""Rows of scores are a multiple of so many blocks: what the selection's copies take."""
UNROLLED = 32
"""Up to so many chunks are written out: a loop of XLA's launches small kernels of its own in every round."""


def unsupported(queries, head_weights, index, layer, block_tables, sequence, positions, k: int) -> str | None:
    """Says which arguments the two kernels do not take, and which they do; None if they take all."""
    width = -(-block_tables.shape[1] // ROW_BLOCKS) * ROW_BLOCKS * BLOCK_SIZE
    return indexer_logits.unsupported(queries, index) or top_k.unsupported((queries.shape[0], width), jnp.float32, k)


@functools.partial(jax.jit, static_argnames=("k", "chunk_bytes", "interpret"))
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
    chunk = chunk_tokens(count, max(1, chunk_bytes // (4 * width)))
    queries, head_weights = logits_kernel.pad_heads(queries, head_weights)
    pad = -count % chunk if chunk < count else 0
    # A last chunk's missing tokens are at position -1: they see nothing.
    sequence, positions = jnp.pad(sequence, (0, pad)), jnp.pad(positions, (0, pad), constant_values=-1)
    lengths = jnp.clip(positions + 1, 0, width)
    arrays = (queries, head_weights, index, layer, block_tables, sequence, positions)
    if chunk >= count:
        scores = logits_kernel.indexer_logits(*arrays, fill=False, interpret=interpret)
        return selection_kernel.top_k(scores, k, lengths=lengths, interpret=interpret)
    shares = logits_kernel.shares_of_parts(sequence, positions, block_tables, chunk)
    select = functools.partial(select_part, arrays, lengths, shares, tokens=chunk, interpret=interpret)
    chunks, chosen = (count + pad) // chunk, jnp.zeros((count + pad, k), jnp.int32)
    if chunks > UNROLLED:
        chosen = jax.lax.fori_loop(0, chunks, select, chosen)
    else:
        for number in range(chunks):
            chosen = select(jnp.int32(number), chosen)
    return chosen[:count]


@functools.partial(jax.jit, static_argnames=("tokens", "interpret"))
def select_part(
    arrays: tuple[jax.Array, ...],
    lengths: jax.Array,
    shares: jax.Array,
    number: jax.Array,
    chosen: jax.Array,
    *,
    tokens: int,
    interpret: Any,
) -> jax.Array:
    """`chosen` with the rows of part `number` written, in two launches; jitted, so that it is traced once."""
    part = logits_kernel.Part(number, tokens, shares)
    scores = logits_kernel.indexer_logits(*arrays, fill=False, part=part, interpret=interpret)
    into = selection_kernel.Part(number, chosen)
    return selection_kernel.top_k(scores, chosen.shape[1], lengths=lengths, part=into, interpret=interpret)
