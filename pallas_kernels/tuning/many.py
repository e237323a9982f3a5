"""Tile sizes of products of many rows."""

from __future__ import annotations

import dataclasses

from pallas_kernels.tuning.base import CONFIGS, SHARED_BYTES, SMS


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManyRowsMatmul:
    """How a CTA multiplies many rows by a weight, one expert's or the only one.

    Attributes:
      rows: of a tile: 64 or 128. Both math warpgroups take all of them, and 128 of the tile's 256 columns each.
      by_rows: instead, both take all columns, and 64 of the 128 rows each: operands are read from shared memory less
        often. Only where the matrix units add up by themselves, in bfloat16 and int8, with one weight.
      stages: 128 bytes of K of both operands, in shared memory.
      group: tiles of rows that are worked on side by side, so that a panel of the weight is read once for all of them.
      registers: of a math thread and of a copying thread. Three warpgroups start with 168 each.
      ctas: of the persistent grid.
      cluster: 1, or 2 CTAs that take tiles of rows next to each other, of one expert. Each copies half of the weight's
        part for both: a byte of it leaves L2 once for two.
    """

    rows: int = 128
    by_rows: bool = False
    stages: int = 4
    group: int = 16
    registers: tuple[int, int] = (232, 40)
    ctas: int = SMS
    cluster: int = 1

    def __post_init__(self) -> None:
        if self.rows not in (64, 128):
            raise ValueError(f"a tile has 64 or 128 rows, not {self.rows}")
        if self.cluster not in (1, 2) or self.ctas % self.cluster or self.group % self.cluster:
            raise ValueError(f"clusters of 1 or 2 must divide CTAs and groups: {self}")
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
    def unit(self) -> int:
        """Rows of one expert that are worked on together."""
        return self.rows * self.cluster

    @property
    def shared_bytes(self) -> int:
        """Operands, the rows' scales (in whole kilobytes), outputs on their way and barriers."""
        scales = -(-self.stages * self.rows * 4 // 1024) * 1024
        return self.stages * (self.rows + 256) * 128 + scales + 2 * 2 * 8192 + 16 * self.stages


MANY_ROWS = ManyRowsMatmul()
MANY_ROWS_SHORT_TILES = ManyRowsMatmul(rows=64)
CONFIGS["many_rows_matmul"] = [MANY_ROWS, MANY_ROWS_SHORT_TILES]
MANY_ROWS_INT8 = ManyRowsMatmul(by_rows=True)
CONFIGS["many_rows_int8"] = [MANY_ROWS_INT8, MANY_ROWS_SHORT_TILES]


def many_rows_matmul(rows: int, columns: int, tile: int | None = None, *, int8: bool = False) -> ManyRowsMatmul:
    """By rows and columns of the result, or by the rows of an expert's tile, a multiple of 64.

    Short tiles also where twice as many of them still leave no multiprocessor with two.
    """
    if tile is None:
        short = rows <= 64 or 2 * -(-rows // 128) * -(-columns // 256) <= SMS
    else:
        short = tile % 128 != 0
    if short:
        return MANY_ROWS_SHORT_TILES
    return MANY_ROWS_INT8 if int8 else MANY_ROWS
