"""Tile sizes of the kernels: one frozen config a kernel, and which one a shape gets.

The choice is a plain function of shapes, so a program compiles the same kernel on every machine and in every run. Each
config that a function here can return is listed in `CONFIGS`; a test lowers them all.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

SMS = 132
"""Multiprocessors of an H100 SXM and of an H200."""

SHARED_BYTES = 232448
"""Shared memory that a CTA can have, barriers included."""

CONFIGS: dict[str, list[Any]] = {}
"""By op: every config that a choice below can return."""


def distinct(*groups: Iterable[Any]) -> list[Any]:
    """The configurations of all groups, each once."""
    return list(dict.fromkeys(itertools.chain(*groups)))


# ---- indexer_logits --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexerLogits:
    """How a CTA of `indexer_logits` works.

    Attributes:
      warpgroups: of a CTA.
      tokens: that a warpgroup multiplies with a block of keys: 1, 2 or 4.
      split_keys: the warpgroups take different keys of the same tokens, else different tokens of the same keys.
      blocks: of 64 keys, that a warpgroup takes of a tile.
      stages: tiles in shared memory.
      ahead: tiles that the copies run ahead; the others leave the warpgroups time to free theirs.
      query_slots: runs whose queries are in shared memory.
      overlap: start a product before the last one is summed: twice the accumulators.
      ctas: of the grid; they share the work evenly.
    """

    warpgroups: int
    tokens: int
    split_keys: bool
    blocks: int
    stages: int
    ahead: int
    query_slots: int = 2
    overlap: bool = False
    ctas: int = SMS

    def __post_init__(self) -> None:
        if self.tokens not in (1, 2, 4):
            raise ValueError(f"a warpgroup takes 1, 2 or 4 tokens, not {self.tokens}")
        if not 1 <= self.ahead < self.stages:
            raise ValueError(f"{self.ahead} tiles ahead need at least {self.ahead + 1} stages, not {self.stages}")
        if self.query_slots < 2:
            raise ValueError(f"the next run's queries need a slot of their own: at least 2, not {self.query_slots}")
        if self.shared_bytes > SHARED_BYTES:
            raise ValueError(f"{self} needs {self.shared_bytes} bytes of shared memory; there are {SHARED_BYTES}")

    @property
    def group(self) -> int:
        """Tokens of a CTA."""
        return self.tokens * (1 if self.split_keys else self.warpgroups)

    @property
    def tile_keys(self) -> int:
        """Keys of a tile."""
        return 64 * self.blocks * (self.warpgroups if self.split_keys else 1)

    @property
    def shared_bytes(self) -> int:
        """Queries, keys, scales (in whole kilobytes) and barriers."""
        scales = -(-self.stages * self.tile_keys * 4 // 1024) * 1024
        barriers = 16 * (self.stages + self.query_slots)
        return 8192 * self.query_slots * self.group + self.stages * self.tile_keys * 128 + scales + barriers


INDEXER_PREFILL = IndexerLogits(warpgroups=3, tokens=4, split_keys=False, blocks=1, stages=3, ahead=2)
INDEXER_DECODE = IndexerLogits(warpgroups=3, tokens=1, split_keys=True, blocks=1, stages=3, ahead=2, ctas=2 * SMS)
INDEXER_DECODE_PAIRS = IndexerLogits(warpgroups=3, tokens=2, split_keys=True, blocks=1, stages=6, ahead=4)
CONFIGS["indexer_logits"] = [INDEXER_PREFILL, INDEXER_DECODE, INDEXER_DECODE_PAIRS]


def indexer_logits(tokens: int, sequences: int) -> IndexerLogits:
    """By tokens a sequence: one, two (a token and its draft), or many."""
    if tokens <= sequences:
        return INDEXER_DECODE
    return INDEXER_DECODE_PAIRS if tokens <= 2 * sequences else INDEXER_PREFILL


# ---- index_select ----------------------------------------------------------------------------------------------


def index_select_chunk(tokens: int, affordable: int) -> int:
    """Tokens of a chunk, at most `affordable`: equally many for every multiprocessor, if there are enough."""
    if affordable >= tokens:
        return tokens
    return affordable // SMS * SMS or affordable


# ---- cache_write -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheWrite:
    """How `cache_write` shares out tokens.

    Attributes:
      warpgroups: of a CTA; each of their four warps takes a token at a time.
      tokens: that a warp takes, the next one's loads in flight while it works on one.
    """

    warpgroups: int = 1
    tokens: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.warpgroups <= 8:
            raise ValueError(f"a CTA has 1 to 8 warpgroups, not {self.warpgroups}")
        if self.tokens < 1:
            raise ValueError(f"a warp takes at least one token, not {self.tokens}")

    @property
    def cta_tokens(self) -> int:
        """Tokens of a CTA."""
        return 4 * self.warpgroups * self.tokens


CACHE_WRITE = CacheWrite()
"""One token a warp: the other warps of a multiprocessor hide its latency better than a second token of its own."""
CONFIGS["cache_write"] = [CACHE_WRITE]


# ---- moe_dispatch ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEPlan:
    """How the routing plan is made.

    Attributes:
      warpgroups: of a CTA.
      cluster: CTAs.
    """

    warpgroups: int
    cluster: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.warpgroups <= 8:
            raise ValueError(f"a CTA has 1 to 8 warpgroups, not {self.warpgroups}")
        if self.cluster not in (1, 2, 4, 8):
            raise ValueError(f"a cluster has 1, 2, 4 or 8 CTAs, not {self.cluster}")


CONFIGS["moe_dispatch"] = [
    *(MoEPlan(warpgroups=warpgroups) for warpgroups in (1, 2, 4)),
    *(MoEPlan(warpgroups=4, cluster=cluster) for cluster in (2, 4, 8)),
]


def moe_plan(choices: int) -> MoEPlan:
    """At most two choices a thread, as far as there are threads."""
    configs = CONFIGS["moe_dispatch"]
    return next((c for c in configs if 256 * c.warpgroups * c.cluster >= choices), configs[-1])


# ---- top_k -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK:
    """How the kernel of `top_k` works.

    Attributes:
      warpgroups: of a CTA.
      per_thread: scores of a chunk that a thread takes.
      stages: chunks in shared memory.
      capacity: candidates in shared memory.
      slack: a selection inside a row may keep k + slack candidates.
      sample: scores of a row that its first threshold is taken from.
      aim: percent of k that the first threshold should let through,
      margin: and scores of the sample beyond that, against its noise.
      cluster: CTAs that share a row.
      ctas: of the grid (or clusters), at most; rows are handed out evenly.
    """

    warpgroups: int
    per_thread: int
    stages: int
    capacity: int
    slack: int = 768
    sample: int = 2048
    aim: int = 150
    margin: int = 8
    cluster: int = 1
    ctas: int = SMS

    def __post_init__(self) -> None:
        if self.warpgroups not in (1, 2, 4) or self.per_thread % 4:
            raise ValueError(f"1, 2 or 4 warpgroups, with scores in fours; not {self.warpgroups} and {self.per_thread}")
        if self.chunk % 256 or self.chunk > 65536:
            raise ValueError(f"a chunk is copied as up to 256 rows of 256 scores; it cannot have {self.chunk}")
        if self.sample % (512 * self.warpgroups):
            raise ValueError(f"a sample in fours a thread cannot have {self.sample} scores")
        if self.slack < 32:
            raise ValueError(f"a selection inside a row needs a slack of at least 32, not {self.slack}")
        if self.capacity < TOP_K_LIMIT + self.slack + self.chunk:
            raise ValueError(f"after a selection, a chunk must fit: {self.capacity} candidates are too few")
        if self.cluster not in (1, 2, 4, 8):
            raise ValueError(f"1, 2, 4 or 8 CTAs share a row, not {self.cluster}")
        if self.shared_bytes > SHARED_BYTES:
            raise ValueError(f"{self} needs {self.shared_bytes} bytes of shared memory; there are {SHARED_BYTES}")

    @property
    def chunk(self) -> int:
        """Scores that a CTA takes at a time."""
        return self.warpgroups * 128 * self.per_thread

    @property
    def shared_bytes(self) -> int:
        """Chunks, candidates, one or two histograms, scratch and barriers."""
        histograms = 2048 * 4 * (1 if self.cluster == 1 else 2)
        return self.stages * self.chunk * 4 + self.capacity * 8 + histograms + 1024 + 8 * self.stages


TOP_K_LIMIT = 2048
"""The largest k."""
TOP_K_MANY = TopK(warpgroups=2, per_thread=16, stages=3, capacity=6912, ctas=2 * SMS)
"""Two CTAs on a multiprocessor: while one ends its row, the other streams."""
TOP_K_ALONE = TopK(warpgroups=4, per_thread=16, stages=4, capacity=11008)
"""One larger CTA on a multiprocessor: a round of rows is half as many, for numbers of rows that suit it better."""
TOP_K_FEW = TopK(warpgroups=4, per_thread=8, stages=8, capacity=8192)
TOP_K_PAIR = TopK(warpgroups=4, per_thread=16, stages=3, capacity=11008, cluster=2)
"""Two CTAs a row, each of which takes many chunks: larger ones."""
TOP_K_INTERPRETED = TopK(warpgroups=1, per_thread=4, stages=2, capacity=3328, sample=512, ctas=3)
"""For the interpreter, which knows one warpgroup a CTA here; few CTAs, so that each has several rows."""
CONFIGS["top_k"] = [
    TOP_K_MANY,
    TOP_K_ALONE,
    TOP_K_PAIR,
    *(dataclasses.replace(TOP_K_FEW, cluster=cluster) for cluster in (1, 2, 4, 8)),
]


ALONE_COST = 0.54
"""Time of a round of `TOP_K_ALONE` in rounds of `TOP_K_MANY`, by their times for 4096 rows."""


def top_k(rows: int, length: int) -> TopK:
    """Few rows are shared by clusters, so that all multiprocessors have work; each CTA of one has at least a chunk."""
    if rows > SMS:
        rounds, rounds_alone = -(-rows // TOP_K_MANY.ctas), -(-rows // TOP_K_ALONE.ctas)
        return TOP_K_ALONE if ALONE_COST * rounds_alone < rounds else TOP_K_MANY
    cluster = 8 if rows <= SMS // 8 else 4 if rows <= SMS // 4 else 2 if rows <= SMS // 2 else 1
    while cluster > 1 and cluster * TOP_K_FEW.chunk > length:
        cluster //= 2
    if cluster == 2 and length >= 8 * TOP_K_PAIR.chunk:
        return TOP_K_PAIR
    return dataclasses.replace(TOP_K_FEW, cluster=cluster)


# ---- sparse_mla ------------------------------------------------------------------------------------------------

SPARSE_MLA_SPLITS = (1, 2, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class SparseMLA:
    """How sparse_mla divides its work.

    Attributes:
      splits: parts of a token's keys, each an item of its own; a second kernel adds them up.
      registers: of a math thread and of a loading thread. Three warpgroups start with 168 each.
      prefetch: whether rows are brought into L2 a block before they are loaded.
      slack: log2 of the growth of a row's maximum that passes before the output is rescaled; 0 rescales always.
      ctas: blocks of the persistent grid.
    """

    splits: int = 1
    registers: tuple[int, int] = (216, 72)
    prefetch: bool = False
    slack: float = 8.0
    ctas: int = SMS

    def __post_init__(self):
        if self.splits < 1 or self.ctas < 1:
            raise ValueError(f"splits {self.splits} and ctas {self.ctas} must be at least 1")
        if not 0 <= self.slack <= 64:
            raise ValueError(f"slack {self.slack} must be from 0 to 64: probabilities of up to 2^slack are added up")
        math, loads = self.registers
        if math % 8 or loads % 8 or not (24 <= loads <= 168 <= math <= 255) or 2 * math + loads > 3 * 168:
            raise ValueError(
                f"registers {self.registers} must be multiples of 8 that 2 math warpgroups and a loading one can share "
                f"out of 168 each"
            )


SPARSE_MLA_BF16 = SparseMLA()
SPARSE_MLA_FP8 = SparseMLA(registers=(208, 88), prefetch=True)
"""An FP8 cache's keys go through the registers of the loading threads."""


def sparse_mla(tokens: int, head_groups: int, keys: int, *, fp8: bool) -> SparseMLA:
    """The config for `tokens` x `head_groups` (of 64 heads) items of `keys` keys each.

    The number of splits is that of the shortest time by a simple model, in units of one pair of key blocks (3.5 us): an
    item costs its pairs and half of one more; a split also its partial output, written and read again.
    """
    pairs = -(-keys // 128)

    def time(splits: int) -> float:
        items = tokens * head_groups * splits
        rounds = -(-items // SMS) * (pairs / splits + 0.5)
        return rounds if splits == 1 else rounds + 0.5 + 2 * items / SMS

    splits = min((splits for splits in SPARSE_MLA_SPLITS if splits <= pairs), key=time)
    return dataclasses.replace(SPARSE_MLA_FP8 if fp8 else SPARSE_MLA_BF16, splits=splits)


CONFIGS["sparse_mla"] = [
    dataclasses.replace(config, splits=splits)
    for config in (SPARSE_MLA_BF16, SPARSE_MLA_FP8)
    for splits in SPARSE_MLA_SPLITS
]


# ---- matrix products of many rows ------------------------------------------------------------------------------


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

Up to 128 tokens are better taken as two tiles: by `experiments.bench.sweep`, as the other choices here.
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


# ---- SwiGLU behind the product of few rows ----------------------------------------------------------------------


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


# ---- few_rows_int4 ---------------------------------------------------------------------------------------------


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
