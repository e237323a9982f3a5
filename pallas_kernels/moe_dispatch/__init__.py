"""Mixture-of-experts routing and the routing plan that every expert product shares."""

import jax

from pallas_kernels.backend import resolve
from pallas_kernels.moe_dispatch import reference
from pallas_kernels.moe_dispatch.reference import RoutingPlan, combine, gather_rows, make_plan

__all__ = ["RoutingPlan", "combine", "gather_rows", "make_plan", "route"]


def route(
    logits: jax.Array,
    bias: jax.Array,
    *,
    num_groups: int,
    groups_kept: int,
    experts_per_token: int,
    normalize: bool,
    scaling_factor: float,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Group-limited sigmoid routing with a correction bias ("noaux_tc").

    Source: `Gate` in the official `inference/model.py`; DeepSeek-V3 report, section 2.1.2.

    Args:
      logits: float32 [T, E].
      bias: float32 [E], added to the scores for choosing only.
      num_groups: groups of consecutive experts.
      groups_kept: groups that stay, by the sum of their two best biased scores.
      experts_per_token: experts chosen, by biased score, ties to the lowest index.
      normalize: divide the weights by their sum.
      scaling_factor: then multiply by this.
      backend: "auto" or "reference".

    Returns:
      experts int32 [T, experts_per_token], best first, and weights float32 of the same shape, from the unbiased scores.
    """
    resolve(backend, "moe_dispatch")
    return reference.route(logits, bias, num_groups, groups_kept, experts_per_token, normalize, scaling_factor)
