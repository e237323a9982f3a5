"""The named shapes of DeepSeek-V3.2-Exp that tests, tuning and benchmarks share.

A shape says how large a call of an op is, which published kernel does the same work (`peers`), and how fast the op
should be (`target`). Nothing here imports JAX.
"""

from pallas_kernels.shapes import attention, experts
from pallas_kernels.shapes.attention import Attention, CacheWrite, IndexerLogits, IndexSelect, SparseMLA, TopK
from pallas_kernels.shapes.base import PeerRow, Shape, Target
from pallas_kernels.shapes.experts import GroupedMatmul, Matmul, MoEDispatch, MoELayer, Quantize

__all__ = [
    "SHAPES",
    "SMALL",
    "TINY",
    "Attention",
    "CacheWrite",
    "GroupedMatmul",
    "IndexSelect",
    "IndexerLogits",
    "Matmul",
    "MoEDispatch",
    "MoELayer",
    "PeerRow",
    "Quantize",
    "Shape",
    "SparseMLA",
    "Target",
    "TopK",
]

SHAPES: dict[str, tuple[Shape, ...]] = {**attention.SHAPES, **experts.SHAPES}
"""By op: the shapes of the full model that are measured."""

TINY: dict[str, tuple[Shape, ...]] = {**attention.TINY, **experts.TINY}
"""The same kinds of calls, small enough for the reference on a CPU."""

SMALL: dict[str, tuple[Shape, ...]] = {**attention.SMALL, **experts.SMALL}
"""What the kernels take, as small as it gets: for tools that slow a GPU down a hundred times."""
