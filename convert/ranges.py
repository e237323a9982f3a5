"""The range in which a row or a group of a weight is rounded: what lies outside becomes its end.

"min-max" takes all of it, so that nothing is cut. "percentile" cuts the share of values that is farthest out. "mse"
tries narrower and narrower ranges and takes the one with the least square error, each column's weighted by how much it
is multiplied with.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.matmul import quantize_weight
from pallas_kernels.matmul.int4 import SMALLEST_SCALE, int4_scales, int4_values
from pallas_kernels.quantize.reference import INT8_MAX, divide

RANGES = ("mse", "percentile", "min-max")
INT4_SHARES = tuple(1 - 0.04 * step for step in range(13))
"""Of a group's whole range, which "mse" tries."""
INT8_SHARES = tuple(1 - 0.02 * step for step in range(26))
"""Of a row's largest magnitude. With 127 steps to it, little is gained by a much narrower range, so these are finer."""
INT4_PERCENTILE = 99.0
"""Of a group's values, those that "percentile" keeps: all of 128 but one at either end."""
INT8_PERCENTILE = 99.9
"""Of a row's magnitudes."""


def int8_scales(weight: jax.Array, importance: jax.Array, ranges: str = "mse") -> jax.Array:
    """float32 [N]: the scale of each row of a weight [N, K].

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

    def lost(share: jax.Array) -> jax.Array:
        scales = share * widest
        return ((weight - int8_values(weight, scales) * scales[:, None]) ** 2 * importance).sum(-1)

    shares = jnp.asarray(INT8_SHARES)
    return shares[jnp.argmin(lax.map(lost, shares), 0)] * widest


def int8_values(weight: jax.Array, scales: jax.Array) -> jax.Array:
    """Whole numbers of -127 to 127, as float32 [N, K], for scales [N]."""
    return jnp.clip(jnp.round(divide(weight, scales)), -INT8_MAX, INT8_MAX)


def int4_range(block: jax.Array, importance: jax.Array, ranges: str = "mse") -> tuple[jax.Array, jax.Array]:
    """Scales bfloat16 [N] and zeros float32 [N] of a group [N, 128]; zero itself is always in the range.

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
