"""What is tuned of the products: one frozen config a kernel, and which one a shape gets.

`choice.choose` asks the functions here. Each config that they can return is in `CONFIGS`, and a test lowers them all.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

from pallas_kernels.hopper import SHARED_BYTES, SMS

CONFIGS: dict[str, list[Any]] = {}
"""By kernel: every config that a choice can return."""


def distinct(*groups: Iterable[Any]) -> list[Any]:
    """Returns the configurations of all groups, each once."""
    return list(dict.fromkeys(itertools.chain(*groups)))


TILES = (8, 16, 32, 64, 128)
"""Tokens that a tile of few rows can have."""
SWIGLU_TILES = TILES[:-1]
"""With SwiGLU behind the product."""

# ---- few rows, FP8 and INT8 --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewRows:
    """How a CTA of the FP8 product with few rows works.

    Attributes:
      tile: tokens of a tile.
      rows: of the weight, that a CTA takes at a time: a strip.
      warpgroups: of a CTA; each takes as many of these rows, up to 64.
      token_parts: warpgroups that share a strip's rows and take so many parts of its tokens.
      blocks: of 128 along K, in a stage: 1, 2 or 4.
      stages: in shared memory.
      ctas: of the grid.
    """

    tile: int
    rows: int
    warpgroups: int = 1
    token_parts: int = 1
    blocks: int
    stages: int
    ctas: int = SMS

    def __post_init__(self) -> None:
        if self.tile not in TILES:
            raise ValueError(f"a tile has 8, 16, 32, 64 or 128 tokens, not {self.tile}")
        most = 8 if self.token_parts > 1 else 4
        if not 1 <= self.warpgroups <= most:
            raise ValueError(f"a CTA has 1 to {most} warpgroups, not {self.warpgroups}")
        if self.token_parts < 1 or self.warpgroups % self.token_parts or self.tile % (8 * self.token_parts):
            raise ValueError(
                f"token_parts divides the warpgroups and a tile's tokens, these into eights: {self.token_parts} "
                f"does not divide {self.warpgroups} warpgroups and {self.tile} tokens so"
            )
        if self.rows % (8 * self.row_parts) or not 8 <= self.warpgroup_rows <= 64:
            raise ValueError(
                f"each of {self.row_parts} warpgroups along a strip takes up to 64 rows of the weight, in eights, of "
                f"{self.rows}"
            )
        if self.blocks not in (1, 2, 4):
            raise ValueError(f"a stage has 1, 2 or 4 blocks, not {self.blocks}")
        if self.stages < 2:
            raise ValueError(f"copies run ahead of the products: at least 2 stages, not {self.stages}")
        if self.shared_bytes > SHARED_BYTES:
            raise ValueError(f"{self} needs {self.shared_bytes} bytes of shared memory; there are {SHARED_BYTES}")
        if self.stages * self.blocks * self.tile < 64 - self.warpgroup_rows:
            raise ValueError(
                f"a product of 64 rows reads past a warpgroup's {self.warpgroup_rows}, and past all of {self}"
            )

    @property
    def row_parts(self) -> int:
        """Of a strip; the warpgroups of one part are next to each other."""
        return self.warpgroups // self.token_parts

    @property
    def warpgroup_rows(self) -> int:
        """Rows of a warpgroup."""
        return self.rows // self.row_parts

    @property
    def warpgroup_tokens(self) -> int:
        """Tokens of a warpgroup."""
        return self.tile // self.token_parts

    @property
    def weights(self) -> int:
        """How many share a strip."""
        return 1

    @property
    def shared_bytes(self) -> int:
        """Weights, tokens, both scales (each in whole kilobytes) and barriers."""
        scales = sum(-(-self.stages * each // 1024) * 1024 for each in (16 * self.tile, 128 * self.weights))
        return self.stages * self.blocks * 128 * (self.rows + self.tile) + scales + 16 * self.stages


FEW_ROWS_NARROW = {
    8: FewRows(tile=8, rows=32, blocks=4, stages=10),
    16: FewRows(tile=16, rows=32, blocks=4, stages=8),
}
"""Strips of 32 rows: half of each product is for nothing, but twice as many multiprocessors read."""
FEW_ROWS = {
    8: FewRows(tile=8, rows=64, blocks=2, stages=6, ctas=2 * SMS),
    16: FewRows(tile=16, rows=64, blocks=2, stages=5, ctas=2 * SMS),
    32: FewRows(tile=32, rows=64, blocks=2, stages=4, ctas=2 * SMS),
    64: FewRows(tile=64, rows=64, blocks=2, stages=6),
    128: FewRows(tile=128, rows=64, blocks=1, stages=8),
}
"""Two CTAs on a multiprocessor, where they fit: while one ends an item, the other streams."""
FEW_ROWS_WIDE = {
    64: FewRows(tile=64, rows=128, warpgroups=2, blocks=2, stages=4),
    128: FewRows(tile=128, rows=128, warpgroups=2, blocks=1, stages=6),
}
"""Many tokens: two warpgroups share them."""
FEW_ROWS_ALONE = {
    8: [
        FEW_ROWS_NARROW[8],
        FewRows(tile=8, rows=56, blocks=4, stages=7),
        FewRows(tile=8, rows=64, blocks=4, stages=6),
    ],
    16: [
        FEW_ROWS_NARROW[16],
        FewRows(tile=16, rows=56, blocks=4, stages=6),
        FewRows(tile=16, rows=64, blocks=4, stages=5),
    ],
    32: [
        FewRows(tile=32, rows=32, blocks=4, stages=6),
        FewRows(tile=32, rows=56, blocks=4, stages=5),
        FewRows(tile=32, rows=64, blocks=4, stages=4),
    ],
    64: [
        FEW_ROWS[64],
        FewRows(tile=64, rows=56, blocks=2, stages=6),
        FEW_ROWS_WIDE[64],
        FewRows(tile=64, rows=144, warpgroups=3, blocks=2, stages=4),
        FewRows(tile=64, rows=192, warpgroups=3, blocks=2, stages=3),
    ],
    128: [
        FEW_ROWS[64],
        FEW_ROWS_WIDE[64],
        FewRows(tile=64, rows=192, warpgroups=3, blocks=2, stages=3),
    ],
}
"""Of one weight and one tile: strips of several heights, one of which has all multiprocessors end at about one time.

Up to 128 tokens are better taken as two tiles: by `dsv32_jax.experiments.bench.sweep`, as the other choices here.
"""
FEW_ROWS_DEEP = FewRows(tile=128, rows=64, warpgroups=2, token_parts=2, blocks=2, stages=4)
"""A strip for each multiprocessor, over a long K: its start and end cost little, and the weight passes L2 once."""
DEEP = 8192
"""K from which this is so."""
CONFIGS["few_rows"] = distinct(
    FEW_ROWS_NARROW.values(), FEW_ROWS.values(), FEW_ROWS_WIDE.values(), *FEW_ROWS_ALONE.values(), [FEW_ROWS_DEEP]
)


def strips_cost(tile: int, strip: int, rows: int, tiles: int = 1) -> float:
    """Returns the cost of one weight of `rows` rows in strips, in the time of a row.

    The busiest multiprocessor's items count, each a strip with some work for its tokens; and so does what all of them
    read through the second-level cache, where each item reads its tokens anew. Neither bound hides all of the other.
    """
    items = -(-rows // strip) * tiles
    busiest = -(-items // SMS) * (strip + tile / 4)
    read = items * (strip + tile) / SMS
    return busiest + 1.2 * read


def few_rows(tile: int, rows: int, tiles: int, columns: int) -> FewRows:
    """By the least tile that holds all tokens, the weight's N, the tiles that may be used, and its K."""
    if tiles == 1:
        if tile == FEW_ROWS_DEEP.tile and columns >= DEEP and rows <= FEW_ROWS_DEEP.rows * SMS:
            return FEW_ROWS_DEEP

        def cost(config: FewRows) -> float:
            return strips_cost(config.tile, config.rows, rows, tile // config.tile)

        return min(FEW_ROWS_ALONE[tile], key=cost)
    if tile in FEW_ROWS_WIDE and rows % 128 == 0 and rows // 128 * tiles >= SMS * 3 // 4:
        return FEW_ROWS_WIDE[tile]
    if tile in FEW_ROWS_NARROW and rows // 64 * tiles < SMS * 3 // 4:
        return FEW_ROWS_NARROW[tile]
    return FEW_ROWS[tile]


# ---- SwiGLU behind the product of few rows ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewRowsSwiGLU(FewRows):
    """`FewRows` whose strips are half gate and half up. Those of 256 rows can quantise what they make."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tile > 64:
            raise ValueError(f"a tile has up to 64 tokens, not {self.tile}")
        if self.token_parts != 1:
            raise ValueError(
                f"a strip of gate and up has all tokens in a warpgroup: token_parts 1, not {self.token_parts}"
            )
        if self.rows not in (32, 64, 128, 256) or self.warpgroup_rows != min(64, self.rows):
            raise ValueError(f"a CTA takes 32, 64, 128 or 256 rows, a warpgroup 64 of them or all, not {self}")

    @property
    def weights(self) -> int:
        """How many share a strip."""
        return 2

    @property
    def staged_columns(self) -> int:
        """Of a token's sums in shared memory: the strip, and 16 bytes, so that tokens start in different banks."""
        return self.rows + 8

    @property
    def shared_bytes(self) -> int:
        """Also the sums, in bfloat16 and whole kilobytes, and two barriers."""
        return super().shared_bytes + -(-2 * self.tile * self.staged_columns // 1024) * 1024 + 16


FEW_ROWS_SWIGLU = {
    8: FewRowsSwiGLU(tile=8, rows=256, warpgroups=4, blocks=1, stages=6),
    16: FewRowsSwiGLU(tile=16, rows=256, warpgroups=4, blocks=1, stages=6),
    32: FewRowsSwiGLU(tile=32, rows=256, warpgroups=4, blocks=1, stages=5),
    64: FewRowsSwiGLU(tile=64, rows=256, warpgroups=4, blocks=1, stages=4),
}
"""128 columns of the result a strip: a group of the quantisation."""
FEW_ROWS_SWIGLU_HALF = {
    8: FewRowsSwiGLU(tile=8, rows=128, warpgroups=2, blocks=2, stages=6),
    16: FewRowsSwiGLU(tile=16, rows=128, warpgroups=2, blocks=2, stages=5),
    32: FewRowsSwiGLU(tile=32, rows=128, warpgroups=2, blocks=2, stages=4),
    64: FewRowsSwiGLU(tile=64, rows=128, warpgroups=2, blocks=1, stages=6),
}
"""64 columns, where those would keep too few multiprocessors reading."""
FEW_ROWS_SWIGLU_NARROW = {
    8: FewRowsSwiGLU(tile=8, rows=32, blocks=4, stages=10),
    16: FewRowsSwiGLU(tile=16, rows=32, blocks=4, stages=8),
    32: FewRowsSwiGLU(tile=32, rows=64, blocks=2, stages=7),
    64: FewRowsSwiGLU(tile=64, rows=64, blocks=2, stages=5),
}
"""16 columns (of 32 or 64 tokens: 32), for one weight of some thousand."""
CONFIGS["few_rows_swiglu"] = [
    config for configs in (FEW_ROWS_SWIGLU, FEW_ROWS_SWIGLU_HALF, FEW_ROWS_SWIGLU_NARROW) for config in configs.values()
]


def few_rows_swiglu(tile: int, width: int, tiles: int) -> FewRowsSwiGLU:
    """By the tokens of a tile, the result's columns and the tiles that may be used: strips for all multiprocessors."""
    for columns, configs in ((128, FEW_ROWS_SWIGLU), (64, FEW_ROWS_SWIGLU_HALF)):
        if width // columns * tiles >= SMS * 3 // 4:
            return configs[tile]
    return FEW_ROWS_SWIGLU_NARROW[tile]


# ---- few rows, four-bit weights ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewRowsInt4:
    """How a CTA of the product of a few rows with four-bit weights works.

    Attributes:
      tile: tokens of a tile.
      rows: of the weight, that a CTA takes at a time.
      depth: groups of 128 of K in a stage, for each of the four warpgroups.
      stages: in shared memory.
      ctas: of the grid.
    """

    tile: int
    rows: int = 64
    depth: int = 1
    stages: int
    ctas: int = SMS

    def __post_init__(self) -> None:
        if self.tile not in (8, 16, 32):
            raise ValueError(f"a tile has 8, 16 or 32 tokens, not {self.tile}")
        if self.rows % 8 or not 8 <= self.rows <= 64:
            raise ValueError(f"a CTA takes up to 64 rows of the weight, in eights, not {self.rows}")
        if self.depth not in (1, 2):
            raise ValueError(f"a warpgroup takes one or two groups of a stage, not {self.depth}")
        if self.stages < 2:
            raise ValueError(f"copies run ahead of the products: at least 2 stages, not {self.stages}")
        if self.shared_bytes > SHARED_BYTES:
            raise ValueError(f"{self} needs {self.shared_bytes} bytes of shared memory; there are {SHARED_BYTES}")

    @property
    def warpgroups(self) -> int:
        """Of a CTA: each takes every fourth group of K."""
        return 4

    @property
    def groups(self) -> int:
        """Of a stage."""
        return 4 * self.depth

    @property
    def warpgroup_rows(self) -> int:
        """Rows of the warpgroup that stores."""
        return self.rows

    @property
    def token_parts(self) -> int:
        """Each warpgroup has all tokens, of its part of K."""
        return 1

    @property
    def warpgroup_tokens(self) -> int:
        """Tokens of a warpgroup."""
        return self.tile

    @property
    def shared_bytes(self) -> int:
        """Values, tokens, scales (in whole kilobytes), the sums of three warpgroups, and barriers."""
        scales = -(-self.stages * 4 * self.groups * self.rows // 1024) * 1024
        stage = self.groups * (self.rows * 64 + 256 * self.tile) + 16
        return self.stages * stage + scales + 3 * 256 * self.tile + 8


FEW_ROWS_INT4 = {
    8: FewRowsInt4(tile=8, stages=8),
    16: FewRowsInt4(tile=16, stages=6),
    32: FewRowsInt4(tile=32, stages=4),
}
FEW_ROWS_INT4_NARROW = FewRowsInt4(tile=8, rows=32, stages=12)
"""As `FEW_ROWS_NARROW`. Of more tokens a strip would read more than of the weight."""
FEW_ROWS_INT4_ALONE = {
    8: [FEW_ROWS_INT4_NARROW, FEW_ROWS_INT4[8], FewRowsInt4(tile=8, rows=56, stages=9)],
    16: [FEW_ROWS_INT4[16], dataclasses.replace(FEW_ROWS_INT4[16], rows=56)],
    32: [FEW_ROWS_INT4[32], dataclasses.replace(FEW_ROWS_INT4[32], rows=56)],
}
"""As `FEW_ROWS_ALONE`."""


def deep(config: FewRowsInt4) -> FewRowsInt4:
    """The same with two groups a warpgroup in each stage, where the weight's K has them."""
    return dataclasses.replace(config, depth=2, stages=config.stages // 2)


CONFIGS["few_rows_int4"] = [
    each
    for config in distinct([FEW_ROWS_INT4_NARROW], FEW_ROWS_INT4.values(), *FEW_ROWS_INT4_ALONE.values())
    for each in (config, deep(config))
]


def few_rows_int4(tile: int, rows: int, tiles: int, columns: int) -> FewRowsInt4:
    """By the tokens of a tile, the weight's N, the tiles that may be used, and its K."""
    if tiles == 1:  # four bytes of tokens for a byte of values
        config = min(FEW_ROWS_INT4_ALONE[tile], key=lambda config: strips_cost(4 * tile, config.rows, rows))
    elif tile == FEW_ROWS_INT4_NARROW.tile and rows // 64 * tiles < SMS * 3 // 4:
        config = FEW_ROWS_INT4_NARROW
    else:
        config = FEW_ROWS_INT4[tile]
    return deep(config) if columns % 1024 == 0 else config


# ---- many rows ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManyRows:
    """How a CTA multiplies many rows by a weight, one expert's or the only one.

    Attributes:
      rows: of a tile: 64 or 128. Both math warpgroups take all of them, and 128 of the tile's 256 columns each.
      by_rows: instead, both take all columns, and 64 of the 128 rows each: operands are read from shared memory less
        often. Only where the matrix units add up by themselves, in bfloat16 and int8, with one weight.
      stages: 128 bytes of K of both operands, in shared memory.
      group: tiles of rows that are worked on side by side, so that a panel of the weight is read once for all of them.
      registers: of a math thread and of a copying thread. Three warpgroups start with 168 each.
      ctas: of the persistent grid.
    """

    rows: int = 128
    by_rows: bool = False
    stages: int = 4
    group: int = 16
    registers: tuple[int, int] = (232, 40)
    ctas: int = SMS

    def __post_init__(self) -> None:
        if self.rows not in (64, 128):
            raise ValueError(f"a tile has 64 or 128 rows, not {self.rows}")
        if self.by_rows and self.rows != 128:
            raise ValueError(f"two warpgroups share 128 rows, not {self.rows}")
        if self.stages < 2 or self.group < 1 or self.ctas < 1:
            raise ValueError(f"at least 2 stages, a group of 1 and 1 CTA are needed: {self}")
        math, copies = self.registers
        if math % 8 or copies % 8 or not (24 <= copies <= 168 <= math <= 248) or 2 * math + copies > 3 * 168:
            raise ValueError(
                f"registers {self.registers} must be multiples of 8; three warpgroups have 168 each to share"
            )
        if self.shared_bytes > SHARED_BYTES:
            raise ValueError(f"{self} needs {self.shared_bytes} bytes of shared memory; there are {SHARED_BYTES}")

    @property
    def shared_bytes(self) -> int:
        """Operands, the rows' scales (in whole kilobytes), outputs on their way and barriers."""
        scales = -(-self.stages * self.rows * 4 // 1024) * 1024
        return self.stages * (self.rows + 256) * 128 + scales + 2 * 2 * 8192 + 16 * self.stages


MANY_ROWS = ManyRows()
MANY_ROWS_SHORT_TILES = ManyRows(rows=64)
CONFIGS["many_rows"] = [MANY_ROWS, MANY_ROWS_SHORT_TILES]
MANY_ROWS_INT8 = ManyRows(by_rows=True)
CONFIGS["many_rows_int8"] = [MANY_ROWS_INT8, MANY_ROWS_SHORT_TILES]


def many_rows(rows: int, columns: int, tile: int | None = None, *, by_rows: bool = False) -> ManyRows:
    """By rows and columns of the result, or by the rows of an expert's tile, a multiple of 64.

    Tiles are short also where twice as many of them still leave no multiprocessor with two. `by_rows`: tall ones are
    divided so.
    """
    if tile is None:
        short = rows <= 64 or 2 * -(-rows // 128) * -(-columns // 256) <= SMS
    else:
        short = tile % 128 != 0
    if short:
        return MANY_ROWS_SHORT_TILES
    return MANY_ROWS_INT8 if by_rows else MANY_ROWS
