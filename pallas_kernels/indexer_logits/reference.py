"""The indexer's scores in plain jax.numpy: the specification."""

import jax
import jax.numpy as jnp

from pallas_kernels.cache_format import read_index_keys
from pallas_kernels.chunking import map_tokens


def scorer(index, layer, block_tables):
    """A function of one token (query [H, D], head weights [H], sequence, position) -> scores float32 [N * 64]."""
    keys, scales = read_index_keys(index, layer, block_tables)
    only = keys.shape[0] == 1  # one sequence: no copy of its keys for each token
    if keys.dtype == jnp.float8_e4m3fn:
        keys = keys.astype(jnp.bfloat16)  # exact, and products of e4m3 values are exact in float32

    def score(query, head_weights, sequence, position):
        at = 0 if only else sequence
        dots = jnp.einsum(
            "hd,ld->hl",
            query.astype(keys.dtype),
            keys[at],
            precision="highest",
            preferred_element_type=jnp.float32,
        )
        total = jnp.einsum("hl,h->l", jax.nn.relu(dots), head_weights, precision="highest")
        if scales is not None:
            total = total * scales[at]
        return jnp.where(jnp.arange(total.shape[0]) <= position, total, -jnp.inf)

    return score


def token_bytes(queries, block_tables):
    return 4 * queries.shape[1] * block_tables.shape[1] * 64


def indexer_logits(queries, head_weights, index, layer, block_tables, sequence, positions, chunk_bytes):
    score = scorer(index, layer, block_tables)
    return map_tokens(
        lambda token: score(*token),
        (queries, head_weights, sequence, positions),
        bytes_per_token=token_bytes(queries, block_tables),
        chunk_bytes=chunk_bytes,
    )
