"""Mixture-of-experts routing, the routing plan that every expert product shares, and the moves of rows it describes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic, quantize, tuning
from pallas_kernels.backend import KERNEL, resolve, without_gradient
from pallas_kernels.moe_dispatch import mosaic_gpu, planning, reference, routing, rows
from pallas_kernels.moe_dispatch.reference import RoutingPlan, tile_rows
from pallas_kernels.quantize.reference import GROUP

__all__ = ["RoutingPlan", "combine", "gather_rows", "gather_rows_fp8", "make_plan", "route", "tile_rows"]


def chosen_backend(backend: str, op: str, unsupported: str | None, tokens: int) -> tuple[str, Any]:
    """The backend, and the `interpret` argument of its kernel; without tokens there is nothing to launch."""
    chosen = resolve(backend, op, KERNEL, unsupported)
    if tokens == 0:
        chosen = "reference"
    return chosen, mosaic.interpret_on(chosen)


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
      backend: "auto", "mosaic_gpu", "interpret" or "reference". The kernel has no gradient.

    Returns:
      experts int32 [T, experts_per_token], best first, and weights float32 of the same shape, from the unbiased scores.
      Equal biased scores go to the lowest index on every backend. Where two that are not equal lie within a few units
      in the last place, backends may choose differently, as they do not share the last bit of the exponential.
    """
    unsupported = routing.unsupported(logits, bias, num_groups, groups_kept, experts_per_token)
    chosen, interpret = chosen_backend(backend, "moe_dispatch.route", unsupported, logits.shape[0])
    if chosen == "reference":
        return reference.route(logits, bias, num_groups, groups_kept, experts_per_token, normalize, scaling_factor)
    how = (num_groups, groups_kept, experts_per_token, normalize, float(scaling_factor))
    kernel = functools.partial(mosaic_gpu.route, shapes=mosaic_gpu.Routing(*logits.shape, *how), interpret=interpret)
    return without_gradient(kernel, "moe_dispatch.route")(logits, bias)


def make_plan(
    experts: jax.Array, valid: jax.Array, num_experts: int, tile: int | None = None, *, backend: str = "auto"
) -> RoutingPlan:
    """The plan for chosen experts: a stable sort of the choices by expert, padded to tiles.

    Args:
      experts: int32 [T, K], each from 0 to num_experts - 1.
      valid: bool [T]; the other tokens take no row.
      num_experts: E.
      tile: rows of a tile; by default about the mean number of rows of an expert, within 8 and 128.
      backend: "auto", "mosaic_gpu", "interpret" or "reference".

    Returns:
      The plan, the same on every backend.
    """
    unsupported = planning.unsupported(experts, num_experts)
    chosen, interpret = chosen_backend(backend, "moe_dispatch.make_plan", unsupported, experts.size)
    if chosen == "reference":
        return reference.make_plan(experts, valid, num_experts, tile)
    tile, config = tile or tile_rows(experts.size, num_experts), tuning.moe_plan(experts.size)
    arrays = mosaic_gpu.make_plan(
        experts, valid, num_experts=num_experts, tile=tile, config=config, interpret=interpret
    )
    return RoutingPlan(*arrays, tile)


def gather_rows(x: jax.Array, plan: RoutingPlan, *, backend: str = "auto") -> jax.Array:
    """x [T, D] -> [P, D] in the plan's order; padding rows are 0. The kernel has no gradient."""
    unsupported = rows.unsupported(x, plan.token_row.shape[1], ("bfloat16",), "x")
    chosen, interpret = chosen_backend(backend, "moe_dispatch.gather_rows", unsupported, x.shape[0])
    if chosen == "reference":
        return reference.gather_rows(x, plan)
    kernel = functools.partial(mosaic_gpu.gather_rows, interpret=interpret)
    return without_gradient(kernel, "moe_dispatch.gather_rows")(x, plan.row_token, plan.token_row)[0]


def gather_rows_fp8(
    x: jax.Array,
    plan: RoutingPlan,
    scale_fmt: str | None = "ue8m0",
    *,
    scales_by_group: bool = False,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """`quantize(gather_rows(x, plan), scale_fmt)` in one pass; each token is quantised once.

    Args:
      x: float [T, D], D a multiple of 128.
      plan: of the tokens.
      scale_fmt: see `quantize`.
      scales_by_group: scales as [D / 128, P], else as [P, D / 128].
      backend: "auto", "mosaic_gpu", "interpret" or "reference". The kernel has no gradient.

    Returns:
      values float8_e4m3fn [P, D] and scales float32; padding rows are 0 and have the scale of zeros.

    Raises:
      ValueError: D is no multiple of 128, or `scale_fmt` is unknown.
    """
    quantize.check(x, scale_fmt, GROUP)
    unsupported = rows.unsupported(x, plan.token_row.shape[1], ("bfloat16",), "x")
    chosen, interpret = chosen_backend(backend, "moe_dispatch.gather_rows_fp8", unsupported, x.shape[0])
    if chosen == "reference":
        return reference.gather_rows_fp8(x, plan, scale_fmt, scales_by_group)
    kernel = functools.partial(
        mosaic_gpu.gather_rows,
        quantized=True,
        scale_fmt=scale_fmt,
        scales_by_group=scales_by_group,
        interpret=interpret,
    )
    return without_gradient(kernel, "moe_dispatch.gather_rows_fp8")(x, plan.row_token, plan.token_row)


def combine(expert_rows: jax.Array, weights: jax.Array, plan: RoutingPlan, *, backend: str = "auto") -> jax.Array:
    """Rows of the plan [P, D] -> float32 [T, D]: each token's rows, weighted (float32 [T, K]) and summed.

    The kernel adds up in the order of the choices, every product rounded to float32; it has no gradient.
    """
    unsupported = rows.unsupported(expert_rows, plan.token_row.shape[1], ("bfloat16", "float32"), "rows")
    if weights.dtype != jnp.float32:
        unsupported = unsupported or f"weights of dtype {weights.dtype}; it takes float32"
    chosen, interpret = chosen_backend(backend, "moe_dispatch.combine", unsupported, weights.shape[0])
    if chosen == "reference":
        return reference.combine(expert_rows, weights, plan)
    kernel = functools.partial(mosaic_gpu.combine, interpret=interpret)
    return without_gradient(kernel, "moe_dispatch.combine")(expert_rows, weights, plan.token_row)
