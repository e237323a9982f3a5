"""Named shapes of `matmul` and `grouped_matmul`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pallas_kernels.named_shape import Shape

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


GATE_UP, DOWN = (2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)
"""[N, K] of the two products of an expert."""


def _prefill(experts: int, rows: int, sides: tuple[int, int], scheme: str = "fp8_block") -> GroupedMatmul:
    columns, depth = sides
    return GroupedMatmul(
        name=f"{scheme.removesuffix('_block')}-{experts}x{rows}-{columns}",
        scheme=scheme,
        experts=experts,
        used=experts,
        rows=rows,
        columns=columns,
        depth=depth,
    )


def _decode(experts: int, used: int, each: int, scheme: str = "fp8_block") -> GroupedMatmul:
    prefix, (columns, depth) = scheme.removesuffix("_block"), GATE_UP
    return GroupedMatmul(
        name=f"{prefix}-{used}of{experts}-{each}-each",
        scheme=scheme,
        experts=experts,
        used=used,
        rows=used * each,
        columns=columns,
        depth=depth,
    )


def _dense(tokens: int, columns: int, depth: int, scheme: str = "fp8_block") -> Matmul:
    prefix = "" if scheme == "fp8_block" else f"{scheme}-"
    name = f"{prefix}{tokens}x{columns}x{depth}"
    return Matmul(name=name, scheme=scheme, tokens=tokens, columns=columns, depth=depth)


SHAPES: dict[str, tuple[Shape, ...]] = {
    "grouped_matmul": (
        *(
            _prefill(experts, rows, sides)
            for experts, rows in ((64, 65536), (256, 65536), (256, 32768))
            for sides in (GATE_UP, DOWN)
        ),
        _prefill(64, 65536, GATE_UP, "bf16"),
        *(
            _decode(experts, used, each)
            for experts, used, each in ((256, 8, 1), (256, 160, 1), (64, 64, 16), (256, 256, 4))
        ),
        *(_decode(256, 160, 1, scheme) for scheme in ("int8", "int4")),
    ),
    "matmul": (
        *(
            _dense(tokens, columns, depth)
            for tokens in (1, 16, 128, 4096)
            for columns, depth in ((24576, 1536), (7168, 16384), (4096, 7168), (7168, 2048), (36864, 7168))
        ),
        _dense(8192, 8192, 8192, "int8"),
        *(
            _dense(tokens, columns, depth, scheme)
            for scheme in ("int8", "int4")
            for tokens in (1, 16, 128)
            for columns, depth in ((7168, 16384), (4096, 7168))
        ),
    ),
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
}
