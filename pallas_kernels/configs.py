"""Every configuration that an op can choose: what tests lower, and what the benchmark asks ptxas about."""

from typing import Any

from pallas_kernels.cache_write import config as cache_write
from pallas_kernels.indexer_logits import config as indexer_logits
from pallas_kernels.matmul import config as matmul
from pallas_kernels.moe_dispatch import config as moe_dispatch
from pallas_kernels.sparse_mla import config as sparse_mla
from pallas_kernels.top_k import config as top_k

CONFIGS: dict[str, list[Any]] = {
    "sparse_mla": sparse_mla.CONFIGS,
    "indexer_logits": indexer_logits.CONFIGS,
    "top_k": top_k.CONFIGS,
    "cache_write": cache_write.CONFIGS,
    "moe_dispatch": moe_dispatch.CONFIGS,
    **matmul.CONFIGS,
}
"""By kernel; each op lists its own in its `config.py`."""
