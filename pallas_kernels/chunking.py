"""Loops over tokens in chunks, so that no intermediate of size [tokens, heads, context] exists, and over tiles."""

from collections.abc import Callable
from typing import Any

import jax

CHUNK_BYTES = 64 * 2**20


def map_tokens(f: Callable[..., Any], tokens: Any, *, bytes_per_token: int, chunk_bytes: int = CHUNK_BYTES) -> Any:
    """`f` of every token, vectorised over as many tokens at a time as `chunk_bytes` allows.

    Args:
      f: function of one token (the leaves of `tokens` without their leading axis).
      tokens: pytree of arrays [T, ...].
      bytes_per_token: the size of the largest intermediate of one token.
      chunk_bytes: budget for that intermediate over a whole chunk.

    Returns:
      What `f` returns, stacked: [T, ...].
    """
    count = jax.tree.leaves(tokens)[0].shape[0]
    chunk = max(1, chunk_bytes // max(1, bytes_per_token))
    if chunk >= count:
        return jax.vmap(f)(tokens)
    return jax.lax.map(f, tokens, batch_size=chunk)


def map_tiles(f: Callable[..., jax.Array], rows: Any, tile_expert: jax.Array, weights: Any) -> jax.Array:
    """`f(tile, weights of its expert)` of each tile of rows.

    Args:
      f: function of the rows of a tile and of `weights` without their leading axis, to [tile, N].
      rows: pytree of arrays [P, ...], in the order of a `RoutingPlan`.
      tile_expert: int32 [tiles], the expert of each tile of P / tiles rows.
      weights: pytree of arrays [E, ...].

    Returns:
      [P, N].
    """
    tiles = jax.tree.map(lambda x: x.reshape(tile_expert.shape[0], -1, x.shape[-1]), rows)
    out = jax.lax.map(lambda tile: f(tile[0], jax.tree.map(lambda w: w[tile[1]], weights)), (tiles, tile_expert))
    return out.reshape(-1, out.shape[-1])
