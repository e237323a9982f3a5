"""Products with weights, quantised or not: dense ones, and those of the experts."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import matmul as kernels
from pallas_kernels import moe_dispatch
from pallas_kernels.backend import KERNEL, resolve
from pallas_kernels.matmul import (
    BLOCK,
    FP8_BLOCK,
    Weight,
    grouped_matmul,
    grouped_swiglu,
    is_qtensor,
    scheme_of,
    silu_product,
)
from pallas_kernels.moe_dispatch import RoutingPlan, gather_rows, gather_rows_fp8

__all__ = ["all_fp8", "experts", "float32_matmul", "tile_rows"]


def experts(
    x: jax.Array,
    gate: Weight,
    up: Weight,
    down: Weight,
    plan: RoutingPlan,
    *,
    quantize_input: bool,
    scale_fmt: str | None = "ue8m0",
    backend: str = "auto",
) -> jax.Array:
    """The chosen experts of every token: [P, D] in the plan's order, in x's dtype.

    Args:
      x: float [T, D].
      gate, up, down: [E, W, D], [E, W, D] and [E, D, W], arrays or `QTensor`s.
      plan: of the tokens.
      quantize_input, scale_fmt, backend: see `pallas_kernels.matmul`.
    """
    used_tiles = plan.used_tiles

    def product(rows: jax.Array, weight: Weight, row_scales: jax.Array | None = None, by_group: bool = False):
        return grouped_matmul(
            rows,
            weight,
            plan.tile_expert,
            used_tiles=used_tiles,
            row_scales=row_scales,
            scales_by_group=by_group,
            quantize_input=quantize_input,
            scale_fmt=scale_fmt,
            backend=backend,
        )

    def activations(rows: jax.Array, row_scales: jax.Array | None = None, by_group: bool = False) -> Any:
        return grouped_swiglu(
            rows,
            gate,
            up,
            plan.tile_expert,
            used_tiles=used_tiles,
            row_scales=row_scales,
            scales_by_group=by_group,
            quantize_result=row_scales is not None,
            quantize_input=quantize_input,
            scale_fmt=scale_fmt,
            backend=backend,
        )

    if quantize_input and all_fp8(gate, up, down) and x.dtype == jnp.bfloat16:
        # A token is quantised once for all its experts, and each expert's hidden rows once.
        by_group = plan.tile % BLOCK == 0  # what the kernels for these tiles take
        rows, row_scales = gather_rows_fp8(x, plan, scale_fmt, scales_by_group=by_group, backend=backend)
        hidden, hidden_scales = activations(rows, row_scales, by_group)
        return product(hidden, down, hidden_scales, by_group)
    rows = gather_rows(x, plan, backend=backend)
    if all_fp8(gate, up, down) or not any(map(is_qtensor, (gate, up, down))):
        hidden = activations(rows)
    else:
        hidden = silu_product(product(rows, gate), product(rows, up))
    return product(hidden, down)


def tile_rows(choices: int, *weights: Weight, backend: str) -> int | None:
    """Rows of a routing plan's tiles for `experts` with weights [E, N, K], of so many choices.

    No fewer than the kernels take of each weight: smaller tiles would go to a loop. None: the plan's own default.
    """
    if resolve(backend, "experts", KERNEL) == "reference":
        return None
    return max(kernels.tile_rows(*weights), moe_dispatch.tile_rows(choices, weights[0].shape[0]))


def all_fp8(*weights: Weight) -> bool:
    """Whether each is a QTensor in the checkpoint's own scheme."""
    return all(scheme_of(weight) == FP8_BLOCK for weight in weights)


def float32_matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [M, K] times weight [N, K] transposed in float32, [M, N]: head, router and the indexer's head weights.

    Operands of one narrow type stay in it: their products are exact in the float32 accumulator.
    """
    dtype = jnp.promote_types(x.dtype, weight.dtype)
    return jnp.matmul(x.astype(dtype), weight.astype(dtype).T, precision="highest", preferred_element_type=jnp.float32)
