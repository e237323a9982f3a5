"""Statistics of a linear's inputs, computed by a tap of the jitted step, for calibration."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

SMALLEST, LARGEST = -40, 24
"""Exponents of the powers of two that bound the histogram of magnitudes."""


@partial(jax.tree_util.register_dataclass, data_fields=["rows", "largest", "moments", "histogram"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of the rows [R, K] that a linear got; with a leading axis [E], of those that each expert got.

    Attributes:
      rows: float32 [], number of rows.
      largest: float32 [K], the largest magnitude of each channel.
      moments: float32 [K, K], the sum of x x^T; its diagonal is each channel's sum of squares.
      histogram: float32 [65], number of values with a magnitude of 0 (or below 2^-40), of at least 2^-40, 2^-39, ...
    """

    rows: jax.Array
    largest: jax.Array
    moments: jax.Array
    histogram: jax.Array

    @staticmethod
    def of(x: jax.Array, present: jax.Array) -> "Statistics":
        """The statistics of those rows of x [R, K] for which `present` bool [R] is true."""
        x = jnp.where(present[:, None], x, 0).astype(jnp.float32)
        magnitude = jnp.abs(x)
        exponent = jnp.floor(jnp.log2(jnp.maximum(magnitude, 2.0**SMALLEST / 2))).astype(jnp.int32)
        bins = jnp.clip(exponent - SMALLEST + 1, 0, LARGEST - SMALLEST)
        histogram = jnp.zeros(LARGEST - SMALLEST + 1).at[bins].add(present[:, None] * jnp.ones_like(x))
        moments = jnp.matmul(x.T, x, precision="highest")
        return Statistics(present.sum(dtype=jnp.float32), magnitude.max(0), moments, histogram)

    def __add__(self, other: "Statistics") -> "Statistics":
        """The statistics of both sets of rows together."""
        return Statistics(
            self.rows + other.rows,
            jnp.maximum(self.largest, other.largest),
            self.moments + other.moments,
            self.histogram + other.histogram,
        )

    def percentile(self, share: float) -> jax.Array:
        """The smallest power of two that is above at least this share of all magnitudes: float32 [...]."""
        below = jnp.cumsum(self.histogram, -1) >= share * self.histogram.sum(-1, keepdims=True)
        return 2.0 ** (SMALLEST + jnp.argmax(below, -1).astype(jnp.float32))


def of_inputs(
    x: jax.Array,
    row_token: jax.Array | None = None,
    tile_expert: jax.Array | None = None,
    num_experts: int | None = None,
) -> Statistics:
    """Computes the statistics of a linear's input; a reduction for a tap.

    Args:
      x: [R, K], or rows [P, K] of a routing plan.
      row_token: int32 [P], of a plan; -1 for padding.
      tile_expert: int32 [tiles], of a plan.
      num_experts: E, where x is of a plan.

    Returns:
      The statistics of all rows; for a plan those of each expert, with a leading axis [E].
    """
    if row_token is None or tile_expert is None or num_experts is None:
        return Statistics.of(x, jnp.ones(x.shape[0], bool))
    tiles = tile_expert.shape[0]
    by_tile = jax.vmap(Statistics.of)(x.reshape(tiles, -1, x.shape[1]), (row_token >= 0).reshape(tiles, -1))

    def sum_by_expert(tile_sums: jax.Array) -> jax.Array:
        return jnp.zeros((num_experts, *tile_sums.shape[1:])).at[tile_expert].add(tile_sums)

    largest = jnp.zeros((num_experts, x.shape[1])).at[tile_expert].max(by_tile.largest)
    return Statistics(
        sum_by_expert(by_tile.rows), largest, sum_by_expert(by_tile.moments), sum_by_expert(by_tile.histogram)
    )
