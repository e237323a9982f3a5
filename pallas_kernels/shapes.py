"""The named shapes of all ops, which tests and benchmarks share; each op has its own in its `shapes.py`."""

from pallas_kernels.cache_write import shapes as cache_write
from pallas_kernels.index_select import shapes as index_select
from pallas_kernels.indexer_logits import shapes as indexer_logits
from pallas_kernels.matmul import shapes as matmul
from pallas_kernels.moe_dispatch import shapes as moe_dispatch
from pallas_kernels.named_shape import Shape
from pallas_kernels.quantize import shapes as quantize
from pallas_kernels.sparse_mla import shapes as sparse_mla
from pallas_kernels.top_k import shapes as top_k

_OPS = {
    "sparse_mla": sparse_mla,
    "indexer_logits": indexer_logits,
    "top_k": top_k,
    "index_select": index_select,
    "cache_write": cache_write,
    "quantize": quantize,
    "moe_dispatch": moe_dispatch,
}

SHAPES: dict[str, tuple[Shape, ...]] = {op: module.SHAPES for op, module in _OPS.items()} | matmul.SHAPES
"""By op: the shapes of DeepSeek-V3.2-Exp that are measured."""

TINY: dict[str, tuple[Shape, ...]] = {op: module.TINY for op, module in _OPS.items()} | matmul.TINY
"""The same kinds of calls, small enough for the reference on a CPU."""

SMALL: dict[str, tuple[Shape, ...]] = {op: module.SMALL for op, module in _OPS.items()} | matmul.SMALL
"""What the kernels take, as small as it gets: for tools that slow a GPU down a hundred times."""
