"""Four-bit weights in groups of 128 along K, and the product with them in plain jax.numpy: the specification.

A weight is (value - zero) * scale, with a scale and a zero for each row and group of 128.
"""

import jax
import jax.numpy as jnp

GROUP = 128


def quantize_int4(weight: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The nearest four-bit weight, by the smallest and the largest of each group; 0 is always exact.

    Args:
      weight: float [..., N, K], K a multiple of 128.

    Returns:
      values uint8 [..., N, K / 2], the one of even k in the lower half of a byte; scales bfloat16 and zeros uint8, both
      [..., N, K / 128].
    """
    groups = weight.astype(jnp.float32).reshape(*weight.shape[:-1], -1, GROUP)
    low, high = jnp.minimum(groups.min(-1), 0), jnp.maximum(groups.max(-1), 0)
    scales = jnp.maximum((high - low) / 15, 1e-8).astype(jnp.bfloat16)
    steps = scales.astype(jnp.float32)
    zeros = jnp.clip(jnp.round(-low / steps), 0, 15)
    values = jnp.clip(jnp.round(groups / steps[..., None]) + zeros[..., None], 0, 15).astype(jnp.uint8)
    values = values.reshape(*weight.shape[:-1], -1, 2)
    return values[..., 0] | (values[..., 1] << 4), scales, zeros.astype(jnp.uint8)


def unpack_int4(values: jax.Array) -> jax.Array:
    """uint8 [..., K / 2] -> uint8 [..., K], 0 to 15."""
    return jnp.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:-1], -1)


def dequantize_int4(values: jax.Array, scales: jax.Array, zeros: jax.Array) -> jax.Array:
    """float32 [..., N, K]."""
    grouped = unpack_int4(values).astype(jnp.float32).reshape(*scales.shape, GROUP)
    grouped = (grouped - zeros[..., None].astype(jnp.float32)) * scales[..., None].astype(jnp.float32)
    return grouped.reshape(*values.shape[:-1], -1)


def int4_matmul(x: jax.Array, values: jax.Array, scales: jax.Array, zeros: jax.Array) -> jax.Array:
    """x [M, K] times the weight's transpose: [M, N] in x's dtype, accumulated in float32."""
    weight = dequantize_int4(values, scales, zeros)
    return jnp.matmul(x.astype(jnp.float32), weight.T, precision="highest").astype(x.dtype)
