"""What `dsv32 bench` measures: the named shapes of the ops, and those of a layer's whole attention."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pallas_kernels import shapes
from pallas_kernels.named_shape import K, Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention(Shape):
    """Indexer, selection and sparse attention of one layer, queries already projected.

    `kind` says what it stands beside: "prefill" a whole prompt (`tokens` = `context`), causal flash attention; "decode"
    one token of each sequence, dense attention over the latents; "masked" some queries over a long context, dense
    scores with everything masked that was not chosen, which is the form of the official demo.
    """

    op: ClassVar[str] = "attention"
    kind: str
    tokens: int
    context: int
    sequences: int = 1
    cache: str = "bf16"
    heads: int = 128
    latent: int = 512
    rope: int = 64
    index_heads: int = 64
    dim: int = 128
    chosen: int = 2048
    chunk: int = 8192
    """Tokens that a prefill handles at a time."""
    room: int = 0
    """Tokens of a cache that is larger than `sequences` contexts."""


ATTENTION: tuple[Attention, ...] = (
    *(
        Attention(name=f"prefill-{length}", kind="prefill", tokens=length, context=length, room=128 * K)
        for length in (1 * K, 2 * K, 4 * K, 8 * K, 16 * K, 32 * K, 64 * K, 128 * K)
    ),
    *(
        Attention(
            name=f"decode-{tokens}x{32 * K}",
            kind="decode",
            tokens=tokens,
            context=32 * K,
            sequences=tokens,
            cache="fp8",
        )
        for tokens in (1, 8, 32, 64, 128)
    ),
    Attention(name=f"masked-1024x{32 * K}", kind="masked", tokens=1024, context=32 * K),
)

TINY_ATTENTION: tuple[Attention, ...] = (
    Attention(
        name="tiny-prefill", kind="prefill", tokens=128, context=128, heads=2, index_heads=2, chosen=32, chunk=64
    ),
    Attention(
        name="tiny-decode",
        kind="decode",
        tokens=2,
        context=128,
        sequences=2,
        cache="fp8",
        heads=2,
        index_heads=2,
        chosen=32,
    ),
    Attention(name="tiny-masked", kind="masked", tokens=8, context=128, heads=2, index_heads=2, chosen=32),
)

SHAPES: dict[str, tuple[Shape, ...]] = shapes.SHAPES | {"attention": ATTENTION}
"""By op: the shapes of the full model."""

TINY: dict[str, tuple[Shape, ...]] = shapes.TINY | {"attention": TINY_ATTENTION}
"""The same kinds of calls, small enough for the reference on a CPU."""
