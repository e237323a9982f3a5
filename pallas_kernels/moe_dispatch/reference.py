"""Routing, the routing plan, and the moves of rows that it describes, in plain jax.numpy: the specification."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.quantize.reference import GROUP, quantize


def route(logits, bias, num_groups, groups_kept, experts_per_token, normalize, scaling_factor):
    scores = jax.nn.sigmoid(logits)
    biased = scores + bias
    grouped = biased.reshape(biased.shape[0], num_groups, -1)
    group_scores = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0].sum(-1)
    kept = jax.lax.top_k(group_scores, groups_kept)[1]
    allowed = jax.nn.one_hot(kept, num_groups, dtype=bool).any(1)
    # -inf, not 0, for the other groups: a biased score can be negative.
    candidates = jnp.where(allowed[:, :, None], grouped, -jnp.inf).reshape(biased.shape)
    experts = jax.lax.top_k(candidates, experts_per_token)[1]
    return experts.astype(jnp.int32), weights_of(scores, experts, normalize, scaling_factor)


def weights_of(scores: jax.Array, experts: jax.Array, normalize: bool, scaling_factor: float) -> jax.Array:
    """Routing weights float32 [T, K] of chosen experts, from the scores [T, E] of all."""
    weights = jnp.take_along_axis(scores, experts, axis=1)
    if normalize:
        weights = weights / weights.sum(-1, keepdims=True)
    return weights * scaling_factor


@partial(jax.tree_util.register_dataclass, data_fields=["row_token", "tile_expert", "token_row"], meta_fields=["tile"])
@dataclasses.dataclass(frozen=True)
class RoutingPlan:
    """Where each (token, choice) pair goes: rows sorted by expert, each expert's rows padded to whole tiles.

    Static shapes for any routing and no dropping: with P = tiles * tile rows,

    Attributes:
      row_token: int32 [P], the token of each row, -1 for padding.
      tile_expert: int32 [tiles], the expert of each tile (an unused tile names some expert and holds padding only).
      token_row: int32 [T, K], the row of each choice, -1 for those of tokens that are padding and of no expert.
      tile: rows of a tile.
    """

    row_token: jax.Array
    tile_expert: jax.Array
    token_row: jax.Array
    tile: int

    @property
    def used_tiles(self) -> jax.Array:
        """int32 []: how many tiles hold a row. They come first, and so does the row in each."""
        return jnp.sum(self.row_token.reshape(-1, self.tile)[:, 0] >= 0, dtype=jnp.int32)


def tile_rows(choices: int, num_experts: int) -> int:
    """Returns rows of a tile: about the mean number of rows of an expert, within 8 and 128."""
    return min(128, max(8, 1 << (choices // num_experts).bit_length()))


def tiles_of_plan(choices: int, num_experts: int, tile: int) -> int:
    """Tiles that no routing can need more of."""
    return min(choices, choices // tile + num_experts)


def make_plan(experts: jax.Array, valid: jax.Array, num_experts: int, tile: int | None = None) -> RoutingPlan:
    """Returns the plan for chosen `experts` int32 [T, K]; tokens that are not `valid` (bool [T]) and choices of
    `num_experts` take no row."""
    tokens, choices = experts.shape
    count = tokens * choices
    tile = tile or tile_rows(count, num_experts)
    tiles = tiles_of_plan(count, num_experts, tile)
    flat = jnp.where(valid[:, None], experts, num_experts).reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.zeros(num_experts + 1, jnp.int32).at[flat].add(1)[:num_experts]
    tiles_of = -(-sizes // tile)
    last_tile = jnp.cumsum(tiles_of)
    first_row, first_choice = (last_tile - tiles_of) * tile, jnp.cumsum(sizes) - sizes
    expert = flat[order]
    safe = jnp.minimum(expert, num_experts - 1)
    row = jnp.where(expert < num_experts, first_row[safe] + jnp.arange(count) - first_choice[safe], tiles * tile)
    return RoutingPlan(
        row_token=jnp.full(tiles * tile, -1, jnp.int32).at[row].set(order // choices, mode="drop"),
        tile_expert=jnp.minimum(jnp.searchsorted(last_tile, jnp.arange(tiles), side="right"), num_experts - 1).astype(
            jnp.int32
        ),
        token_row=jnp.zeros(count, jnp.int32)
        .at[order]
        .set(jnp.where(expert < num_experts, row, -1))
        .reshape(tokens, choices),
        tile=tile,
    )


def gather_rows(x: jax.Array, plan: RoutingPlan) -> jax.Array:
    """x [T, D] -> [P, D] in the plan's order; padding rows are 0."""
    return jnp.where(plan.row_token[:, None] >= 0, x[plan.row_token], 0)


def gather_rows_fp8(x, plan, scale_fmt, scales_by_group):
    values, scales = quantize(gather_rows(x, plan), scale_fmt, GROUP)
    return values, scales.T if scales_by_group else scales


def combine(rows: jax.Array, weights: jax.Array, plan: RoutingPlan) -> jax.Array:
    """rows [P, D] -> float32 [T, D]: each token's rows, weighted (float32 [T, K]) and summed."""
    chosen = rows[plan.token_row].astype(jnp.float32)
    return jnp.where(plan.token_row[..., None] >= 0, weights[..., None] * chosen, 0).sum(1)
