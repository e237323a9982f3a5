"""Products with weights, quantised or not: dense ones, and those of the experts."""

from typing import Any

import jax
import jax.numpy as jnp

from dsv32_jax.model.quant import QTensor, Weight, dense, is_qtensor, scheme_of
from pallas_kernels import moe_dispatch
from pallas_kernels.backend import KERNEL, resolve
from pallas_kernels.grouped_matmul import (
    fewest_tile_rows,
    grouped_dense_matmul,
    grouped_quant_matmul,
    grouped_swiglu,
)
from pallas_kernels.grouped_matmul import grouped_matmul as grouped_loop
from pallas_kernels.grouped_matmul.reference import swiglu
from pallas_kernels.moe_dispatch import RoutingPlan, gather_rows, gather_rows_fp8
from pallas_kernels.quant_matmul import (
    BLOCK,
    grouped_int4_matmul,
    grouped_int8_matmul,
    int4_matmul,
    int8_matmul,
    quant_matmul,
)

__all__ = ["all_fp8", "experts", "float32_matmul", "grouped_matmul", "matmul", "matmul_swiglu", "swiglu", "tile_rows"]


def matmul(
    x: jax.Array, weight: Weight, *, quantize_input: bool, scale_fmt: str | None = "ue8m0", backend: str = "auto"
) -> jax.Array:
    """x [M, K] times weight [N, K] transposed: [M, N] in x's dtype, accumulated in float32.

    Args:
      x: float [M, K].
      weight: [N, K], an array or a `QTensor`.
      quantize_input: quantise x too, for weights in FP8 and INT8; with others it stays as it is.
      scale_fmt: of the scales of x in FP8.
      backend: see `pallas_kernels`.
    """
    if isinstance(weight, QTensor):
        stored = (weight.values, weight.scales)
        if weight.scheme == "int4":
            return int4_matmul(x, *stored, backend=backend)
        if weight.scheme == "fp8_block":
            return quant_matmul(x, *stored, quantize_input=quantize_input, scale_fmt=scale_fmt, backend=backend)
        if quantize_input:
            return int8_matmul(x, *stored, backend=backend)
    # Without preferred_element_type: sums are float32 all the same, and the gradient's products stay in x's dtype.
    return jnp.matmul(x, dense(weight, x.dtype).T, precision="highest")


def matmul_swiglu(
    x: jax.Array, gate: Weight, up: Weight, *, scale_fmt: str | None = "ue8m0", backend: str = "auto"
) -> jax.Array:
    """`swiglu` of two products of x [M, K] with weights [W, K] in FP8, and of x in FP8, as one: [M, W] in x's dtype."""
    assert isinstance(gate, QTensor) and isinstance(up, QTensor)
    scales = {"gate_scales": gate.scales, "up_scales": up.scales}
    hidden: Any = grouped_swiglu(x, gate.values, up.values, None, **scales, scale_fmt=scale_fmt, backend=backend)
    return hidden


def grouped_matmul(
    rows: jax.Array,
    weight: Weight,
    tile_expert: jax.Array,
    *,
    used_tiles: jax.Array | None = None,
    quantize_input: bool,
    scale_fmt: str | None = "ue8m0",
    backend: str = "auto",
) -> jax.Array:
    """`matmul` of each tile of rows [P, K] with the weight [E, N, K] of its expert: [P, N].

    Args:
      rows: float [P, K], in the order of a `RoutingPlan`.
      weight: [E, N, K], an array or a `QTensor`.
      tile_expert: int32 [tiles], the expert of each tile of P / tiles rows.
      used_tiles: int32 [], how many tiles hold a row at all: the first ones. The results of the others are undefined.
      quantize_input, scale_fmt, backend: see `matmul`.
    """
    if not isinstance(weight, QTensor):
        return grouped_dense_matmul(rows, weight, tile_expert, used_tiles=used_tiles, backend=backend)
    stored = (weight.values, weight.scales, tile_expert)
    if weight.scheme == "int4":
        return grouped_int4_matmul(rows, *stored, used_tiles=used_tiles, backend=backend)
    if not quantize_input:

        def product(x: jax.Array, one: Any) -> jax.Array:
            return matmul(x, one, quantize_input=False, scale_fmt=scale_fmt, backend=backend)

        return grouped_loop(rows, weight, tile_expert, product)
    if weight.scheme == "int8":
        return grouped_int8_matmul(rows, *stored, used_tiles=used_tiles, backend=backend)
    return grouped_quant_matmul(
        rows, *stored, quantize_input=True, scale_fmt=scale_fmt, used_tiles=used_tiles, backend=backend
    )


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
      quantize_input, scale_fmt, backend: see `matmul`.
    """
    if quantize_input and all_fp8(gate, up, down):
        return _fp8_experts(x, gate, up, down, plan, scale_fmt, backend)
    rows = gather_rows(x, plan, backend=backend)
    tiles: dict[str, Any] = {"tile_expert": plan.tile_expert, "used_tiles": plan.used_tiles, "backend": backend}
    if not any(map(is_qtensor, (gate, up, down))):
        return grouped_dense_matmul(grouped_swiglu(rows, gate, up, **tiles), down, **tiles)
    rounding: dict[str, Any] = {"quantize_input": quantize_input, "scale_fmt": scale_fmt}
    hidden = swiglu(*(grouped_matmul(rows, weight, **tiles, **rounding) for weight in (gate, up)))
    return grouped_matmul(hidden, down, **tiles, **rounding)


def _fp8_experts(
    x: jax.Array, gate: Any, up: Any, down: Any, plan: RoutingPlan, scale_fmt: str | None, backend: str
) -> jax.Array:
    """`experts` in FP8: a token is quantised once for all its experts, and each expert's hidden rows once."""
    tiles: dict[str, Any] = {"tile_expert": plan.tile_expert, "used_tiles": plan.used_tiles, "backend": backend}
    tiles |= {"scale_fmt": scale_fmt}
    hidden: Any
    weights = {"gate": gate.values, "up": up.values, "gate_scales": gate.scales, "up_scales": up.scales}
    if x.dtype != jnp.bfloat16:  # rows in FP8 say nothing of the dtype before
        hidden = grouped_swiglu(gather_rows(x, plan, backend=backend), **weights, **tiles)
        return grouped_quant_matmul(hidden, down.values, down.scales, quantize_input=True, **tiles)
    order = {"scales_by_group": plan.tile % BLOCK == 0}  # what the kernels for these tiles take
    rows, row_scales = gather_rows_fp8(x, plan, scale_fmt, **order, backend=backend)
    hidden, hidden_scales = grouped_swiglu(
        rows, **weights, row_scales=row_scales, quantize_result=True, **order, **tiles
    )
    products = {"quantize_input": True, "row_scales": hidden_scales, **order, **tiles}
    return grouped_quant_matmul(hidden, down.values, down.scales, **products)


def tile_rows(choices: int, *weights: Weight, backend: str) -> int | None:
    """Rows of a routing plan's tiles for `experts` with weights [E, N, K], of so many choices.

    No fewer than the kernels take of each weight: smaller tiles would go to a loop. None: the plan's own default.
    """
    if resolve(backend, "experts", KERNEL) == "reference":
        return None
    stored = (weight.values if isinstance(weight, QTensor) else weight for weight in weights)
    return max(*map(fewest_tile_rows, stored), moe_dispatch.tile_rows(choices, weights[0].shape[0]))


def all_fp8(*weights: Weight) -> bool:
    """Whether each is a QTensor in the checkpoint's own scheme."""
    return all(scheme_of(weight) == "fp8_block" for weight in weights)


def float32_matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [M, K] times weight [N, K] transposed in float32, [M, N]: head, router and the indexer's head weights.

    Operands of one narrow type stay in it: their products are exact in the float32 accumulator.
    """
    dtype = jnp.promote_types(x.dtype, weight.dtype)
    return jnp.matmul(x.astype(dtype), weight.astype(dtype).T, precision="highest", preferred_element_type=jnp.float32)
