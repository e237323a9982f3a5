"""How `top_k` divides its work, and which config a shape gets."""

from __future__ import annotations

import dataclasses

from pallas_kernels.hopper import SHARED_BYTES, SMS

LARGEST_K = 2048
"""What the kernel takes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
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
        if self.capacity < LARGEST_K + self.slack + self.chunk:
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


MANY_ROWS = Config(warpgroups=2, per_thread=16, stages=3, capacity=6912, ctas=2 * SMS)
"""Two CTAs on a multiprocessor: while one ends its row, the other streams."""
LARGE_CTAS = Config(warpgroups=4, per_thread=16, stages=4, capacity=11008)
"""One larger CTA on a multiprocessor: a round of rows is half as many, for numbers of rows that suit it better."""
FEW_ROWS = Config(warpgroups=4, per_thread=8, stages=8, capacity=8192)
PAIRS = Config(warpgroups=4, per_thread=16, stages=3, capacity=11008, cluster=2)
"""Two CTAs a row, each of which takes many chunks: larger ones."""
INTERPRETED = Config(warpgroups=1, per_thread=4, stages=2, capacity=3328, sample=512, ctas=3)
"""For the interpreter, which knows one warpgroup a CTA here; few CTAs, so that each has several rows."""
CONFIGS = [
    MANY_ROWS,
    LARGE_CTAS,
    PAIRS,
    *(dataclasses.replace(FEW_ROWS, cluster=cluster) for cluster in (1, 2, 4, 8)),
]


LARGE_CTAS_COST = 0.54
"""Time of a round of `LARGE_CTAS` in rounds of `MANY_ROWS`, by their times for 4096 rows."""


def choose_config(rows: int, length: int) -> Config:
    """Returns the config for `rows` rows of `length` scores.

    Few rows are shared by clusters, so that all multiprocessors have work; each CTA of one has at least a chunk.
    """
    if rows > SMS:
        rounds, rounds_large = -(-rows // MANY_ROWS.ctas), -(-rows // LARGE_CTAS.ctas)
        return LARGE_CTAS if LARGE_CTAS_COST * rounds_large < rounds else MANY_ROWS
    cluster = 8 if rows <= SMS // 8 else 4 if rows <= SMS // 4 else 2 if rows <= SMS // 2 else 1
    while cluster > 1 and cluster * FEW_ROWS.chunk > length:
        cluster //= 2
    if cluster == 2 and length >= 8 * PAIRS.chunk:
        return PAIRS
    return dataclasses.replace(FEW_ROWS, cluster=cluster)
