"""Named shapes of `cache_write`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pallas_kernels.named_shape import K, Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheWrite(Shape):
    """`tokens` new tokens into the FP8 cache."""

    op: ClassVar[str] = "cache_write"
    tokens: int
    latent: int = 512
    rope: int = 64
    dim: int = 128


SHAPES: tuple[CacheWrite, ...] = tuple(CacheWrite(name=str(tokens), tokens=tokens) for tokens in (64 * K, 4096, 64))
"""Those of DeepSeek-V3.2-Exp that are measured."""

TINY: tuple[CacheWrite, ...] = (CacheWrite(name="tiny", tokens=7),)
"""The same kinds of calls, small enough for the reference on a CPU."""

SMALL: tuple[CacheWrite, ...] = (CacheWrite(name="small", tokens=70),)
"""What the kernel takes, as small as it gets: for tools that slow a GPU down a hundred times."""
