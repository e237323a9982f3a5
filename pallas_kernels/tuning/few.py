"""Tile sizes of FP8 and INT8 products of few rows, and with SwiGLU behind them."""

from __future__ import annotations

import dataclasses

from pallas_kernels.tuning.base import CONFIGS, SHARED_BYTES, SMS, distinct

# ---- few_rows --------------------------------------------------------------------------------------------------


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
      cluster: CTAs that take strips next to each other; each copies its share of their tokens for all.
      ctas: of the grid.
    """

    tile: int
    rows: int
    warpgroups: int = 1
    token_parts: int = 1
    blocks: int
    stages: int
    cluster: int = 1
    ctas: int = SMS

    def __post_init__(self) -> None:
        if self.tile not in (8, 16, 32, 64, 128):
            raise ValueError(f"a tile has 8, 16, 32, 64 or 128 tokens, not {self.tile}")
        most = 8 if self.token_parts > 1 else 4
        if not 1 <= self.warpgroups <= most:
            raise ValueError(f"a CTA has 1 to {most} warpgroups, not {self.warpgroups}")
        if self.token_parts < 1 or self.warpgroups % self.token_parts or self.tile % (8 * self.token_parts):
            raise ValueError(
                f"token_parts divides the warpgroups and a tile's tokens, these into eights: {self.token_parts} "
                f"does not divide {self.warpgroups} warpgroups and {self.tile} tokens so"
            )
        if self.rows % (8 * self.row_parts) or not 8 <= self.own <= 64:
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
        if self.cluster not in (1, 2, 4) or self.tile % (8 * self.cluster) or self.ctas % self.cluster:
            raise ValueError(f"a cluster of 1, 2 or 4 CTAs shares a tile's copies in eights of tokens: {self}")
        if self.stages * self.blocks * self.tile < 64 - self.own:
            raise ValueError(f"a product of 64 rows reads past a warpgroup's {self.own}, and past all of {self}")

    @property
    def row_parts(self) -> int:
        """Of a strip; the warpgroups of one part are next to each other."""
        return self.warpgroups // self.token_parts

    @property
    def own(self) -> int:
        """Rows of a warpgroup."""
        return self.rows // self.row_parts

    @property
    def own_tokens(self) -> int:
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


def strips_cost(tile: int, strip: int, rows: int, cluster: int = 1, tiles: int = 1) -> float:
    """Of one weight of `rows` rows in strips, in the time of a row.

    The busiest multiprocessor's items, each a strip with some work for its tokens; and what all of them read through
    the second-level cache, where each item (or cluster of items) reads its tokens anew. Neither bound hides all of the
    other, so both count.
    """
    items = -(-rows // strip) * tiles
    own = -(-items // SMS) * (strip + tile / 4)
    shared = items * (strip + tile / cluster) / SMS
    return own + 1.2 * shared


def few_rows(tile: int, rows: int, tiles: int, columns: int) -> FewRows:
    """By the least tile that holds all tokens, the weight's N, the tiles that may be used, and its K."""
    if tiles == 1:
        if tile == FEW_ROWS_DEEP.tile and columns >= DEEP and rows <= FEW_ROWS_DEEP.rows * SMS:
            return FEW_ROWS_DEEP

        def cost(config: FewRows) -> float:
            return strips_cost(config.tile, config.rows, rows, config.cluster, tile // config.tile)

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
        if self.rows not in (32, 64, 128, 256) or self.own != min(64, self.rows):
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
