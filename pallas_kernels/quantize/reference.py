"""FP8 (e4m3) quantisation in plain jax.numpy: the specification."""

import jax
import jax.numpy as jnp

FP8_MAX = 448.0
GROUP = 128
SMALLEST_AMAX = 1e-4
SCALE_FORMATS = ("ue8m0", None)


def round_up_to_power_of_two(x: jax.Array) -> jax.Array:
    """2^ceil(log2 x) for positive normal float32 x, exactly: by the bits, because a float log2 may be off by one."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)


def quantize(x: jax.Array, scale_fmt: str | None, group: int) -> tuple[jax.Array, jax.Array]:
    grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, group)
    amax = jnp.maximum(jnp.max(jnp.abs(grouped), axis=-1), SMALLEST_AMAX)
    scales = amax * jnp.float32(1 / FP8_MAX)
    if scale_fmt == "ue8m0":
        scales = round_up_to_power_of_two(scales)
    # Clipping first: a cast of more than 464 gives NaN here, and saturates in other libraries.
    values = jnp.clip(grouped / scales[..., None], -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn)
    return values.reshape(x.shape), scales


def dequantize(values: jax.Array, scales: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """values [..., N] times scales [..., G], each scale for N / G consecutive values; in `dtype`."""
    grouped = values.astype(jnp.float32).reshape(*scales.shape, -1)
    return (grouped * scales[..., None]).reshape(values.shape).astype(dtype)
