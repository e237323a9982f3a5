"""How the kernel of the routing plan divides its work, and which config a shape gets."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
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


CONFIGS = [
    *(PlanConfig(warpgroups=warpgroups) for warpgroups in (1, 2, 4)),
    *(PlanConfig(warpgroups=4, cluster=cluster) for cluster in (2, 4, 8)),
]


def choose_config(choices: int) -> PlanConfig:
    """Returns the config for so many choices of all tokens: at most two a thread, as far as there are threads."""
    return next((c for c in CONFIGS if 256 * c.warpgroups * c.cluster >= choices), CONFIGS[-1])
