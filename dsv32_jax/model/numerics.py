"""Products with weights, quantised or not: dense ones, and those of the experts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dsv32_jax.model.observation import Observed, see, see_experts
from pallas_kernels import matmul as products
from pallas_kernels import moe_dispatch
from pallas_kernels.backend import KERNEL, resolve
from pallas_kernels.matmul import BLOCK, FP8_BLOCK, Weight, is_qtensor, scheme_of, silu_product
from pallas_kernels.moe_dispatch import RoutingPlan, gather_rows, gather_rows_fp8


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
        return products.matmul(x, weight, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """What every product takes."""
        return {"quantize_input": self.act_quant, "scale_fmt": self.scale_fmt, "backend": self.backend}

    def swiglu(self, x: jax.Array, gate: Weight, up: Weight) -> jax.Array:
        """silu(x gate^T) * (x up^T) of x [M, K] and weights [W, K]: [M, W] in x's dtype."""
        if isinstance(gate, Observed) or isinstance(up, Observed):
            return silu_product(self.matmul(x, gate), self.matmul(x, up))
        hidden: Any = products.swiglu(x, gate, up, **self.options)
        return hidden

    def tile_rows(self, choices: int, *weights: Weight) -> int | None:
        """Rows of a routing plan's tiles for `experts` with weights [E, N, K], of so many choices.

        No fewer than the kernels take of each weight: smaller tiles would go to a loop. None: the plan's own default.
        """
        if resolve(self.backend, "experts", KERNEL) == "reference":
            return None
        fewest = products.tile_rows(*(weight.weight if isinstance(weight, Observed) else weight for weight in weights))
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
        how: dict[str, Any] = {**tiles, **self.options}
        if self.act_quant and all_fp8(gate, up, down):
            return self.fp8_experts(x, gate, up, down, plan, how)
        rows = gather_rows(x, plan, backend=self.backend)
        if isinstance(gate, Observed) and isinstance(up, Observed) and isinstance(down, Observed):
            where = (plan.row_token, plan.tile_expert)
            see_experts(gate, rows, *where)
            see_experts(up, rows, *where)
            hidden: Any = products.grouped_swiglu(rows, gate.weight, up.weight, **how)
            see_experts(down, hidden, *where)
            return products.grouped_matmul(hidden, down.weight, **how)
        if not any(map(is_qtensor, (gate, up, down))):
            hidden = products.grouped_swiglu(rows, gate, up, **how)
        else:
            hidden = silu_product(*(products.grouped_matmul(rows, weight, **how) for weight in (gate, up)))
        return products.grouped_matmul(hidden, down, **how)

    def fp8_experts(self, x: jax.Array, gate: Any, up: Any, down: Any, plan: RoutingPlan, how: dict[str, Any]) -> Any:
        """`experts` in FP8: a token is quantised once for all its experts, and each expert's hidden rows once."""
        hidden: Any
        if x.dtype != jnp.bfloat16:  # rows in FP8 say nothing of the dtype before
            hidden = products.grouped_swiglu(gather_rows(x, plan, backend=self.backend), gate, up, **how)
            return products.grouped_matmul(hidden, down, **how)
        order = {"scales_by_group": plan.tile % BLOCK == 0}  # what the kernels for these tiles take
        rows, row_scales = gather_rows_fp8(x, plan, self.scale_fmt, **order, backend=self.backend)
        hidden, hidden_scales = products.grouped_swiglu(
            rows, gate, up, row_scales=row_scales, quantize_result=True, **order, **how
        )
        return products.grouped_matmul(hidden, down, row_scales=hidden_scales, **order, **how)


def all_fp8(*weights: Weight) -> bool:
    """Whether each is a QTensor in the checkpoint's own scheme."""
    return all(scheme_of(weight) == FP8_BLOCK for weight in weights)


def float32_matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [M, K] times weight [N, K] transposed in float32, [M, N]: head, router and the indexer's head weights.

    Operands of one narrow type stay in it: their products are exact in the float32 accumulator.
    """
    dtype = jnp.promote_types(x.dtype, weight.dtype)
    return jnp.matmul(x.astype(dtype), weight.astype(dtype).T, precision="highest", preferred_element_type=jnp.float32)
