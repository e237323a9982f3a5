"""How `sparse_mla` divides its work, and which config a shape gets."""

from __future__ import annotations

import dataclasses

from pallas_kernels.hopper import SMS

SPLITS = (1, 2, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class Config:
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


BF16 = Config()
FP8 = Config(registers=(208, 88), prefetch=True)
"""An FP8 cache's keys go through the registers of the loading threads."""


def choose_config(tokens: int, head_groups: int, keys: int, *, fp8: bool) -> Config:
    """Returns the config for `tokens` x `head_groups` (of 64 heads) items of `keys` keys each.

    The number of splits is that of the shortest time by a simple model, in units of one pair of key blocks (3.5 us): an
    item costs its pairs and half of one more; a split also its partial output, written and read again.
    """
    pairs = -(-keys // 128)

    def time(splits: int) -> float:
        items = tokens * head_groups * splits
        rounds = -(-items // SMS) * (pairs / splits + 0.5)
        return rounds if splits == 1 else rounds + 0.5 + 2 * items / SMS

    splits = min((splits for splits in SPLITS if splits <= pairs), key=time)
    return dataclasses.replace(FP8 if fp8 else BF16, splits=splits)


CONFIGS = [dataclasses.replace(config, splits=splits) for config in (BF16, FP8) for splits in SPLITS]
