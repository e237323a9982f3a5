"""Mixture-of-experts routing, the routing plan that every expert product shares, and the moves of rows it describes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic, quantize
from pallas_kernels.arguments import FLOAT32, FLOATS, INT32, check, check_size
from pallas_kernels.backend import KERNEL, launched, resolve, without_gradient
from pallas_kernels.moe_dispatch import mosaic_gpu, planning, reference, routing, rows
from pallas_kernels.moe_dispatch.config import choose_config
from pallas_kernels.moe_dispatch.reference import RoutingPlan, tile_rows
from pallas_kernels.operators import callable_package
from pallas_kernels.quantize.reference import GROUP

__all__ = ["RoutingPlan", "combine", "gather_rows", "gather_rows_fp8", "make_plan", "route", "tile_rows"]

callable_package(__name__)


def chosen_backend(backend: str, op: str, unsupported: str | None, tokens: int) -> tuple[str, Any]:
    """Returns the backend, and the `interpret` argument of its kernel; without tokens there is nothing to launch."""
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

    Raises:
      ValueError: other dtypes or shapes than these, or more groups or experts are to be chosen than there are.
      BackendError: the kernel was asked for and does not take these arguments, or there is no such GPU.
    """
    check("moe_dispatch.route", logits=(logits, FLOAT32, "T E"), bias=(bias, FLOAT32, "E"))
    check_size("moe_dispatch.route", num_groups=num_groups, groups_kept=groups_kept)
    check_size("moe_dispatch.route", experts_per_token=experts_per_token)
    unsupported = routing.unsupported(logits, bias, num_groups, groups_kept, experts_per_token)
    chosen, interpret = chosen_backend(backend, "moe_dispatch.route", unsupported, logits.shape[0])
    check_choice(logits, bias, num_groups, groups_kept, experts_per_token)
    if chosen == "reference":
        return reference.route(logits, bias, num_groups, groups_kept, experts_per_token, normalize, scaling_factor)
    tokens, experts = logits.shape
    shapes = mosaic_gpu.Routing(
        tokens, experts, num_groups, groups_kept, experts_per_token, normalize, float(scaling_factor)
    )
    kernel = functools.partial(mosaic_gpu.route, shapes=shapes, interpret=interpret)
    return without_gradient(launched(kernel, "moe_dispatch.route", chosen), "moe_dispatch.route")(logits, bias)


def check_choice(logits, bias, num_groups: int, groups_kept: int, experts_per_token: int) -> None:
    """Raises ValueError if `route` is to choose more than there is, or its arrays do not go together."""
    experts = logits.shape[1]
    if bias.shape != (experts,) or experts % num_groups:
        raise ValueError(
            f"moe_dispatch.route: logits {logits.shape} need a bias for each of {experts} experts, not {bias.shape}, "
            f"and groups of the same size, not {num_groups} groups"
        )
    if groups_kept > num_groups or experts_per_token > experts:
        raise ValueError(
            f"moe_dispatch.route: {groups_kept} of {num_groups} groups and {experts_per_token} of {experts} experts "
            f"are more than there are"
        )


def check_plan(op: str, plan: RoutingPlan, **arrays: jax.Array) -> None:
    """Raises ValueError if arrays are not those of the plan: "x" and "weights" by tokens, "expert_rows" by rows."""
    if not isinstance(plan, RoutingPlan):
        raise ValueError(f"{op} needs plan as a RoutingPlan, see `make_plan`, not {type(plan).__name__}")
    tokens, choices = plan.token_row.shape
    wanted = {"x": (tokens,), "weights": (tokens, choices), "expert_rows": plan.row_token.shape}
    for name, array in arrays.items():
        if array.shape[: len(wanted[name])] != wanted[name]:
            raise ValueError(
                f"{op}: {name} of shape {array.shape} is not of the plan's {tokens} tokens with {choices} choices each "
                f"in {plan.row_token.shape[0]} rows"
            )


def make_plan(
    experts: jax.Array, valid: jax.Array, num_experts: int, tile: int | None = None, *, backend: str = "auto"
) -> RoutingPlan:
    """Returns the plan for chosen experts: a stable sort of the choices by expert, padded to tiles.

    Args:
      experts: int32 [T, K], each from 0 to num_experts - 1; a choice of `num_experts` takes no row, and `combine` adds
        nothing for it: so are named the experts of other devices.
      valid: bool [T]; the other tokens take no row.
      num_experts: E.
      tile: rows of a tile; by default about the mean number of rows of an expert, within 8 and 128.
      backend: "auto", "mosaic_gpu", "interpret" or "reference".

    Returns:
      The plan, the same on every backend.

    Raises:
      ValueError: other dtypes or shapes than these, or a number that is no int or less than 1.
      BackendError: the kernel was asked for and does not take these arguments, or there is no such GPU.
    """
    check("moe_dispatch.make_plan", experts=(experts, INT32, "T K"), valid=(valid, ("bool",), "T"))
    check_size("moe_dispatch.make_plan", num_experts=num_experts, **({} if tile is None else {"tile": tile}))
    if valid.shape[0] != experts.shape[0]:
        raise ValueError(f"moe_dispatch.make_plan: valid {valid.shape} and experts {experts.shape} are of other tokens")
    unsupported = planning.unsupported(experts, num_experts)
    chosen, interpret = chosen_backend(backend, "moe_dispatch.make_plan", unsupported, experts.size)
    if chosen == "reference":
        return reference.make_plan(experts, valid, num_experts, tile)
    tile, config = tile or tile_rows(experts.size, num_experts), choose_config(experts.size)
    kernel = functools.partial(
        mosaic_gpu.make_plan, num_experts=num_experts, tile=tile, config=config, interpret=interpret
    )
    row_token, tile_expert, token_row = launched(kernel, "moe_dispatch.make_plan", chosen)(experts, valid)
    return RoutingPlan(row_token, tile_expert, token_row, tile)


def gather_rows(x: jax.Array, plan: RoutingPlan, *, backend: str = "auto") -> jax.Array:
    """x [T, D] -> [P, D] in the plan's order; padding rows are 0. The kernel has no gradient.

    Raises ValueError for an x that is not float, has another rank, or is not of the plan's tokens.
    """
    check("moe_dispatch.gather_rows", x=(x, FLOATS, "T D"))
    check_plan("moe_dispatch.gather_rows", plan, x=x)
    unsupported = rows.unsupported(x, plan.token_row.shape[1], ("bfloat16",), "x")
    chosen, interpret = chosen_backend(backend, "moe_dispatch.gather_rows", unsupported, x.shape[0])
    if chosen == "reference":
        return reference.gather_rows(x, plan)
    kernel = functools.partial(mosaic_gpu.gather_rows, interpret=interpret)
    return without_gradient(launched(kernel, "moe_dispatch.gather_rows", chosen), "moe_dispatch.gather_rows")(
        x, plan.row_token, plan.token_row
    )[0]


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
      ValueError: x is not float or not of the plan's tokens, D is no multiple of 128, or `scale_fmt` is unknown.
      BackendError: the kernel was asked for and does not take these arguments, or there is no such GPU.
    """
    check("moe_dispatch.gather_rows_fp8", x=(x, FLOATS, "T D"))
    check_plan("moe_dispatch.gather_rows_fp8", plan, x=x)
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
    return without_gradient(launched(kernel, "moe_dispatch.gather_rows_fp8", chosen), "moe_dispatch.gather_rows_fp8")(
        x, plan.row_token, plan.token_row
    )


def combine(expert_rows: jax.Array, weights: jax.Array, plan: RoutingPlan, *, backend: str = "auto") -> jax.Array:
    """Returns float32 [T, D] of the plan's rows [P, D]: each token's rows, weighted (float32 [T, K]) and summed.

    The kernel adds up in the order of the choices, every product rounded to float32; it has no gradient. Raises
    ValueError for arrays of other dtypes or ranks, or that are not of the plan.
    """
    check("moe_dispatch.combine", expert_rows=(expert_rows, FLOATS, "P D"), weights=(weights, FLOATS, "T K"))
    check_plan("moe_dispatch.combine", plan, expert_rows=expert_rows, weights=weights)
    unsupported = rows.unsupported(expert_rows, plan.token_row.shape[1], ("bfloat16", "float32"), "rows")
    if weights.dtype != jnp.float32:
        unsupported = unsupported or f"weights of dtype {weights.dtype}; it takes float32"
    chosen, interpret = chosen_backend(backend, "moe_dispatch.combine", unsupported, weights.shape[0])
    if chosen == "reference":
        return reference.combine(expert_rows, weights, plan)
    kernel = functools.partial(mosaic_gpu.combine, interpret=interpret)
    return without_gradient(launched(kernel, "moe_dispatch.combine", chosen), "moe_dispatch.combine")(
        expert_rows, weights, plan.token_row
    )
