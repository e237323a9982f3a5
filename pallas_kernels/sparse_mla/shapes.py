"""Named shapes of `sparse_mla`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pallas_kernels.named_shape import K, Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseMLA(Shape):
    """`tokens` queries over `chosen` keys each out of `context`; in `sequences` sequences, evenly."""

    op: ClassVar[str] = "sparse_mla"
    tokens: int
    context: int
    cache: str = "bf16"
    sequences: int = 1
    heads: int = 128
    latent: int = 512
    rope: int = 64
    chosen: int = 2048


SHAPES: tuple[SparseMLA, ...] = (
    *(
        SparseMLA(name=f"prefill-{tokens}x{context}", tokens=tokens, context=context)
        for tokens, context in ((4096, 8 * K), (4096, 64 * K), (4096, 128 * K), (1024, 64 * K))
    ),
    *(
        SparseMLA(name=f"decode-{tokens}x{32 * K}", tokens=tokens, context=32 * K, cache="fp8", sequences=tokens)
        for tokens in (1, 8, 32, 64, 128)
    ),
    SparseMLA(name=f"prefill-fp8-4096x{64 * K}", tokens=4096, context=64 * K, cache="fp8"),
)
"""Those of DeepSeek-V3.2-Exp that are measured."""

TINY: tuple[SparseMLA, ...] = (
    SparseMLA(name="tiny-prefill", tokens=5, context=256, heads=4, chosen=64),
    SparseMLA(name="tiny-decode", tokens=3, context=128, sequences=3, cache="fp8", heads=4, chosen=64),
)
"""The same kinds of calls, small enough for the reference on a CPU."""

SMALL: tuple[SparseMLA, ...] = (
    SparseMLA(name="small-prefill", tokens=3, context=512, chosen=256),
    SparseMLA(name="small-decode", tokens=2, context=256, sequences=2, cache="fp8", chosen=256),
)
"""What the kernel takes, as small as it gets: for tools that slow a GPU down a hundred times."""
