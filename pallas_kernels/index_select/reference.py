"""Scores and selection, one chunk of tokens at a time: the specification."""

import jax

from pallas_kernels.chunking import map_tokens
from pallas_kernels.indexer_logits.reference import scorer, token_bytes
from pallas_kernels.top_k.reference import top_k


def index_select(queries, head_weights, index, layer, block_tables, sequence, positions, k, chunk_bytes):
    score = scorer(index, layer, block_tables)

    def select(token):
        with jax.named_scope("indexer_logits"):
            scores = score(*token)
        with jax.named_scope("top_k"):
            return top_k(scores, k)

    return map_tokens(
        select,
        (queries, head_weights, sequence, positions),
        bytes_per_token=token_bytes(queries, block_tables),
        chunk_bytes=chunk_bytes,
    )
