"""Scores and selection, one chunk of tokens at a time: the specification."""

from pallas_kernels.chunking import map_tokens
from pallas_kernels.indexer_logits.reference import scorer, token_bytes
from pallas_kernels.top_k.reference import top_k


def index_select(queries, head_weights, index, layer, block_tables, sequence, positions, k, chunk_bytes):
    score = scorer(index, layer, block_tables)
    return map_tokens(
        lambda token: top_k(score(*token), k),
        (queries, head_weights, sequence, positions),
        bytes_per_token=token_bytes(queries, block_tables),
        chunk_bytes=chunk_bytes,
    )
