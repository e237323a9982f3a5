"""FP8 weights in blocks of 128 x 128, as the checkpoint has them."""

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import E4M3, FLOAT32, FLOATS, check
from pallas_kernels.backend import NO_GRADIENT_OF_ROUNDING, NO_GRADIENT_OF_WEIGHT, refuse_gradient
from pallas_kernels.quantize.reference import FP8_MAX, SMALLEST_AMAX, round_up_to_power_of_two

BLOCK = 128
"""Rows and columns of a block, which share a scale."""


def quantize_weight_fp8(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The nearest FP8 weight; the scale of a block is the least power of two that keeps it within 448.

    Args:
      weight: float [..., N, K].

    Returns:
      values float8_e4m3fn [..., N, K] and scales float32 [..., ceil(N / 128), ceil(K / 128)], multipliers: what
      `dequantize_blocks` multiplies.

    Raises:
      ValueError: the weight is not float, or has fewer than two axes.
    """
    check("quantize_weight_fp8", weight=(weight, FLOATS, "... N K"))
    weight = refuse_gradient(weight, NO_GRADIENT_OF_ROUNDING)
    rows, columns = weight.shape[-2:]
    pad = [(0, 0)] * (weight.ndim - 2) + [(0, -rows % BLOCK), (0, -columns % BLOCK)]
    blocks = jnp.pad(weight.astype(jnp.float32), pad)
    blocks = blocks.reshape(*weight.shape[:-2], (rows + pad[-2][1]) // BLOCK, BLOCK, -1, BLOCK)
    amax = jnp.maximum(jnp.max(jnp.abs(blocks), axis=(-3, -1)), SMALLEST_AMAX)
    scales = round_up_to_power_of_two(amax * jnp.float32(1 / FP8_MAX))
    values = jnp.clip(blocks / scales[..., :, None, :, None], -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn)
    values = values.reshape(*weight.shape[:-2], rows + pad[-2][1], columns + pad[-1][1])
    return values[..., :rows, :columns], scales


def grid_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the scales of values [..., N, K]: [..., ceil(N / 128), ceil(K / 128)]."""
    return (*shape[:-2], *(-(-side // BLOCK) for side in shape[-2:]))


def dequantize_blocks(values: jax.Array, scales: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Returns values float8_e4m3fn [..., N, K] times the scales, float32, of their 128 x 128 blocks.

    Raises:
      ValueError: other dtypes, or scales of another shape than [..., ceil(N / 128), ceil(K / 128)].
    """
    check("dequantize_blocks", values=(values, E4M3, "... N K"), scales=(scales, FLOAT32, "... N/128 K/128"))
    if scales.shape != grid_of(values.shape):
        raise ValueError(
            f"dequantize_blocks: scales of values {values.shape} must be {grid_of(values.shape)}, not {scales.shape}"
        )
    rows, columns = values.shape[-2:]
    full = jnp.repeat(jnp.repeat(scales, BLOCK, axis=-2)[..., :rows, :], BLOCK, axis=-1)[..., :columns]
    return (refuse_gradient(values, NO_GRADIENT_OF_WEIGHT).astype(jnp.float32) * full).astype(dtype)
