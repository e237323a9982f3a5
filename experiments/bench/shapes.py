"""What `dsv32 bench` measures: the named shapes of the ops, and of a layer's whole attention and experts."""

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoELayer(Shape):
    """A whole mixture-of-experts layer in FP8, from the router to the sum with the shared expert.

    `beside` says what it stands beside. In bfloat16: "ragged_dot" of sorted rows, or a "loop" over the experts of
    products of all tokens, weighted by 0 where a token did not choose the expert. Or the same kernels: "apart" with
    gate, up, SwiGLU and quantisation one after another instead of in one.
    """

    op: ClassVar[str] = "moe_layer"
    beside: str = "ragged_dot"
    tokens: int
    experts: int = 256
    groups: int = 8
    groups_kept: int = 4
    chosen: int = 8
    hidden: int = 7168
    width: int = 2048


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

MOE_LAYER: tuple[MoELayer, ...] = (
    MoELayer(name="prefill-4096", tokens=4096),
    MoELayer(name="prefill-4096-loop", beside="loop", tokens=4096),
    *(MoELayer(name=f"decode-{tokens}", tokens=tokens) for tokens in (1, 32, 128)),
    *(MoELayer(name=f"{tokens}-apart", beside="apart", tokens=tokens) for tokens in (4096, 128)),
)

TINY_MOE_LAYER: tuple[MoELayer, ...] = tuple(
    MoELayer(
        name=f"tiny-{beside}",
        beside=beside,
        tokens=5,
        experts=8,
        groups=4,
        groups_kept=2,
        chosen=2,
        hidden=256,
        width=128,
    )
    for beside in ("ragged_dot", "loop", "apart")
)

SMALL_MOE_LAYER: tuple[MoELayer, ...] = (
    MoELayer(name="small", tokens=5, experts=8, groups=4, groups_kept=2, chosen=2, hidden=512, width=512),
)

SHAPES: dict[str, tuple[Shape, ...]] = shapes.SHAPES | {"moe_layer": MOE_LAYER, "attention": ATTENTION}
"""By op: the shapes of the full model."""

TINY: dict[str, tuple[Shape, ...]] = shapes.TINY | {"moe_layer": TINY_MOE_LAYER, "attention": TINY_ATTENTION}
"""The same kinds of calls, small enough for the reference on a CPU."""

SMALL: dict[str, tuple[Shape, ...]] = shapes.SMALL | {"moe_layer": SMALL_MOE_LAYER}
"""What the kernels take, as small as it gets: for tools that slow a GPU down a hundred times."""
