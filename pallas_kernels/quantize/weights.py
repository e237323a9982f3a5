"""FP8 weights in blocks of 128 x 128, as the checkpoint has them."""

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import FLOATS, check
from pallas_kernels.backend import NO_GRADIENT_OF_ROUNDING, refuse_gradient
from pallas_kernels.quantize.reference import FP8_MAX, SMALLEST_AMAX, round_up_to_power_of_two

BLOCK = 128
"""Rows and columns of a block, which share a scale."""


def quantize_weight_fp8(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The nearest FP8 weight; the scale of a block is the least power of two that keeps it within 448.

    Args:
      weight: float [..., N, K].

    Returns:
      values float8_e4m3fn [..., N, K] and scales float32 [..., ceil(N / 128), ceil(K / 128)], multipliers: what
      `quant_matmul` takes and `dequantize_blocks` multiplies.

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
