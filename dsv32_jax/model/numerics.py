"""How a step computes: its products and norms, through the parts that the step was given."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dsv32_jax.model.products import all_fp8
from dsv32_jax.model.seams import Seams
from pallas_kernels.matmul import Weight
from pallas_kernels.matmul import swiglu as fused_swiglu
from pallas_kernels.moe_dispatch import RoutingPlan

SWIGLU = ("matmul", "swiglu")
"""What the fused product of a feed-forward block in FP8 has inside."""


@dataclasses.dataclass(frozen=True)
class Numerics:
    """How a step computes.

    Attributes:
      act_quant: quantise the inputs of FP8 and INT8 linears, index queries and keys, and the latent. Without it weights
        alone are quantised; with INT4 that is always so.
      scale_fmt: format of those scales, from the checkpoint's quantization_config.
      backend: of every op.
      seams: the step's parts and taps.
    """

    act_quant: bool
    scale_fmt: str | None
    backend: str
    seams: Seams = dataclasses.field(default_factory=Seams, compare=False)

    def matmul(self, x: jax.Array, weight: Weight, *names: str) -> jax.Array:
        """x [M, K] times a linear's weight [N, K] transposed: [M, N] in x's dtype; see `pallas_kernels.matmul`.

        Args:
          x: [M, K].
          weight: [N, K].
          names: of the linear, for taps and profiles; several, where the weights of several lie in one.
        """
        for name in names:
            x = self.seams.value(f"{name}.input", x)
        with self.seams.scope("+".join(names)):
            return self.seams.call(
                "matmul",
                x,
                weight,
                quantize_input=self.act_quant,
                scale_fmt=self.scale_fmt,
                backend=self.backend,
            )

    def swiglu(self, x: jax.Array, gate: Weight, up: Weight) -> jax.Array:
        """silu(x gate^T) * (x up^T) of x [M, K] and weights [W, K]: [M, W] in x's dtype."""
        inputs = ("gate.input", "up.input")
        composes = self.seams.parts.replace_any(SWIGLU) or self.seams.is_patched(*inputs)
        if self.act_quant and all_fp8(gate, up) and not composes:
            for name in inputs:
                self.seams.value(name, x)
            with self.seams.scope("gate+up"):
                hidden: Any = fused_swiglu(x, gate, up, scale_fmt=self.scale_fmt, backend=self.backend)
                return hidden
        return self.seams.call("swiglu", self.matmul(x, gate, "gate"), self.matmul(x, up, "up"))

    def experts(self, x: jax.Array, gate: Weight, up: Weight, down: Weight, plan: RoutingPlan) -> jax.Array:
        """The chosen experts of every token x [T, D]: [P, D] in the plan's order; see `products.experts`.

        Composed where a part inside is replaced, or where somebody looks at what goes into a product.
        """
        seams = self.seams
        inputs = [f"{name}.input" for name in ("gate", "up", "down")]
        if not seams.composes("experts", *inputs):
            return seams.call(
                "experts",
                x,
                gate,
                up,
                down,
                plan,
                quantize_input=self.act_quant,
                scale_fmt=self.scale_fmt,
                backend=self.backend,
            )
        rows = seams.call("gather_rows", x, plan, backend=self.backend)

        def product(name: str, rows: jax.Array, weight: Weight) -> jax.Array:
            of_plan = {"row_token": plan.row_token, "tile_expert": plan.tile_expert, "num_experts": gate.shape[0]}
            rows = seams.value(f"{name}.input", rows, **of_plan)
            with seams.scope(name):
                return seams.call(
                    "grouped_matmul",
                    rows,
                    weight,
                    plan.tile_expert,
                    used_tiles=plan.used_tiles,
                    quantize_input=self.act_quant,
                    scale_fmt=self.scale_fmt,
                    backend=self.backend,
                )

        hidden = seams.call("swiglu", product("gate", rows, gate), product("up", rows, up))
        return product("down", hidden, down)

    def rms_norm(
        self, x: jax.Array, weight: jax.Array, eps: float, dtype: jax.typing.DTypeLike | None = None
    ) -> jax.Array:
        """x [..., D] by its root mean square, times weight [D], in `dtype` (x's own where None)."""
        return self.seams.call("rms_norm", x, weight, eps, dtype=dtype)

    def rope(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """The attention's rotation of x [T, ..., R] by angles [T, R / 2]."""
        return self.seams.call("rope", x, cos, sin)

    def index_rope(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """The indexer's rotation of x [T, ..., R] by angles [T, R / 2]."""
        return self.seams.call("index_rope", x, cos, sin)

    def add_rms_norm(
        self, residual: jax.Array, update: jax.Array | None, weight: jax.Array, eps: float
    ) -> tuple[jax.Array, jax.Array]:
        """(residual + update, its norm). The norm sees the float32 sum, before the residual stream is rounded.

        Args:
          residual: [T, D], the residual stream.
          update: [T, D], what the last block adds; None before the first.
          weight: [D].
          eps: added to the mean square.
        """
        if update is None:
            return residual, self.rms_norm(residual, weight, eps)
        total = residual.astype(jnp.float32) + update.astype(jnp.float32)
        return total.astype(residual.dtype), self.rms_norm(total, weight, eps, residual.dtype)
