"""Quantised tensors and the products with them."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import (
    grouped_dense_matmul,
    grouped_matmul,
    grouped_quant_matmul,
    grouped_swiglu,
)
from pallas_kernels.grouped_matmul.reference import swiglu
from pallas_kernels.moe_dispatch import RoutingPlan, gather_rows, gather_rows_fp8
from pallas_kernels.quant_matmul import BLOCK, dequantize_blocks, quant_matmul
from pallas_kernels.quantize import FP8_MAX
from pallas_kernels.quantize.reference import SMALLEST_AMAX, round_up_to_power_of_two


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["scheme"])
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantised weight: a pytree of its values and scales, with the scheme as static data.

    Attributes:
      values: float8_e4m3fn [..., N, K].
      scales: float32 [..., ceil(N / 128), ceil(K / 128)]; a weight is value * scale of its block.
      scheme: "fp8_block", the checkpoint's own.
    """

    values: jax.Array
    scales: jax.Array
    scheme: str = "fp8_block"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor it stands for."""
        return self.values.shape

    @property
    def dtype(self):
        """The dtype of the stored values."""
        return self.values.dtype

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """The tensor itself; exact in bfloat16 where scales are powers of two."""
        return dequantize_blocks(self.values, self.scales, dtype)


Weight = jax.Array | QTensor


def is_qtensor(leaf: object) -> bool:
    """For `jax.tree` functions: stop at a QTensor."""
    return isinstance(leaf, QTensor)


def dense(weight: Weight, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A weight as a plain array of `dtype`."""
    return weight.dequantize(dtype) if isinstance(weight, QTensor) else weight.astype(dtype)


def quantize_weight(weight: jax.Array) -> QTensor:
    """float [..., N, K] -> fp8_block with power-of-two scales, the least that keep each 128 x 128 block within 448."""
    rows, columns = weight.shape[-2:]
    pad = [(0, 0)] * (weight.ndim - 2) + [(0, -rows % BLOCK), (0, -columns % BLOCK)]
    blocks = jnp.pad(weight.astype(jnp.float32), pad)
    blocks = blocks.reshape(*weight.shape[:-2], (rows + pad[-2][1]) // BLOCK, BLOCK, -1, BLOCK)
    amax = jnp.maximum(jnp.max(jnp.abs(blocks), axis=(-3, -1)), SMALLEST_AMAX)
    scales = round_up_to_power_of_two(amax * jnp.float32(1 / FP8_MAX))
    values = jnp.clip(blocks / scales[..., :, None, :, None], -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn)
    values = values.reshape(*weight.shape[:-2], rows + pad[-2][1], columns + pad[-1][1])
    return QTensor(values[..., :rows, :columns], scales)


@dataclasses.dataclass(frozen=True)
class Numerics:
    """How products are computed.

    Attributes:
      act_quant: quantise the inputs of FP8 linears, index queries and keys, and the latent.
      scale_fmt: format of those scales, from the checkpoint's quantization_config.
      backend: of every op.
    """

    act_quant: bool
    scale_fmt: str | None
    backend: str

    def matmul(self, x: jax.Array, weight: Weight) -> jax.Array:
        """x [M, K] times weight [N, K] transposed: [M, N] in x's dtype, accumulated in float32."""
        if isinstance(weight, QTensor):
            return quant_matmul(
                x,
                weight.values,
                weight.scales,
                quantize_input=self.act_quant,
                scale_fmt=self.scale_fmt,
                backend=self.backend,
            )
        weight = weight.astype(x.dtype)
        # Without preferred_element_type: sums are float32 all the same, and the gradient's products stay in x's dtype.
        return jnp.matmul(x, weight.T, precision="highest")

    def swiglu(self, x: jax.Array, gate: Weight, up: Weight) -> jax.Array:
        """silu(x gate^T) * (x up^T) of x [M, K] and weights [W, K]: [M, W] in x's dtype."""
        if self.act_quant and isinstance(gate, QTensor) and isinstance(up, QTensor):
            scales = {"gate_scales": gate.scales, "up_scales": up.scales, "scale_fmt": self.scale_fmt}
            hidden: Any = grouped_swiglu(x, gate.values, up.values, None, **scales, backend=self.backend)
            return hidden
        return swiglu(self.matmul(x, gate), self.matmul(x, up))

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
        if self.act_quant and isinstance(gate, QTensor) and isinstance(up, QTensor) and isinstance(down, QTensor):
            return self.quantised_experts(x, gate, up, down, plan, how)
        rows = gather_rows(x, plan, backend=self.backend)
        if not any(map(is_qtensor, (gate, up, down))):
            return grouped_dense_matmul(grouped_swiglu(rows, gate, up, **how), down, **how)

        def one(rows: jax.Array, weights: tuple[Weight, ...]) -> jax.Array:
            return self.matmul(self.swiglu(rows, *weights[:2]), weights[2])

        return grouped_matmul(rows, (gate, up, down), plan.tile_expert, one)

    def quantised_experts(
        self, x: jax.Array, gate: QTensor, up: QTensor, down: QTensor, plan: RoutingPlan, how: dict[str, Any]
    ) -> jax.Array:
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


def float32_matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [M, K] times weight [N, K] transposed in float32, [M, N]: head, router and the indexer's head weights.

    Operands of one narrow type stay in it: their products are exact in the float32 accumulator.
    """
    dtype = jnp.promote_types(x.dtype, weight.dtype)
    return jnp.matmul(x.astype(dtype), weight.astype(dtype).T, precision="highest", preferred_element_type=jnp.float32)
