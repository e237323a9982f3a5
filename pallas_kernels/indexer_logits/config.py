"""How `indexer_logits` divides its work, and which config a shape gets."""

from __future__ import annotations

import dataclasses

from pallas_kernels.hopper import SHARED_BYTES, SMS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
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


PREFILL = Config(warpgroups=3, tokens=4, split_keys=False, blocks=1, stages=3, ahead=2)
DECODE = Config(warpgroups=3, tokens=1, split_keys=True, blocks=1, stages=3, ahead=2, ctas=2 * SMS)
DECODE_PAIRS = Config(warpgroups=3, tokens=2, split_keys=True, blocks=1, stages=6, ahead=4)
CONFIGS = [PREFILL, DECODE, DECODE_PAIRS]


def choose_config(tokens: int, sequences: int) -> Config:
    """Returns the config by the tokens of a sequence: one, two (a token and its draft), or many."""
    if tokens <= sequences:
        return DECODE
    return DECODE_PAIRS if tokens <= 2 * sequences else PREFILL
