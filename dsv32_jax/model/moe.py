"""Mixture of experts: group-limited sigmoid routing, routed experts, one shared expert."""

import jax
import jax.numpy as jnp
from flax import nnx

from dsv32_jax.config import ModelConfig
from dsv32_jax.model.mlp import MLP
from dsv32_jax.model.numerics import Numerics, float32_matmul
from dsv32_jax.model.params import Init
from pallas_kernels import moe_dispatch
from pallas_kernels.matmul import Weight


class Experts(nnx.Module):
    """The routed experts' weights, stacked: gate and up [E, width, hidden], down [E, hidden, width]."""

    def __init__(self, config: ModelConfig, init: Init):
        count, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate = init.linear(count, width, hidden)
        self.up = init.linear(count, width, hidden)
        self.down = init.linear(count, hidden, width)

    @property
    def weights(self) -> tuple[Weight, Weight, Weight]:
        """gate, up and down."""
        return self.gate, self.up, self.down

    def __call__(self, x: jax.Array, plan: moe_dispatch.RoutingPlan, numerics: Numerics) -> jax.Array:
        """Tokens [T, D] -> rows [P, D] in the plan's order, each by its own expert."""
        return numerics.experts(x, *self.weights, plan)


class MoE(nnx.Module):
    """sum of w_e * expert_e(x) over the chosen experts, plus shared(x) (official `MoE`; V3 report, section 2.1.2)."""

    def __init__(self, config: ModelConfig, init: Init):
        self.router = init.matrix(config.n_routed_experts, config.hidden_size)
        self.router_bias = init.constant(0.0, config.n_routed_experts)
        self.experts = Experts(config, init)
        self.shared = MLP(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size, init)

    def route(self, x: jax.Array, config: ModelConfig, backend: str = "auto") -> tuple[jax.Array, jax.Array]:
        """Chosen experts int32 [T, K] and their weights float32 [T, K] of x [T, D]."""
        return moe_dispatch.route(
            float32_matmul(x, self.router),
            self.router_bias.astype(jnp.float32),
            num_groups=config.n_group,
            groups_kept=config.topk_group,
            experts_per_token=config.num_experts_per_tok,
            normalize=config.norm_topk_prob,
            scaling_factor=config.routed_scaling_factor,
            backend=backend,
        )

    def __call__(
        self, x: jax.Array, valid: jax.Array, config: ModelConfig, numerics: Numerics, record: dict | None = None
    ) -> jax.Array:
        """[T, D] -> [T, D]; tokens that are not `valid` (bool [T]) reach no routed expert."""
        experts, weights = self.route(x, config, numerics.backend)
        if record is not None:
            record.update(experts=experts, expert_weights=weights)
        tile = numerics.tile_rows(experts.size, *self.experts.weights)
        plan = moe_dispatch.make_plan(experts, valid, config.n_routed_experts, tile, backend=numerics.backend)
        rows = self.experts(x, plan, numerics)
        routed = moe_dispatch.combine(rows, weights, plan, backend=numerics.backend)
        return (routed + self.shared(x, numerics).astype(jnp.float32)).astype(x.dtype)
