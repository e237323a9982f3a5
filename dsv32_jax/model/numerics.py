"""Products with weights, quantised or not: dense ones, and those of the experts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dsv32_jax.model.observation import Observed, see, see_experts
from dsv32_jax.model.quant import QTensor, Weight, dense, is_qtensor, scheme_of
from pallas_kernels import moe_dispatch
from pallas_kernels.backend import KERNEL, resolve
from pallas_kernels.grouped_matmul import (
    fewest_tile_rows,
    grouped_dense_matmul,
    grouped_matmul,
    grouped_quant_matmul,
    grouped_swiglu,
)
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


@dataclasses.dataclass(frozen=True)
class Numerics:
    """How products are computed.

    Attributes:
      act_quant: quantise the inputs of FP8 and INT8 linears, index queries and keys, and the latent. Without it weights
        alone are quantised; with INT4 that is always so.
      scale_fmt: format of those scales, from the checkpoint's quantization_config.
      backend: of every op.
    """

    act_quant: bool
    scale_fmt: str | None
    backend: str

    def matmul(self, x: jax.Array, weight: Weight) -> jax.Array:
        """x [M, K] times weight [N, K] transposed: [M, N] in x's dtype, accumulated in float32."""
        if isinstance(weight, Observed):
            see(weight, x)
            weight = weight.weight
        if isinstance(weight, QTensor):
            parts, how = (weight.values, weight.scales), {"backend": self.backend}
            if weight.scheme == "int4":
                return int4_matmul(x, *parts, **how)
            if weight.scheme == "fp8_block":
                return quant_matmul(x, *parts, quantize_input=self.act_quant, scale_fmt=self.scale_fmt, **how)
            if self.act_quant:
                return int8_matmul(x, *parts, **how)
        weight = dense(weight, x.dtype)
        # Without preferred_element_type: sums are float32 all the same, and the gradient's products stay in x's dtype.
        return jnp.matmul(x, weight.T, precision="highest")

    def swiglu(self, x: jax.Array, gate: Weight, up: Weight) -> jax.Array:
        """silu(x gate^T) * (x up^T) of x [M, K] and weights [W, K]: [M, W] in x's dtype."""
        if self.act_quant and all_fp8(gate, up):
            assert isinstance(gate, QTensor) and isinstance(up, QTensor)
            scales = {"gate_scales": gate.scales, "up_scales": up.scales, "scale_fmt": self.scale_fmt}
            hidden: Any = grouped_swiglu(x, gate.values, up.values, None, **scales, backend=self.backend)
            return hidden
        return swiglu(self.matmul(x, gate), self.matmul(x, up))

    def tile_rows(self, choices: int, *weights: Weight) -> int | None:
        """Rows of a routing plan's tiles for `experts` with weights [E, N, K], of so many choices.

        No fewer than the kernels take of each weight: smaller tiles would go to a loop. None: the plan's own default.
        """
        if resolve(self.backend, "experts", KERNEL) == "reference":
            return None
        fewest = max(map(fewest_tile_rows, map(stored_as, weights)))
        return max(fewest, moe_dispatch.tile_rows(choices, weights[0].shape[0]))

    def experts(self, x: jax.Array, gate: Weight, up: Weight, down: Weight, plan: RoutingPlan) -> jax.Array:
        """The chosen experts of every token.

        Args:
          x: [T, D].
          gate, up, down: [E, W, D], [E, W, D] and [E, D, W].
          plan: of the tokens.

        Returns:
          [P, D] in the plan's order, in x's dtype.
        """
        tiles = {"tile_expert": plan.tile_expert, "used_tiles": plan.used_tiles}
        how: dict[str, Any] = {**tiles, "backend": self.backend}
        if self.act_quant and all_fp8(gate, up, down):
            return self.fp8_experts(x, gate, up, down, plan, how)
        rows = gather_rows(x, plan, backend=self.backend)
        if isinstance(gate, Observed) and isinstance(up, Observed) and isinstance(down, Observed):
            where = (plan.row_token, plan.tile_expert)
            see_experts(gate, rows, *where)
            see_experts(up, rows, *where)
            hidden: Any = grouped_swiglu(rows, gate.weight, up.weight, **how)
            see_experts(down, hidden, *where)
            return grouped_dense_matmul(hidden, down.weight, **how)
        if not any(map(is_qtensor, (gate, up, down))):
            return grouped_dense_matmul(grouped_swiglu(rows, gate, up, **how), down, **how)
        hidden = swiglu(self.grouped(rows, gate, how), self.grouped(rows, up, how))
        return self.grouped(hidden, down, how)

    def grouped(self, rows: jax.Array, weight: Weight, how: dict[str, Any]) -> jax.Array:
        """`matmul` of each tile of rows [P, K] with the weight [E, N, K] of its expert: [P, N]."""
        if not isinstance(weight, QTensor):
            return grouped_dense_matmul(rows, weight, **how)
        parts = (weight.values, weight.scales)
        if weight.scheme == "int4":
            return grouped_int4_matmul(rows, *parts, **how)
        if not self.act_quant:
            return grouped_matmul(rows, weight, how["tile_expert"], self.matmul)
        if weight.scheme == "int8":
            return grouped_int8_matmul(rows, *parts, **how)
        return grouped_quant_matmul(rows, *parts, quantize_input=True, scale_fmt=self.scale_fmt, **how)

    def fp8_experts(self, x: jax.Array, gate: Any, up: Any, down: Any, plan: RoutingPlan, how: dict[str, Any]) -> Any:
        """`experts` in FP8: a token is quantised once for all its experts, and each expert's hidden rows once."""
        how = {**how, "scale_fmt": self.scale_fmt}
        hidden: Any
        weights = {"gate": gate.values, "up": up.values, "gate_scales": gate.scales, "up_scales": up.scales}
        if x.dtype != jnp.bfloat16:  # rows in FP8 say nothing of the dtype before
            hidden = grouped_swiglu(gather_rows(x, plan, backend=self.backend), **weights, **how)
            return grouped_quant_matmul(hidden, down.values, down.scales, quantize_input=True, **how)
        order = {"scales_by_group": plan.tile % BLOCK == 0}  # what the kernels for these tiles take
        rows, row_scales = gather_rows_fp8(x, plan, self.scale_fmt, **order, backend=self.backend)
        hidden, hidden_scales = grouped_swiglu(
            rows, **weights, row_scales=row_scales, quantize_result=True, **order, **how
        )
        products = {"quantize_input": True, "row_scales": hidden_scales, **order, **how}
        return grouped_quant_matmul(hidden, down.values, down.scales, **products)


def stored_as(weight: Weight) -> jax.Array:
    """The array that holds a weight's values."""
    if isinstance(weight, Observed):
        weight = weight.weight
    return weight.values if isinstance(weight, QTensor) else weight


def all_fp8(*weights: Weight) -> bool:
    """Whether each is a QTensor in the checkpoint's own scheme."""
    return all(scheme_of(weight) == "fp8_block" for weight in weights)


def float32_matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [M, K] times weight [N, K] transposed in float32, [M, N]: head, router and the indexer's head weights.

    Operands of one narrow type stay in it: their products are exact in the float32 accumulator.
    """
    dtype = jnp.promote_types(x.dtype, weight.dtype)
    return jnp.matmul(x.astype(dtype), weight.astype(dtype).T, precision="highest", preferred_element_type=jnp.float32)
