"""Named shapes of `top_k`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pallas_kernels.named_shape import K, Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(Shape):
    """`tokens` rows of `context` scores."""

    op: ClassVar[str] = "top_k"
    tokens: int
    context: int
    chosen: int = 2048


SHAPES: tuple[TopK, ...] = tuple(
    TopK(name=f"{tokens}x{context}", tokens=tokens, context=context)
    for tokens, context in ((1, 128 * K), (64, 32 * K), (64, 128 * K), (1024, 32 * K), (4096, 64 * K))
)
"""Those of DeepSeek-V3.2-Exp that are measured."""

TINY: tuple[TopK, ...] = (TopK(name="tiny", tokens=3, context=256, chosen=16),)
"""The same kinds of calls, small enough for the reference on a CPU."""

SMALL: tuple[TopK, ...] = (
    TopK(name="small-few", tokens=3, context=8192, chosen=512),
    TopK(name="small-many", tokens=270, context=2048, chosen=512),
)
"""What the kernel takes, as small as it gets: for tools that slow a GPU down a hundred times."""
