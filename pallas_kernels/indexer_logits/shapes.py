"""Named shapes of `indexer_logits`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pallas_kernels.named_shape import K, Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexerLogits(Shape):
    """The last `tokens / sequences` tokens of each sequence, scored against its `context` FP8 keys."""

    op: ClassVar[str] = "indexer_logits"
    tokens: int
    context: int
    sequences: int = 1
    heads: int = 64
    dim: int = 128


SHAPES: tuple[IndexerLogits, ...] = (
    *(
        IndexerLogits(name=f"prefill-{tokens}x{context}", tokens=tokens, context=context)
        for tokens, context in ((1024, 64 * K), (4096, 64 * K), (4096, 128 * K))
    ),
    *(
        IndexerLogits(name=f"decode-{tokens}x{context}", tokens=tokens, context=context, sequences=tokens)
        for tokens, context in ((1, 128 * K), (64, 128 * K), (64, 32 * K))
    ),
)
"""Those of DeepSeek-V3.2-Exp that are measured."""

TINY: tuple[IndexerLogits, ...] = (
    IndexerLogits(name="tiny-prefill", tokens=6, context=256, heads=4),
    IndexerLogits(name="tiny-decode", tokens=2, context=128, sequences=2, heads=4),
)
"""The same kinds of calls, small enough for the reference on a CPU."""

SMALL: tuple[IndexerLogits, ...] = (
    IndexerLogits(name="small-prefill", tokens=7, context=512),
    IndexerLogits(name="small-decode", tokens=2, context=512, sequences=2),
)
"""What the kernel takes, as small as it gets: for tools that slow a GPU down a hundred times."""
