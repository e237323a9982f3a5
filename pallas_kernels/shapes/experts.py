"""Shapes of the products and of the mixture-of-experts layer."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pallas_kernels.shapes.base import PeerRow, Shape, Target

HIDDEN, WIDTH = 7168, 2048
"""Of the model, and of one expert."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedMatmul(Shape):
    """`rows` rows, equally many for each of `used` of `experts` experts, times the [columns, depth] weight of each.

    `scheme`: "fp8_block" of rows that are quantised already; "bf16", "int8" and "int4" of bfloat16 rows.
    """

    op: ClassVar[str] = "grouped_matmul"
    scheme: str = "fp8_block"
    experts: int
    used: int
    rows: int
    columns: int
    depth: int

    @property
    def tokens(self) -> int:
        """What a reference of fewer rows is scaled by."""
        return self.rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matmul(Shape):
    """`tokens` rows times one [columns, depth] weight.

    `scheme`: "fp8_block" of rows that are quantised already; "int8" and "int4" of bfloat16 rows.
    """

    op: ClassVar[str] = "matmul"
    scheme: str = "fp8_block"
    tokens: int
    columns: int
    depth: int


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
    hidden: int = HIDDEN
    width: int = WIDTH


GATE_UP, DOWN = (2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)
"""[N, K] of the two products of an expert."""


def _deep_gemm(op: str, shape: str) -> tuple[tuple[PeerRow, ...], ...]:
    return ((PeerRow("DeepGEMM", op, shape),),)


def _prefill(experts: int, rows: int, sides: tuple[int, int], target: Target, scheme: str = "fp8_block"):
    columns, depth = sides
    return GroupedMatmul(
        name=f"{scheme.removesuffix('_block')}-{experts}x{rows}-{columns}",
        scheme=scheme,
        experts=experts,
        used=experts,
        rows=rows,
        columns=columns,
        depth=depth,
        peers=_deep_gemm(f"grouped_matmul {scheme}", f"E={experts} M={rows} N={columns} K={depth}"),
        target=target,
    )


def _grouped_matmul() -> tuple[GroupedMatmul, ...]:
    many = [
        _prefill(experts, rows, sides, target)
        for experts, rows, target in (
            (64, 65536, Target(0.85, 1.05)),
            (256, 65536, Target(0.85, 1.1)),
            (256, 32768, Target(0.8, 1.05)),
        )
        for sides in (GATE_UP, DOWN)
    ]
    bf16 = _prefill(64, 65536, GATE_UP, Target(0.85, 1.0), "bf16")
    columns, depth = GATE_UP
    few = [
        GroupedMatmul(
            name=f"fp8-{used}of{experts}-{each}-each",
            experts=experts,
            used=used,
            rows=used * each,
            columns=columns,
            depth=depth,
            peers=_deep_gemm("grouped_matmul fp8 masked", f"E={experts} used={used} rows={each} N={columns} K={depth}"),
            target=goal and Target(0.8, goal),
        )
        for experts, used, each, goal in (
            (256, 8, 1, 1.3),
            (256, 160, 1, 1.05),
            (64, 64, 16, 1.05),
            (256, 256, 4, None),
        )
    ]
    integers = [
        GroupedMatmul(
            name=f"{scheme}-160of256-1-each",
            scheme=scheme,
            experts=256,
            used=160,
            rows=160,
            columns=columns,
            depth=depth,
        )
        for scheme in ("int8", "int4")
    ]
    return (*many, bf16, *few, *integers)


def _matmul() -> tuple[Matmul, ...]:
    few, many = Target(1.0, 1.4, enough=0.95), Target(0.85, 1.0)
    fp8 = [
        Matmul(
            name=f"{tokens}x{columns}x{depth}",
            tokens=tokens,
            columns=columns,
            depth=depth,
            peers=_deep_gemm("quant_matmul fp8_block", f"M={tokens} N={columns} K={depth}"),
            target=many if tokens == 4096 else few,
        )
        for tokens in (1, 16, 128, 4096)
        for columns, depth in ((24576, 1536), (7168, 16384), (4096, 7168), (7168, 2048), (36864, 7168))
    ]
    int8 = Matmul(
        name="int8-8192x8192x8192",
        scheme="int8",
        tokens=8192,
        columns=8192,
        depth=8192,
        target=Target(1.5, 1.9, of="reference"),
    )
    integers = [
        Matmul(
            name=f"{scheme}-{tokens}x{columns}x{depth}",
            scheme=scheme,
            tokens=tokens,
            columns=columns,
            depth=depth,
            target=Target(2.5, 3.5, of="reference") if scheme == "int4" else None,
        )
        for scheme in ("int8", "int4")
        for tokens in (1, 16, 128)
        for columns, depth in ((7168, 16384), (4096, 7168))
    ]
    return (*fp8, int8, *integers)


def _moe_layer() -> tuple[MoELayer, ...]:
    ragged = MoELayer(name="prefill-4096", tokens=4096, target=Target(20, 60, of="reference"))
    loop = MoELayer(name="prefill-4096-loop", beside="loop", tokens=4096, target=Target(15, 35, of="reference"))
    decode = [
        MoELayer(name=f"decode-{tokens}", tokens=tokens, target=Target(0.55, 0.85, of="roofline"))
        for tokens in (1, 32, 128)
    ]
    ours = [MoELayer(name=f"{tokens}-apart", beside="apart", tokens=tokens) for tokens in (4096, 128)]
    return (ragged, loop, *decode, *ours)


SHAPES: dict[str, tuple[Shape, ...]] = {
    "grouped_matmul": _grouped_matmul(),
    "matmul": _matmul(),
    "moe_layer": _moe_layer(),
}

TINY: dict[str, tuple[Shape, ...]] = {
    "grouped_matmul": (
        GroupedMatmul(name="tiny-fp8", experts=3, used=2, rows=10, columns=192, depth=256, kernel=False),
        GroupedMatmul(name="tiny-bf16", scheme="bf16", experts=3, used=3, rows=9, columns=64, depth=64, kernel=False),
        GroupedMatmul(name="tiny-int8", scheme="int8", experts=3, used=2, rows=4, columns=64, depth=128, kernel=False),
        GroupedMatmul(name="tiny-int4", scheme="int4", experts=3, used=2, rows=4, columns=64, depth=128, kernel=False),
    ),
    "matmul": (
        Matmul(name="tiny-fp8", tokens=3, columns=192, depth=256),
        Matmul(name="tiny-int8", scheme="int8", tokens=3, columns=64, depth=128),
        Matmul(name="tiny-int4", scheme="int4", tokens=3, columns=64, depth=128, kernel=False),
    ),
    "moe_layer": tuple(
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
    ),
}

SMALL: dict[str, tuple[Shape, ...]] = {
    "grouped_matmul": (
        GroupedMatmul(name="small-few", experts=8, used=3, rows=6, columns=64, depth=512),
        GroupedMatmul(name="small-many", experts=2, used=2, rows=180, columns=192, depth=256),
        GroupedMatmul(name="small-bf16", scheme="bf16", experts=2, used=2, rows=180, columns=192, depth=128),
        GroupedMatmul(name="small-int8", scheme="int8", experts=8, used=3, rows=6, columns=64, depth=512),
        GroupedMatmul(name="small-int4", scheme="int4", experts=8, used=3, rows=6, columns=64, depth=512),
    ),
    "matmul": (
        Matmul(name="small-few", tokens=3, columns=192, depth=512),
        Matmul(name="small-many", tokens=150, columns=192, depth=256),
        Matmul(name="small-int8", scheme="int8", tokens=3, columns=192, depth=512),
        Matmul(name="small-int8-many", scheme="int8", tokens=130, columns=192, depth=256),
        Matmul(name="small-int4", scheme="int4", tokens=3, columns=192, depth=512),
    ),
    "moe_layer": (
        MoELayer(name="small", tokens=5, experts=8, groups=4, groups_kept=2, chosen=2, hidden=512, width=512),
    ),
}
