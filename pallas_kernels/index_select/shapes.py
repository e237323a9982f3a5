"""Named shapes of `index_select`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pallas_kernels.named_shape import K, Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexSelect(Shape):
    """`tokens` queries that select `chosen` of `context` FP8 keys each; in `sequences` sequences, evenly."""

    op: ClassVar[str] = "index_select"
    tokens: int
    context: int
    sequences: int = 1
    heads: int = 64
    dim: int = 128
    chosen: int = 2048


SHAPES: tuple[IndexSelect, ...] = (
    IndexSelect(name=f"prefill-4096x{64 * K}", tokens=4096, context=64 * K),
    IndexSelect(name=f"decode-64x{128 * K}", tokens=64, context=128 * K, sequences=64),
)
"""Those of DeepSeek-V3.2-Exp that are measured."""

TINY: tuple[IndexSelect, ...] = (IndexSelect(name="tiny", tokens=4, context=256, heads=4, chosen=16),)
"""The same kinds of calls, small enough for the reference on a CPU."""

SMALL: tuple[IndexSelect, ...] = (IndexSelect(name="small", tokens=5, context=512, chosen=128),)
"""What the kernel takes, as small as it gets: for tools that slow a GPU down a hundred times."""
