"""Tile sizes of what attention calls: scores, selection, cache writes, top-k and sparse MLA."""

from __future__ import annotations

import dataclasses

from pallas_kernels.tuning.base import CONFIGS, SHARED_BYTES, SMS

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
