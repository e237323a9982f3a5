"""Matrix product with a block-quantised weight."""

import jax

from pallas_kernels.backend import resolve
from pallas_kernels.quant_matmul import reference
from pallas_kernels.quant_matmul.reference import BLOCK, dequantize_blocks

__all__ = ["BLOCK", "dequantize_blocks", "quant_matmul"]


def quant_matmul(
    x: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    *,
    quantize_input: bool,
    scale_fmt: str | None = "ue8m0",
    backend: str = "auto",
) -> jax.Array:
    """x W^T with an FP8 weight in blocks of 128 x 128.

    Source: `fp8_gemm` in the official `inference/kernel.py` of DeepSeek-V3.2-Exp.

    Args:
      x: float [M, K].
      values: float8_e4m3fn [N, K].
      scales: float32 [ceil(N / 128), ceil(K / 128)], multipliers.
      quantize_input: quantise x to FP8 in groups of 128 first, as the official code does; else only the weight is FP8.
      scale_fmt: of the input's scales, see `quantize`.
      backend: "auto" or "reference".

    Returns:
      [M, N] in x's dtype, accumulated in float32.

    Raises:
      ValueError: shapes do not fit, or K is no multiple of 128 while the input is quantised.
    """
    resolve(backend, "quant_matmul")
    grid = tuple(-(-side // BLOCK) for side in values.shape)
    if x.shape[-1] != values.shape[-1] or scales.shape != grid:
        raise ValueError(
            f"x {x.shape}, values {values.shape} and scales {scales.shape} do not fit: "
            f"the last axes of x and values must agree and scales must be {grid}"
        )
    return reference.quant_matmul(x, values, scales, quantize_input, scale_fmt)
