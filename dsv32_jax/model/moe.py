"""Mixture of experts: group-limited sigmoid routing, routed experts, one shared expert."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from dsv32_jax.config import ModelConfig
from dsv32_jax.model.exchange import Exchange
from dsv32_jax.model.mlp import MLP
from dsv32_jax.model.numerics import Numerics
from dsv32_jax.model.params import Init
from dsv32_jax.model.products import float32_matmul, tile_rows
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
        with numerics.seams.scope("experts"):
            return numerics.experts(x, *self.weights, plan)


class MoE(nnx.Module):
    """sum of w_e * expert_e(x) over the chosen experts, plus shared(x) (official `MoE`; V3 report, section 2.1.2)."""

    def __init__(self, config: ModelConfig, init: Init):
        self.router = init.matrix(config.n_routed_experts, config.hidden_size)
        self.router_bias = init.constant(0.0, config.n_routed_experts)
        self.experts = Experts(config, init)
        self.shared = MLP(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size, init)

    def route(
        self, x: jax.Array, positions: jax.Array, config: ModelConfig, numerics: Numerics
    ) -> tuple[jax.Array, jax.Array]:
        """Chosen experts int32 [T, K] and their weights float32 [T, K] of x [T, D] at int32 positions [T]."""
        with jax.named_scope("router"):
            logits = float32_matmul(x, self.router)
        return numerics.seams.call(
            "route",
            logits,
            self.router_bias.astype(jnp.float32),
            num_groups=config.n_group,
            groups_kept=config.topk_group,
            experts_per_token=config.num_experts_per_tok,
            normalize=config.norm_topk_prob,
            scaling_factor=config.routed_scaling_factor,
            backend=numerics.backend,
            extras={"x": lambda: x, "positions": lambda: positions},
        )

    def chosen(
        self, x: jax.Array, positions: jax.Array, config: ModelConfig, numerics: Numerics
    ) -> tuple[jax.Array, jax.Array]:
        """What `route` gives, shown to taps."""
        experts, weights = self.route(x, positions, config, numerics)
        experts = numerics.seams.value("experts", experts, positions=positions)
        return experts, numerics.seams.value("expert_weights", weights, positions=positions)

    def routed(
        self,
        x: jax.Array,
        experts: jax.Array,
        weights: jax.Array,
        present: jax.Array,
        numerics: Numerics,
        devices: int = 1,
    ) -> jax.Array:
        """The weighted sums float32 [T, D] of the experts that are on this device.

        Args:
          x: [T, D].
          experts: int32 [T, K], counted from 0 on this device; their number for one that is on another.
          weights: float32 [T, K].
          present: bool [T]; the other tokens reach no expert.
          numerics: of the step.
          devices: among which the choices fall.
        """
        seams, backend, stacked = numerics.seams, numerics.backend, self.experts.weights
        # Tiles are for the rows that are to be expected, a share of all choices; there is room for any routing.
        tile = tile_rows(experts.size // devices, *stacked, backend=backend)
        plan = seams.call("make_plan", experts, present, stacked[0].shape[0], tile=tile, backend=backend)
        rows = self.experts(x, plan, numerics)
        return seams.call("combine", rows, weights, plan, backend=backend)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        config: ModelConfig,
        numerics: Numerics,
        exchange: Exchange | None = None,
    ) -> jax.Array:
        """[T, D] -> [T, D]; padding, whose position (int32 [T]) is -1, reaches no routed expert.

        Args:
          x: [T, D].
          positions: int32 [T].
          config: the model's.
          numerics: of the step.
          exchange: with the devices that have the other experts; None where all are here.
        """
        if exchange is None:
            routed = self.routed(x, *self.chosen(x, positions, config, numerics), positions >= 0, numerics)
        else:
            choose = partial(self.chosen, config=config, numerics=numerics)
            sums = partial(self.routed, numerics=numerics, devices=exchange.mesh.size)
            routed = exchange(x, self.experts.gate.shape[0], choose, sums)
        with numerics.seams.scope("shared"):
            shared = self.shared(x, numerics)
        return (routed + shared.astype(jnp.float32)).astype(x.dtype)
