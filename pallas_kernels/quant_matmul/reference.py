"""The block-scaled matrix product in plain jax.numpy: the specification."""

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import E4M3, FLOAT32, check
from pallas_kernels.backend import NO_GRADIENT_OF_WEIGHT, refuse_gradient
from pallas_kernels.quantize import BLOCK, quantize


def dequantize_blocks(values: jax.Array, scales: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """values float8_e4m3fn [..., N, K] times the scales, float32, of their 128 x 128 blocks.

    Raises ValueError for other dtypes, or scales of another shape than [..., ceil(N / 128), ceil(K / 128)].
    """
    check("dequantize_blocks", values=(values, E4M3, "... N K"), scales=(scales, FLOAT32, "... N/128 K/128"))
    grid = (*values.shape[:-2], *(-(-side // BLOCK) for side in values.shape[-2:]))
    if scales.shape != grid:
        raise ValueError(f"dequantize_blocks: scales of values {values.shape} must be {grid}, not {scales.shape}")
    rows, columns = values.shape[-2:]
    full = jnp.repeat(jnp.repeat(scales, BLOCK, axis=-2)[..., :rows, :], BLOCK, axis=-1)[..., :columns]
    return (refuse_gradient(values, NO_GRADIENT_OF_WEIGHT).astype(jnp.float32) * full).astype(dtype)


def quant_matmul(
    x: jax.Array, values: jax.Array, scales: jax.Array, quantize_input: bool, scale_fmt: str | None
) -> jax.Array:
    if not quantize_input:
        weight = dequantize_blocks(values, scales, x.dtype)
        return jnp.matmul(x, weight.T, precision="highest", preferred_element_type=jnp.float32).astype(x.dtype)
    return scaled_matmul(*quantize(x, scale_fmt, backend="reference"), values, scales, x.dtype)


def scaled_matmul(
    xq: jax.Array, xs: jax.Array, values: jax.Array, scales: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """x W^T of FP8 values [M, K] and [N, K], and the scales of both, [M, K / 128] and [ceil(N / 128), K / 128]."""
    row_scales = jnp.repeat(scales, BLOCK, axis=0)[: values.shape[0]]  # [N, K / 128]

    def add_block(block, total):
        """One 128-wide slice of K: the exact product of FP8 values, then both scales, added in float32."""
        left = jax.lax.dynamic_slice_in_dim(xq, block * BLOCK, BLOCK, axis=1).astype(jnp.bfloat16)
        right = jax.lax.dynamic_slice_in_dim(values, block * BLOCK, BLOCK, axis=1).astype(jnp.bfloat16)
        partial = jnp.matmul(left, right.T, preferred_element_type=jnp.float32)
        return total + partial * (xs[:, block, None] * row_scales[None, :, block])

    total = jnp.zeros((xq.shape[0], values.shape[0]), jnp.float32)
    return jax.lax.fori_loop(0, xq.shape[1] // BLOCK, add_block, total).astype(dtype)
