"""What goes into each linear of a model: statistics gathered in the jitted forward, for calibration."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
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


@partial(jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=["path"])
@dataclasses.dataclass(frozen=True)
class Observed:
    """A weight (an array) whose inputs are looked at; `path` is its parameter's."""

    weight: jax.Array
    path: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.weight.shape


_gathered: contextvars.ContextVar[dict[str, Statistics]] = contextvars.ContextVar("gathered")


@contextlib.contextmanager
def observing() -> Iterator[dict[str, Statistics]]:
    """Takes what `see` and `see_experts` are told meanwhile, by path; for use inside the traced function."""
    token = _gathered.set({})
    try:
        yield _gathered.get()
    finally:
        _gathered.reset(token)


def see(weight: Observed, x: jax.Array, present: jax.Array | None = None) -> None:
    """Adds the rows x [R, K] that a weight is multiplied with."""
    _add(weight.path, Statistics.of(x, jnp.ones(x.shape[0], bool) if present is None else present))


def see_experts(weight: Observed, rows: jax.Array, row_token: jax.Array, tile_expert: jax.Array) -> None:
    """Adds rows [P, K] to their experts': of a routing plan, in tiles, -1 in `row_token` marks padding."""
    tiles = tile_expert.shape[0]
    by_tile = jax.vmap(Statistics.of)(rows.reshape(tiles, -1, rows.shape[1]), (row_token >= 0).reshape(tiles, -1))

    def by_expert(of_tiles: jax.Array, how: str) -> jax.Array:
        empty = jnp.zeros((weight.shape[0], *of_tiles.shape[1:]))
        return getattr(empty.at[tile_expert], how)(of_tiles)

    sums = {name: by_expert(getattr(by_tile, name), "add") for name in ("rows", "moments", "histogram")}
    _add(weight.path, Statistics(largest=by_expert(by_tile.largest, "max"), **sums))


def _add(path: str, statistics: Statistics) -> None:
    gathered = _gathered.get()
    gathered[path] = gathered[path] + statistics if path in gathered else statistics
