"""Symmetric int8 weights, a scale a row, and their products with int8 rows in plain jax.numpy: the specification."""

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


@jax.custom_jvp
def matmul(x: jax.Array, values: jax.Array, scales: jax.Array) -> jax.Array:
    """x [M, K], quantised by row, times the weight's transpose: [M, N] in x's dtype.

    The sums of whole numbers are exact (int32), and are multiplied by the product of both scales in float32.
    """
    rows, row_scales = quantize_int8(x, backend="reference")
    sums = jax.lax.dot_general(rows, values, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return (sums.astype(jnp.float32) * (row_scales[:, None] * scales[None])).astype(x.dtype)


@matmul.defjvp
def _(primals, tangents):
    """Straight through: as if x had not been rounded."""

    def unrounded(x, values, scales):
        weight = dequantize_int8(values, scales, x.dtype)
        return jnp.matmul(x, weight.T, precision="highest", preferred_element_type=jnp.float32).astype(x.dtype)

    return matmul(*primals), jax.jvp(unrounded, primals, tangents)[1]
