"""Four-bit weights in groups of 128 along K.

A weight is (value - zero) * scale, with a scale and a zero for each row and group of 128. It is stored as the kernel
reads it, `pack_int4`, so that nothing is rearranged at a call; `unpack_int4` is the exact inverse. The 128 values of a
group stand interleaved: 16 neighbouring bytes hold what one thread puts into wgmma's registers for the first operand,
and a right shift of a word and a mask give two values that are neighbours along K.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.arguments import FLOATS, check
from pallas_kernels.backend import NO_GRADIENT_OF_ROUNDING, refuse_gradient

GROUP = 128
"""Values along K that share a scale and a zero."""
BIASED = 0x4300
"""128 as bfloat16, whose lowest seven bits count ones."""
SMALLEST_SCALE = 1e-8
"""That of values which are all 0."""


def pack_int4(values: jax.Array, scales: jax.Array, zeros: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A four-bit weight as the products take it.

    Args:
      values: uint8 [..., N, K], up to 15; K a multiple of 128.
      scales: bfloat16 [..., N, K / 128].
      zeros: uint8 [..., N, K / 128], up to 15.

    Returns:
      packed uint8 [..., N, K / 2], two values a byte; words uint32 [..., K / 128, N], the bits of a scale above those
      of 128 + zero as bfloat16.

    Raises:
      ValueError: other dtypes than these.
    """
    axes = "... N K/128"
    check("pack_int4", values=(values, ("uint8",), "... N K"))
    check("pack_int4", scales=(scales, ("bfloat16",), axes), zeros=(zeros, ("uint8",), axes))
    parts = values.reshape(*values.shape[:-1], -1, 4, 2, 2, 4, 2)
    first = values.ndim
    order = (3, 0, 4, 1, 2)  # lane of a quad, word, half of the word, and nibble of the half in two bits
    nibbles = parts.transpose(*range(first), *(first + i for i in order)).reshape(*values.shape[:-1], -1, 2)
    high = lax.bitcast_convert_type(scales, jnp.uint16).astype(jnp.uint32)
    words = (high << 16) | (zeros.astype(jnp.uint32) + BIASED)
    return nibbles[..., 0] | (nibbles[..., 1] << 4), words.swapaxes(-1, -2)


def unpack_values(packed: jax.Array) -> jax.Array:
    """The values [..., N, K] of packed ones."""
    nibbles = jnp.stack([packed & 15, packed >> 4], axis=-1)
    parts = nibbles.reshape(*packed.shape[:-1], -1, 4, 4, 2, 2, 2)
    first = packed.ndim
    order = (1, 3, 4, 0, 2)
    return parts.transpose(*range(first), *(first + i for i in order)).reshape(*packed.shape[:-1], -1)


def unpack_int4(packed: jax.Array, words: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The inverse of `pack_int4`: values, scales and zeros."""
    words = words.swapaxes(-1, -2)
    scales = lax.bitcast_convert_type((words >> 16).astype(jnp.uint16), jnp.bfloat16)
    return unpack_values(packed), scales, (words & 15).astype(jnp.uint8)


def quantize_weight_int4(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The nearest four-bit weight, by the smallest and the largest of each group; 0 is always exact.

    A group with a value that is NaN or infinite is NaN.

    Args:
      weight: float [..., N, K], K a multiple of 128.

    Returns:
      packed and words, see `pack_int4`.

    Raises:
      ValueError: the weight is not float, or K is no multiple of 128.
    """
    check("quantize_weight_int4", weight=(weight, FLOATS, "... N K"))
    if weight.shape[-1] % GROUP:
        raise ValueError(f"quantize_weight_int4 needs K a multiple of {GROUP}, not {weight.shape[-1]}")
    weight = refuse_gradient(weight, NO_GRADIENT_OF_ROUNDING)
    groups = weight.astype(jnp.float32).reshape(*weight.shape[:-1], -1, GROUP)
    low, high = jnp.minimum(groups.min(-1), 0), jnp.maximum(groups.max(-1), 0)
    scales, zeros = int4_scales(low, high)
    values = int4_values(groups, scales[..., None], zeros[..., None]).astype(jnp.uint8)
    scales = jnp.where(jnp.isfinite(groups).all(-1), scales, jnp.nan)  # 15 values would hide it
    return pack_int4(values.reshape(weight.shape), scales, zeros.astype(jnp.uint8))


def int4_scales(low: jax.Array, high: jax.Array, share: jax.Array | float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Scales bfloat16 and zeros float32 of ranges from `low` (at most 0) to `high` (at least 0), or a share of them."""
    scales = jnp.maximum(share * (high - low) / 15, SMALLEST_SCALE).astype(jnp.bfloat16)
    return scales, jnp.clip(jnp.round(-share * low / scales.astype(jnp.float32)), 0, 15)


def int4_values(weight: jax.Array, scales: jax.Array, zeros: jax.Array) -> jax.Array:
    """The nearest values, as float32, for scales and zeros that broadcast."""
    return jnp.clip(jnp.round(weight / scales.astype(jnp.float32)) + zeros, 0, 15)


def dequantize_int4(packed: jax.Array, words: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """[..., N, K] in `dtype`."""
    check("dequantize_int4", packed=(packed, ("uint8",), "... N K/2"), words=(words, ("uint32",), "... K/128 N"))
    values, scales, zeros = unpack_int4(packed, words)
    grouped = values.astype(jnp.float32).reshape(*scales.shape, GROUP)
    grouped = (grouped - zeros[..., None].astype(jnp.float32)) * scales[..., None].astype(jnp.float32)
    return grouped.astype(dtype).reshape(values.shape)
