"""Chooses the range in which a row or a group of a weight is rounded; values outside are clipped to its ends.

"min-max" takes the whole range of the values, so that nothing is clipped. "percentile" clips the most extreme share of
the values. "mse" tries ever narrower ranges and takes the one with the least square error, weighted by the importance
of each column.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.matmul import quantize_weight
from pallas_kernels.matmul.int4 import SMALLEST_SCALE, int4_scales, int4_values
from pallas_kernels.quantize.reference import INT8_MAX, divide

RANGES = ("mse", "percentile", "min-max")
INT4_SHARES = tuple(1 - 0.04 * step for step in range(13))
"""Shares of a group's whole range that "mse" tries."""
INT8_SHARES = tuple(1 - 0.02 * step for step in range(26))
"""Shares of a row's largest magnitude that "mse" tries; finer ones, since with 127 steps a much narrower range gains
little."""
INT4_PERCENTILE = 99.0
"""Percent of a group's values that "percentile" does not clip: all of 128 but one at either end."""
INT8_PERCENTILE = 99.9
"""Percent of a row's magnitudes that "percentile" does not clip."""


def int8_scales(weight: jax.Array, importance: jax.Array, ranges: str = "mse") -> jax.Array:
    """Returns the scale float32 [N] of each row of a weight [N, K].

    Args:
      weight: float32.
      importance: float32 [K], how much an error of each column counts; for "mse".
      ranges: one of `RANGES`.
    """
    widest = quantize_weight(weight, "int8").scales
    if ranges == "min-max":
        return widest
    if ranges == "percentile":
        largest = jnp.percentile(jnp.abs(weight), INT8_PERCENTILE, axis=-1, method="lower")
        return jnp.maximum(largest / INT8_MAX, SMALLEST_SCALE)

    def square_error(share: jax.Array) -> jax.Array:
        scales = share * widest
        return ((weight - int8_values(weight, scales) * scales[:, None]) ** 2 * importance).sum(-1)

    shares = jnp.asarray(INT8_SHARES)
    return shares[jnp.argmin(lax.map(square_error, shares), 0)] * widest


def int8_values(weight: jax.Array, scales: jax.Array) -> jax.Array:
    """The weight in whole steps of its scales [N]: float32 [N, K], from -127 to 127."""
    return jnp.clip(jnp.round(divide(weight, scales)), -INT8_MAX, INT8_MAX)


def int4_range(block: jax.Array, importance: jax.Array, ranges: str = "mse") -> tuple[jax.Array, jax.Array]:
    """Returns scales bfloat16 [N] and zeros float32 [N] of a group [N, 128]; the range always contains zero.

    Args:
      block: float32, the group's columns of a weight.
      importance: as for `int8_scales`.
      ranges: one of `RANGES`.
    """
    low, high = block.min(-1), block.max(-1)
    if ranges == "percentile":
        outside = (100 - INT4_PERCENTILE) / 2
        low = jnp.percentile(block, outside, axis=-1, method="higher")
        high = jnp.percentile(block, 100 - outside, axis=-1, method="lower")
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)

    if ranges != "mse":
        return int4_scales(low, high)

    def of_share(share: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        scale, zero = int4_scales(low, high, share)
        step, zeros = scale.astype(jnp.float32)[:, None], zero[:, None]
        error = block - (int4_values(block, step, zeros) - zeros) * step
        return (error**2 * importance).sum(-1), scale, zero

    errors, scales, zeros = lax.map(of_share, jnp.asarray(INT4_SHARES))
    best = jnp.argmin(errors, 0)[None]
    return jnp.take_along_axis(scales, best, 0)[0], jnp.take_along_axis(zeros, best, 0)[0]
