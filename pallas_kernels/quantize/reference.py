"""FP8 (e4m3) quantisation in plain jax.numpy: the specification."""

import jax
import jax.numpy as jnp

from pallas_kernels.backend import NO_GRADIENT_OF_ROUNDING, refuse_gradient

FP8_MAX = 448.0
INT8_MAX = 127.0
GROUP = 128
SMALLEST_AMAX = 1e-4
SCALE_FORMATS = ("ue8m0", None)


def round_up_to_power_of_two(x: jax.Array) -> jax.Array:
    """2^ceil(log2 x) for positive normal float32 x, exactly: by the bits, because a float log2 may be off by one."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)


def round_to_e4m3(x: jax.Array) -> jax.Array:
    """float32 values of at most 448 rounded to the nearest e4m3 value, ties to even, still float32.

    XLA may drop a cast to FP8 and back within one program ("excess precision"; on GPUs it does). Of values that are
    rounded already, the cast changes nothing, whether it happens or not.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    kept = (bits + 0x7FFFF + ((bits >> 20) & 1)) & jnp.uint32(0xFFF00000)  # 3 of 23 bits of the mantissa
    below_normal = jnp.round(x * 2**9) * 2**-9
    return jnp.where(jnp.abs(x) < 2**-6, below_normal, jax.lax.bitcast_convert_type(kept, jnp.float32))


def divide(x: jax.Array, scales: jax.Array) -> jax.Array:
    """x [..., N] / scales [...], rounded once: XLA would make x * (1 / scales) of a division by a broadcast."""
    return x / jax.lax.optimization_barrier(jnp.broadcast_to(scales[..., None], x.shape))


def quantize(x: jax.Array, scale_fmt: str | None, group: int) -> tuple[jax.Array, jax.Array]:
    x = refuse_gradient(x, NO_GRADIENT_OF_ROUNDING)
    grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, group)
    amax = jnp.maximum(jnp.max(jnp.abs(grouped), axis=-1), SMALLEST_AMAX)
    scales = amax * jnp.float32(1 / FP8_MAX)
    if scale_fmt == "ue8m0":
        scales = round_up_to_power_of_two(scales)
        scaled = grouped / scales[..., None]  # exact in either way
    else:
        scaled = divide(grouped, scales)
    # Clipping first: a cast of more than 464 gives NaN here, and saturates in other libraries.
    values = round_to_e4m3(jnp.clip(scaled, -FP8_MAX, FP8_MAX)).astype(jnp.float8_e4m3fn)
    return values.reshape(x.shape), scales


def quantize_int8(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = refuse_gradient(x, NO_GRADIENT_OF_ROUNDING).astype(jnp.float32)
    scales = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), SMALLEST_AMAX) * jnp.float32(1 / INT8_MAX)
    scales = jnp.where(jnp.isfinite(x).all(axis=-1), scales, jnp.nan)  # int8 would hide it
    values = jnp.clip(jnp.round(divide(x, scales)), -INT8_MAX, INT8_MAX).astype(jnp.int8)
    return values, scales


def dequantize(values: jax.Array, scales: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """values [..., N] times scales [..., G], each scale for N / G consecutive values; in `dtype`."""
    grouped = values.astype(jnp.float32).reshape(*scales.shape, -1)
    return (grouped * scales[..., None]).reshape(values.shape).astype(dtype)
