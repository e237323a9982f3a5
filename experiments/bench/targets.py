"""What each named shape must reach, and which published kernels do the same work, by op and by the shape's name."""

from __future__ import annotations

import dataclasses

from dsv32_jax.experiments.bench.shapes import SHAPES, Attention
from pallas_kernels.index_select.shapes import IndexSelect
from pallas_kernels.indexer_logits.shapes import IndexerLogits
from pallas_kernels.matmul.shapes import GroupedMatmul, Matmul
from pallas_kernels.named_shape import Shape
from pallas_kernels.sparse_mla.shapes import SparseMLA
from pallas_kernels.top_k.shapes import TopK


@dataclasses.dataclass(frozen=True)
class PeerRow:
    """One measurement in a peers' file: which library, which of its calls, at which shape."""

    peer: str
    op: str
    shape: str


Alternatives = tuple[tuple[PeerRow, ...], ...]
"""Ways to do a shape's work with published kernels, of which the fastest counts; the times of a way's rows add up."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What a shape must reach (`floor`) and shall reach (`goal`).

    Attributes:
      of: "peer": floor and goal are the peer's time over ours; "reference": the reference's time over ours; "roofline":
        the fraction of what the device could do.
      enough: fraction of what the device could do with which the goal counts as reached in any case.
      within: seconds that the goal asks for besides.
    """

    floor: float
    goal: float
    of: str = "peer"
    enough: float | None = None
    within: float | None = None


# ---- published kernels ---------------------------------------------------------------------------------------------


def _flash_mla(call: str, shape: SparseMLA | Attention) -> PeerRow:
    return PeerRow("FlashMLA", call, f"T={shape.tokens} L={shape.context} K=2048 H=128")


def _deep_gemm_logits(shape: IndexerLogits | IndexSelect) -> PeerRow:
    call = "indexer_logits fp8 prefill" if shape.sequences == 1 < shape.tokens else "indexer_logits fp8 paged"
    return PeerRow("DeepGEMM", call, f"T={shape.tokens} L={shape.context} heads=64")


def _top_k(library: str, shape: TopK | IndexSelect) -> PeerRow:
    return PeerRow(library, "topk 2048", f"T={shape.tokens} L={shape.context}")


def _deep_gemm_grouped(shape: GroupedMatmul) -> PeerRow:
    sizes = f"N={shape.columns} K={shape.depth}"
    if shape.used == shape.experts and shape.rows >= 32768:
        return PeerRow("DeepGEMM", f"grouped_matmul {shape.scheme}", f"E={shape.experts} M={shape.rows} {sizes}")
    each = shape.rows // shape.used
    return PeerRow("DeepGEMM", "grouped_matmul fp8 masked", f"E={shape.experts} used={shape.used} rows={each} {sizes}")


def _alternatives(shape: Shape) -> Alternatives:
    match shape:
        case SparseMLA(sequences=1, cache="bf16"):
            return ((_flash_mla("sparse_mla prefill bf16", shape),),)
        case SparseMLA() if shape.sequences == shape.tokens:
            return ((_flash_mla("sparse_mla decode fp8 cache", shape),),)
        case IndexerLogits():
            return ((_deep_gemm_logits(shape),),)
        case TopK():
            return ((_top_k("FlashInfer", shape),), (_top_k("torch", shape),))
        case IndexSelect():
            return ((_deep_gemm_logits(shape), _top_k("FlashInfer", shape)),)
        case GroupedMatmul(scheme="fp8_block" | "bf16"):
            return ((_deep_gemm_grouped(shape),),)
        case Matmul(scheme="fp8_block"):
            sizes = f"M={shape.tokens} N={shape.columns} K={shape.depth}"
            return ((PeerRow("DeepGEMM", "quant_matmul fp8_block", sizes),),)
        case Attention(kind="prefill"):
            return ((PeerRow("torch", "dense causal MHA cudnn", f"128 heads 192/128 L={shape.tokens}"),),)
        case Attention(kind="decode"):
            return ((PeerRow("FlashMLA", "dense decode bf16", f"T={shape.tokens} L={shape.context} H=128"),),)
    return ()


PEERS: dict[tuple[str, str], Alternatives] = {
    (shape.op, shape.name): alternatives
    for shapes in SHAPES.values()
    for shape in shapes
    if (alternatives := _alternatives(shape))
}


# ---- targets -------------------------------------------------------------------------------------------------------


def _matmul(tokens: tuple[int, ...], scheme: str = "", sides: tuple[str, ...] = ()) -> list[str]:
    sides = sides or ("24576x1536", "7168x16384", "4096x7168", "7168x2048", "36864x7168")
    return [f"{scheme}{count}x{side}" for count in tokens for side in sides]


_BY_OP: dict[str, dict[str, Target]] = {
    "sparse_mla": {
        **dict.fromkeys(
            ("prefill-4096x8192", "prefill-4096x65536", "prefill-4096x131072", "prefill-1024x65536"), Target(1.0, 1.12)
        ),
        **dict.fromkeys(("decode-1x32768", "decode-8x32768", "decode-32x32768"), Target(0.9, 1.5)),
        "decode-128x32768": Target(0.8, 1.2),
    },
    "indexer_logits": {
        **dict.fromkeys(("prefill-1024x65536", "prefill-4096x65536", "prefill-4096x131072"), Target(1.0, 1.2)),
        "decode-64x131072": Target(0.85, 1.0),
    },
    "top_k": dict.fromkeys(("1x131072", "64x32768", "64x131072", "1024x32768", "4096x65536"), Target(1.8, 3.0)),
    "index_select": {"prefill-4096x65536": Target(1.15, 1.35)},
    "cache_write": {"65536": Target(0.6, 0.85, of="roofline")},
    "grouped_matmul": {
        **dict.fromkeys(("fp8-64x65536-4096", "fp8-64x65536-7168"), Target(0.85, 1.05)),
        **dict.fromkeys(("fp8-256x65536-4096", "fp8-256x65536-7168"), Target(0.85, 1.1)),
        **dict.fromkeys(("fp8-256x32768-4096", "fp8-256x32768-7168"), Target(0.8, 1.05)),
        "bf16-64x65536-4096": Target(0.85, 1.0),
        "fp8-8of256-1-each": Target(0.8, 1.3),
        **dict.fromkeys(("fp8-160of256-1-each", "fp8-64of64-16-each"), Target(0.8, 1.05)),
    },
    "matmul": {
        **dict.fromkeys(_matmul((1, 16, 128)), Target(1.0, 1.4, enough=0.95)),
        **dict.fromkeys(_matmul((4096,)), Target(0.85, 1.0)),
        "int8-8192x8192x8192": Target(1.5, 1.9, of="reference"),
        **dict.fromkeys(_matmul((1, 16, 128), "int4-", ("7168x16384", "4096x7168")), Target(2.5, 3.5, of="reference")),
    },
    "moe_dispatch": {
        **dict.fromkeys(("plan-1", "plan-32", "plan-1024", "plan-4096"), Target(5, 10, of="reference")),
        "plan-128": Target(5, 10, of="reference", within=15e-6),
    },
    "moe_layer": {
        "prefill-4096": Target(20, 60, of="reference"),
        "prefill-4096-loop": Target(15, 35, of="reference"),
        **dict.fromkeys(("decode-1", "decode-32", "decode-128"), Target(0.55, 0.85, of="roofline")),
    },
}

TARGETS: dict[tuple[str, str], Target] = {
    (op, name): target for op, targets in _BY_OP.items() for name, target in targets.items()
}


def target_of(shape: Shape) -> Target | None:
    """Returns what is asked of a shape, if anything is."""
    return TARGETS.get((shape.op, shape.name))


def peers_of(shape: Shape) -> Alternatives:
    """Returns the published kernels that do a shape's work; none for most."""
    return PEERS.get((shape.op, shape.name), ())
