"""Symmetric int8 weights, a scale a row."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import FLOAT32, FLOATS, check
from pallas_kernels.quantize import quantize_int8


def quantize_weight_int8(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The nearest int8 weight; the scale of a row is its largest magnitude / 127, as `quantize_int8` has it.

    Args:
      weight: float [..., N, K].

    Returns:
      values int8 [..., N, K], from -127 to 127, and scales float32 [..., N].
    """
    check("quantize_weight_int8", weight=(weight, FLOATS, "... N K"))
    return quantize_int8(weight, backend="reference")


def dequantize_int8(values: jax.Array, scales: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """[..., N, K] in `dtype`."""
    check("dequantize_int8", values=(values, ("int8",), "... N K"), scales=(scales, FLOAT32, "... N"))
    return (values.astype(jnp.float32) * scales[..., None]).astype(dtype)
