"""How the routing plan is made."""

from __future__ import annotations

import dataclasses

from pallas_kernels.tuning.base import CONFIGS


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
