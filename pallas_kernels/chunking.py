"""Work on many tokens in chunks, so that no intermediate of size [tokens, heads, context] ever exists."""

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
