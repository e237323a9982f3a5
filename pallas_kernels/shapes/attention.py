"""Shapes of the attention ops."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pallas_kernels.shapes.base import K, PeerRow, Shape, Target


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexerLogits(Shape):
    """The last `tokens / sequences` tokens of each sequence, scored against its `context` FP8 keys."""

    op: ClassVar[str] = "indexer_logits"
    tokens: int
    context: int
    sequences: int = 1
    heads: int = 64
    dim: int = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(Shape):
    """`tokens` rows of `context` scores."""

    op: ClassVar[str] = "top_k"
    tokens: int
    context: int
    chosen: int = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexSelect(Shape):
    """Both of the above in one op."""

    op: ClassVar[str] = "index_select"
    tokens: int
    context: int
    sequences: int = 1
    heads: int = 64
    dim: int = 128
    chosen: int = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheWrite(Shape):
    """`tokens` new tokens into the FP8 cache."""

    op: ClassVar[str] = "cache_write"
    tokens: int
    latent: int = 512
    rope: int = 64
    dim: int = 128


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


def _flash_mla(op: str, tokens: int, context: int) -> PeerRow:
    return PeerRow("FlashMLA", op, f"T={tokens} L={context} K=2048 H=128")


def _deep_gemm(op: str, tokens: int, context: int) -> PeerRow:
    return PeerRow("DeepGEMM", op, f"T={tokens} L={context} heads=64")


def _flash_infer(tokens: int, context: int) -> PeerRow:
    return PeerRow("FlashInfer", "topk 2048", f"T={tokens} L={context}")


def _torch_top_k(tokens: int, context: int) -> PeerRow:
    return PeerRow("torch", "topk 2048", f"T={tokens} L={context}")


def _sparse_mla() -> tuple[SparseMLA, ...]:
    prefill = [
        SparseMLA(
            name=f"prefill-{tokens}x{context}",
            tokens=tokens,
            context=context,
            peers=((_flash_mla("sparse_mla prefill bf16", tokens, context),),),
            target=Target(1.0, 1.12),
        )
        for tokens, context in ((4096, 8 * K), (4096, 64 * K), (4096, 128 * K), (1024, 64 * K))
    ]
    targets = {1: Target(0.9, 1.5), 8: Target(0.9, 1.5), 32: Target(0.9, 1.5), 128: Target(0.8, 1.2)}
    decode = [
        SparseMLA(
            name=f"decode-{tokens}x{32 * K}",
            tokens=tokens,
            context=32 * K,
            cache="fp8",
            sequences=tokens,
            peers=((_flash_mla("sparse_mla decode fp8 cache", tokens, 32 * K),),),
            target=targets.get(tokens),
        )
        for tokens in (1, 8, 32, 64, 128)
    ]
    fp8 = SparseMLA(name=f"prefill-fp8-4096x{64 * K}", tokens=4096, context=64 * K, cache="fp8")
    return (*prefill, *decode, fp8)


def _indexer_logits() -> tuple[IndexerLogits, ...]:
    prefill = [
        IndexerLogits(
            name=f"prefill-{tokens}x{context}",
            tokens=tokens,
            context=context,
            peers=((_deep_gemm("indexer_logits fp8 prefill", tokens, context),),),
            target=Target(1.0, 1.2),
        )
        for tokens, context in ((1024, 64 * K), (4096, 64 * K), (4096, 128 * K))
    ]
    decode = [
        IndexerLogits(
            name=f"decode-{tokens}x{context}",
            tokens=tokens,
            context=context,
            sequences=tokens,
            peers=((_deep_gemm("indexer_logits fp8 paged", tokens, context),),),
            target=Target(0.85, 1.0) if (tokens, context) == (64, 128 * K) else None,
        )
        for tokens, context in ((1, 128 * K), (64, 128 * K), (64, 32 * K))
    ]
    return (*prefill, *decode)


def _top_k() -> tuple[TopK, ...]:
    return tuple(
        TopK(
            name=f"{tokens}x{context}",
            tokens=tokens,
            context=context,
            peers=((_flash_infer(tokens, context),), (_torch_top_k(tokens, context),)),
            target=Target(1.8, 3.0),
        )
        for tokens, context in ((1, 128 * K), (64, 32 * K), (64, 128 * K), (1024, 32 * K), (4096, 64 * K))
    )


def _index_select() -> tuple[IndexSelect, ...]:
    prefill, decode = (4096, 64 * K), (64, 128 * K)
    return (
        IndexSelect(
            name=f"prefill-4096x{64 * K}",
            tokens=4096,
            context=64 * K,
            peers=((_deep_gemm("indexer_logits fp8 prefill", *prefill), _flash_infer(*prefill)),),
            target=Target(1.15, 1.35),
        ),
        IndexSelect(
            name=f"decode-64x{128 * K}",
            tokens=64,
            context=128 * K,
            sequences=64,
            peers=((_deep_gemm("indexer_logits fp8 paged", *decode), _flash_infer(*decode)),),
        ),
    )


def _cache_write() -> tuple[CacheWrite, ...]:
    return (
        CacheWrite(name=str(64 * K), tokens=64 * K, target=Target(0.6, 0.85, of="roofline")),
        CacheWrite(name="4096", tokens=4096),
        CacheWrite(name="64", tokens=64),
    )


def _attention() -> tuple[Attention, ...]:
    prefill = [
        Attention(
            name=f"prefill-{length}",
            kind="prefill",
            tokens=length,
            context=length,
            room=128 * K,
            peers=((PeerRow("torch", "dense causal MHA cudnn", f"128 heads 192/128 L={length}"),),),
        )
        for length in (1 * K, 2 * K, 4 * K, 8 * K, 16 * K, 32 * K, 64 * K, 128 * K)
    ]
    decode = [
        Attention(
            name=f"decode-{tokens}x{32 * K}",
            kind="decode",
            tokens=tokens,
            context=32 * K,
            sequences=tokens,
            cache="fp8",
            peers=((PeerRow("FlashMLA", "dense decode bf16", f"T={tokens} L={32 * K} H=128"),),),
        )
        for tokens in (1, 8, 32, 64, 128)
    ]
    masked = Attention(name=f"masked-1024x{32 * K}", kind="masked", tokens=1024, context=32 * K)
    return (*prefill, *decode, masked)


SHAPES: dict[str, tuple[Shape, ...]] = {
    "sparse_mla": _sparse_mla(),
    "indexer_logits": _indexer_logits(),
    "top_k": _top_k(),
    "index_select": _index_select(),
    "cache_write": _cache_write(),
    "attention": _attention(),
}

TINY: dict[str, tuple[Shape, ...]] = {
    "sparse_mla": (
        SparseMLA(name="tiny-prefill", tokens=5, context=256, heads=4, chosen=64),
        SparseMLA(name="tiny-decode", tokens=3, context=128, sequences=3, cache="fp8", heads=4, chosen=64),
    ),
    "indexer_logits": (
        IndexerLogits(name="tiny-prefill", tokens=6, context=256, heads=4),
        IndexerLogits(name="tiny-decode", tokens=2, context=128, sequences=2, heads=4),
    ),
    "top_k": (TopK(name="tiny", tokens=3, context=256, chosen=16),),
    "index_select": (IndexSelect(name="tiny", tokens=4, context=256, heads=4, chosen=16),),
    "cache_write": (CacheWrite(name="tiny", tokens=7),),
    "attention": (
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
    ),
}

SMALL: dict[str, tuple[Shape, ...]] = {
    "sparse_mla": (
        SparseMLA(name="small-prefill", tokens=3, context=512, chosen=256),
        SparseMLA(name="small-decode", tokens=2, context=256, sequences=2, cache="fp8", chosen=256),
    ),
    "indexer_logits": (
        IndexerLogits(name="small-prefill", tokens=7, context=512),
        IndexerLogits(name="small-decode", tokens=2, context=512, sequences=2),
    ),
    "top_k": (
        TopK(name="small-few", tokens=3, context=8192, chosen=512),
        TopK(name="small-many", tokens=270, context=2048, chosen=512),
    ),
    "index_select": (IndexSelect(name="small", tokens=5, context=512, chosen=128),),
    "cache_write": (CacheWrite(name="small", tokens=70),),
}
