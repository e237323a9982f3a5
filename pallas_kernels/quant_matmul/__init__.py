"""Matrix products with quantised weights: FP8 in blocks, int8 by row, four bits in groups."""

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic
from pallas_kernels.arguments import E4M3, FLOAT32, FLOATS, check
from pallas_kernels.backend import (
    KERNEL,
    NO_GRADIENT_OF_WEIGHT,
    gradient_of_reference,
    launched,
    refuse_gradient,
    resolve,
)
from pallas_kernels.operators import callable_package
from pallas_kernels.quant_matmul import few_rows, many_rows, reference
from pallas_kernels.quant_matmul.int4 import dequantize_int4, pack_int4, quantize_weight_int4, unpack_int4
from pallas_kernels.quant_matmul.int8 import dequantize_int8, quantize_weight_int8
from pallas_kernels.quant_matmul.integer import (
    grouped_int4_matmul,
    grouped_int8_matmul,
    int4_matmul,
    int8_matmul,
)
from pallas_kernels.quant_matmul.reference import dequantize_blocks
from pallas_kernels.quantize import BLOCK, GROUP, SCALE_FORMATS, quantize, quantize_weight_fp8

__all__ = [
    "BLOCK",
    "dequantize_blocks",
    "dequantize_int4",
    "dequantize_int8",
    "grouped_int4_matmul",
    "grouped_int8_matmul",
    "int4_matmul",
    "int8_matmul",
    "pack_int4",
    "quant_matmul",
    "quantize_weight_fp8",
    "quantize_weight_int4",
    "quantize_weight_int8",
    "unpack_int4",
    "unsupported",
]

callable_package(__name__)


def unsupported(x: jax.Array, values: jax.Array, quantize_input: bool) -> str | None:
    """What neither kernel, of few rows nor of many, takes of these arguments; None if one takes all."""
    if not quantize_input:
        return "an input that stays as it is; it takes quantize_input=True"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x of dtype {x.dtype}; it takes bfloat16 and float32"
    if few_rows.unsupported(x, values) is None:
        return None
    return many_rows.unsupported(x, values, jnp.float8_e4m3fn)


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
      backend: "auto", "mosaic_gpu", "interpret" or "reference". The kernels take quantised inputs and N in
        multiples of 64; K in multiples of 128 in bfloat16, of 512 in float32, which they take for up to 128 rows alone.
        Their gradient is the reference's: none for `values`, nor for an x that is quantised.

    Returns:
      [M, N] in x's dtype, accumulated in float32.

    Raises:
      ValueError: other dtypes or ranks than these, unknown `scale_fmt`, shapes do not fit, or K is no multiple of 128
        while the input is quantised.
      BackendError: the kernel was asked for and does not take these arguments, or there is no such GPU.
    """
    check(
        "quant_matmul",
        x=(x, FLOATS, "M K"),
        values=(values, E4M3, "N K"),
        scales=(scales, FLOAT32, "N/128 K/128"),
    )
    if scale_fmt not in SCALE_FORMATS:
        raise ValueError(f"scale_fmt {scale_fmt!r} is unknown; it is one of {SCALE_FORMATS}")
    chosen = resolve(backend, "quant_matmul", KERNEL, unsupported(x, values, quantize_input))
    grid = tuple(-(-side // BLOCK) for side in values.shape)
    if x.shape[-1] != values.shape[-1] or scales.shape != grid:
        raise ValueError(
            f"x {x.shape}, values {values.shape} and scales {scales.shape} do not fit: "
            f"the last axes of x and values must agree and scales must be {grid}"
        )

    if quantize_input and x.shape[-1] % GROUP:
        raise ValueError(f"quant_matmul quantises x in groups of {GROUP} columns; it has {x.shape[-1]}")
    values = refuse_gradient(values, NO_GRADIENT_OF_WEIGHT)

    def plain(x: jax.Array, values: jax.Array, scales: jax.Array) -> jax.Array:
        return reference.quant_matmul(x, values, scales, quantize_input, scale_fmt)

    if chosen == "reference":
        return plain(x, values, scales)

    def kernel(x: jax.Array, values: jax.Array, scales: jax.Array) -> jax.Array:
        interpret = mosaic.interpret_on(chosen)
        rows, row_scales = quantize(x, scale_fmt)
        if few_rows.unsupported(x, values) is None:
            return few_rows.matmul(rows, row_scales, values, scales, dtype=x.dtype, interpret=interpret)
        return many_rows.many_rows_matmul(rows, row_scales.T, values, scales, interpret=interpret)

    return gradient_of_reference(launched(kernel, "quant_matmul", chosen), plain)(x, values, scales)
