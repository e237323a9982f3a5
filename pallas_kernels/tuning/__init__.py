"""Tile sizes of the kernels: one frozen config a kernel, and which one a shape gets.

The choice is a plain function of shapes, so a program compiles the same kernel on every machine and in every run. Each
config that a function here can return is listed in `CONFIGS`; a test lowers them all.
"""

from pallas_kernels.tuning.attention import (
    CACHE_WRITE,
    INDEXER_DECODE,
    INDEXER_DECODE_PAIRS,
    INDEXER_PREFILL,
    SPARSE_MLA_BF16,
    SPARSE_MLA_FP8,
    TOP_K_FEW,
    TOP_K_INTERPRETED,
    TOP_K_LIMIT,
    TOP_K_MANY,
    CacheWrite,
    IndexerLogits,
    SparseMLA,
    TopK,
    index_select_chunk,
    indexer_logits,
    sparse_mla,
    top_k,
)
from pallas_kernels.tuning.base import CONFIGS, SHARED_BYTES, SMS, distinct
from pallas_kernels.tuning.routing import MoEPlan, moe_plan

__all__ = [
    "CACHE_WRITE",
    "CONFIGS",
    "INDEXER_DECODE",
    "INDEXER_DECODE_PAIRS",
    "INDEXER_PREFILL",
    "SHARED_BYTES",
    "SMS",
    "SPARSE_MLA_BF16",
    "SPARSE_MLA_FP8",
    "TOP_K_FEW",
    "TOP_K_INTERPRETED",
    "TOP_K_LIMIT",
    "TOP_K_MANY",
    "CacheWrite",
    "IndexerLogits",
    "MoEPlan",
    "SparseMLA",
    "TopK",
    "distinct",
    "index_select_chunk",
    "indexer_logits",
    "moe_plan",
    "sparse_mla",
    "top_k",
]
