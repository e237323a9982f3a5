"""Tile sizes of products of few rows with four-bit weights."""

from __future__ import annotations

import dataclasses

from pallas_kernels.tuning.base import CONFIGS, SHARED_BYTES, SMS, distinct
from pallas_kernels.tuning.few import strips_cost


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
    def groups(self) -> int:
        """Of a stage."""
        return 4 * self.depth

    @property
    def own(self) -> int:
        """Rows of the warpgroup that stores."""
        return self.rows

    @property
    def token_parts(self) -> int:
        """Each warpgroup has all tokens, of its part of K."""
        return 1

    @property
    def own_tokens(self) -> int:
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
