"""Latent attention in plain jax.numpy, sparse and dense: the specification."""

import jax
import jax.numpy as jnp

from pallas_kernels.cache_format import unpack_rows
from pallas_kernels.chunking import map_tokens
from pallas_kernels.paging import BLOCK_SIZE


def attend(query: jax.Array, keys: jax.Array, values: jax.Array, valid: jax.Array, scale: float):
    """Attends for one token: query [H, D] over keys [K, D] and values [K, V] where `valid` [K].

    Returns out [H, V], lse [H] and probabilities [H, K]. Scores and softmax are float32; probabilities are rounded to
    the query's dtype for the second product.
    """
    scores = jnp.einsum("hd,kd->hk", query, keys, precision="highest", preferred_element_type=jnp.float32) * scale
    scores = jnp.where(valid, scores, -jnp.inf)
    # The maximum of a row without keys is -inf; 0 in its place keeps every exponent finite.
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0, top))
    total = weights.sum(-1, keepdims=True)
    probabilities = weights / jnp.where(total == 0, 1, total)
    out = jnp.einsum(
        "hk,kd->hd",
        probabilities.astype(query.dtype),
        values,
        precision="highest",
        preferred_element_type=jnp.float32,
    )
    return out.astype(query.dtype), (top + jnp.log(total))[:, 0], probabilities


def sparse_mla(queries, kv, layer, slots, lengths, scale, rope_dim, chunk_bytes):
    value_dim = queries.shape[-1] - rope_dim
    if lengths is None:
        lengths = jnp.full(slots.shape[0], slots.shape[1], jnp.int32)

    def one_token(token):
        query, chosen, length = token
        valid = (chosen >= 0) & (jnp.arange(chosen.shape[0]) < length)
        at = jnp.where(valid, chosen, 0)
        rows = unpack_rows(kv[layer, at // BLOCK_SIZE, at % BLOCK_SIZE], rope_dim, query.dtype)
        # Absent rows are zeroed too: slot 0 may hold anything, and 0 * NaN is NaN.
        rows = jnp.where(valid[:, None], rows, 0)
        return attend(query, rows, rows[:, :value_dim], valid, scale)[:2]

    largest = slots.shape[1] * max(queries.shape[2], queries.shape[1]) * 4
    return map_tokens(one_token, (queries, slots, lengths), bytes_per_token=largest, chunk_bytes=chunk_bytes)


def dense_mla(
    queries: jax.Array,
    context: jax.Array,
    sequence: jax.Array,
    positions: jax.Array,
    *,
    scale: float,
    rope_dim: int,
    chunk_bytes: int,
    mean_probabilities: bool = False,
):
    """Computes causal attention over the whole context: what sparse attention replaces, in chunks of tokens.

    Args:
      queries: [T, H, latent + rope].
      context: [S, L, latent + rope], finite everywhere.
      sequence: int32 [T], row of the context.
      positions: int32 [T]; keys at or before it are seen, none for -1.
      scale: of the scores.
      rope_dim: width of the rope part.
      chunk_bytes: budget for the scores [tokens, H, L] of a chunk.
      mean_probabilities: return the probabilities' mean over heads instead, float32 [T, L].

    Returns:
      out [T, H, latent] (or the mean probabilities).
    """
    value_dim = queries.shape[-1] - rope_dim

    def one_token(token):
        query, row, position = token
        rows = context[0 if context.shape[0] == 1 else row]
        seen = jnp.arange(rows.shape[0]) <= position
        out, _, probabilities = attend(query, rows, rows[:, :value_dim], seen, scale)
        return probabilities.mean(0) if mean_probabilities else out

    largest = 4 * context.shape[1] * max(queries.shape[1], context.shape[2])
    return map_tokens(one_token, (queries, sequence, positions), bytes_per_token=largest, chunk_bytes=chunk_bytes)
