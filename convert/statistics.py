"""Statistics of what goes into a linear, gathered by a tap of the jitted step, for calibration."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

SMALLEST, LARGEST = -40, 24
"""Powers of two between which the histogram of magnitudes distinguishes."""


@partial(jax.tree_util.register_dataclass, data_fields=["rows", "largest", "moments", "histogram"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of the rows [R, K] that a linear was given; with a leading axis [E] of those that each expert was given.

    Attributes:
      rows: float32 [], how many.
      largest: float32 [K], the largest magnitude of each channel.
      moments: float32 [K, K], the sum of x x^T; its diagonal is each channel's sum of squares.
      histogram: float32 [65], how many values had a magnitude of 0 (or below 2^-40), then of at least 2^-40, 2^-39, ...
    """

    rows: jax.Array
    largest: jax.Array
    moments: jax.Array
    histogram: jax.Array

    @staticmethod
    def of(x: jax.Array, present: jax.Array) -> "Statistics":
        """Of rows x [R, K] where `present` bool [R]."""
        x = jnp.where(present[:, None], x, 0).astype(jnp.float32)
        size = jnp.abs(x)
        exponent = jnp.floor(jnp.log2(jnp.maximum(size, 2.0**SMALLEST / 2))).astype(jnp.int32)
        bins = jnp.clip(exponent - SMALLEST + 1, 0, LARGEST - SMALLEST)
        counted = jnp.zeros(LARGEST - SMALLEST + 1).at[bins].add(present[:, None] * jnp.ones_like(x))
        moments = jnp.matmul(x.T, x, precision="highest")
        return Statistics(present.sum(dtype=jnp.float32), size.max(0), moments, counted)

    def __add__(self, other: "Statistics") -> "Statistics":
        """Of both sets of rows."""
        return Statistics(
            self.rows + other.rows,
            jnp.maximum(self.largest, other.largest),
            self.moments + other.moments,
            self.histogram + other.histogram,
        )

    def percentile(self, share: float) -> jax.Array:
        """The least power of two above the magnitudes of at least this share of all values: float32 [...]."""
        below = jnp.cumsum(self.histogram, -1) >= share * self.histogram.sum(-1, keepdims=True)
        return 2.0 ** (SMALLEST + jnp.argmax(below, -1).astype(jnp.float32))


def of_inputs(
    x: jax.Array,
    row_token: jax.Array | None = None,
    tile_expert: jax.Array | None = None,
    num_experts: int | None = None,
) -> Statistics:
    """What a tap on a linear's input computes.

    Args:
      x: [R, K], or rows [P, K] of a routing plan.
      row_token: int32 [P], of a plan; -1 for padding.
      tile_expert: int32 [tiles], of a plan.
      num_experts: E, where x is of a plan.

    Returns:
      Of all rows; of a plan, those of each expert: a leading axis [E].
    """
    if row_token is None or tile_expert is None or num_experts is None:
        return Statistics.of(x, jnp.ones(x.shape[0], bool))
    tiles = tile_expert.shape[0]
    by_tile = jax.vmap(Statistics.of)(x.reshape(tiles, -1, x.shape[1]), (row_token >= 0).reshape(tiles, -1))

    def summed(of_tiles: jax.Array) -> jax.Array:
        return jnp.zeros((num_experts, *of_tiles.shape[1:])).at[tile_expert].add(of_tiles)

    largest = jnp.zeros((num_experts, x.shape[1])).at[tile_expert].max(by_tile.largest)
    return Statistics(summed(by_tile.rows), largest, summed(by_tile.moments), summed(by_tile.histogram))
