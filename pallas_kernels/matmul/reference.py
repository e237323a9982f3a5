"""Products with weights of every scheme in plain jax.numpy, and SwiGLU behind two of them: the specification."""

import jax
import jax.numpy as jnp

from pallas_kernels.matmul.fp8_block import BLOCK, dequantize_blocks
from pallas_kernels.matmul.int4 import dequantize_int4
from pallas_kernels.matmul.int8 import dequantize_int8
from pallas_kernels.quantize import quantize, quantize_int8


def plain_matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [M, K] times the transpose of a weight [N, K] that is not quantised, in x's dtype: [M, N].

    There is no preferred_element_type: sums are float32 all the same, and the gradient's products stay in x's dtype.
    """
    return jnp.matmul(x, weight.astype(x.dtype).T, precision="highest")


def dequantized_matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [M, K] times the transpose of a dequantised weight [N, K] of x's dtype: [M, N] in it, summed in float32."""
    return jnp.matmul(x, weight.T, precision="highest", preferred_element_type=jnp.float32).astype(x.dtype)


def fp8_matmul(
    x: jax.Array, values: jax.Array, scales: jax.Array, quantize_input: bool, scale_fmt: str | None
) -> jax.Array:
    """x [M, K] times the transpose of an FP8 weight: [M, N] in x's dtype, accumulated in float32.

    Source: `fp8_gemm` in the official `inference/kernel.py` of DeepSeek-V3.2-Exp.
    """
    if not quantize_input:
        return dequantized_matmul(x, dequantize_blocks(values, scales, x.dtype))
    return scaled_matmul(*quantize(x, scale_fmt, backend="reference"), values, scales, x.dtype)


def scaled_matmul(
    xq: jax.Array, xs: jax.Array, values: jax.Array, scales: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """x W^T of FP8 values [M, K] and [N, K], and the scales of both, [M, K / 128] and [ceil(N / 128), K / 128]."""
    row_scales = jnp.repeat(scales, BLOCK, axis=0)[: values.shape[0]]  # [N, K / 128]

    def add_block(block, total):
        """Adds one 128-wide slice of K: the exact product of FP8 values, times both scales, in float32."""
        left = jax.lax.dynamic_slice_in_dim(xq, block * BLOCK, BLOCK, axis=1).astype(jnp.bfloat16)
        right = jax.lax.dynamic_slice_in_dim(values, block * BLOCK, BLOCK, axis=1).astype(jnp.bfloat16)
        partial = jnp.matmul(left, right.T, preferred_element_type=jnp.float32)
        return total + partial * (xs[:, block, None] * row_scales[None, :, block])

    # Like xs, so that inside `shard_map` it varies over the mesh where the rows do.
    total = jnp.zeros_like(xs, jnp.float32, shape=(xq.shape[0], values.shape[0]))
    return jax.lax.fori_loop(0, xq.shape[1] // BLOCK, add_block, total).astype(dtype)


@jax.custom_jvp
def int8_matmul(x: jax.Array, values: jax.Array, scales: jax.Array) -> jax.Array:
    """x [M, K], quantised by row, times the transpose of an int8 weight: [M, N] in x's dtype.

    The sums of whole numbers are exact (int32), and are multiplied by the product of both scales in float32.
    """
    rows, row_scales = quantize_int8(x, backend="reference")
    sums = jax.lax.dot_general(rows, values, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return (sums.astype(jnp.float32) * (row_scales[:, None] * scales[None])).astype(x.dtype)


@int8_matmul.defjvp
def _(primals, tangents):
    """Passes straight through: as if x had not been rounded."""

    def unrounded(x, values, scales):
        return dequantized_matmul(x, dequantize_int8(values, scales, x.dtype))

    return int8_matmul(*primals), jax.jvp(unrounded, primals, tangents)[1]


def int4_matmul(x: jax.Array, values: jax.Array, scales: jax.Array) -> jax.Array:
    """x [M, K] times the transpose of a four-bit weight, which is rounded to x's dtype: [M, N] in it."""
    return dequantized_matmul(x, dequantize_int4(values, scales, x.dtype))


def silu_product(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up in float32, rounded once to the inputs' dtype."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def rounded_silu_product(*products: jax.Array) -> jax.Array:
    """`silu_product` of products that are rounded: within one program XLA may drop what is widened again at once."""
    return jax.lax.optimization_barrier(silu_product(*jax.lax.optimization_barrier(products)))
