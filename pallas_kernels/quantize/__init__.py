"""Quantisation of activations: to FP8 in groups, or to int8 by token."""

import functools

import jax

from pallas_kernels import mosaic
from pallas_kernels.arguments import E4M3, FLOAT32, FLOATS, check_size
from pallas_kernels.arguments import check as check_arrays
from pallas_kernels.backend import (
    KERNEL,
    NO_GRADIENT_OF_WEIGHT,
    launched,
    refuse_gradient,
    resolve,
    without_gradient,
)
from pallas_kernels.operators import callable_package
from pallas_kernels.quantize import mosaic_gpu, reference
from pallas_kernels.quantize.reference import FP8_MAX, GROUP, SCALE_FORMATS

__all__ = [
    "FP8_MAX",
    "GROUP",
    "SCALE_FORMATS",
    "dequantize",
    "quantize",
    "quantize_int8",
]

callable_package(__name__)


def check(x: jax.Array, scale_fmt: str | None, group: int) -> None:
    """Raises ValueError if N is no multiple of `group`, or `scale_fmt` is unknown."""
    if x.shape[-1] % group:
        raise ValueError(f"FP8 groups of {group} need a last axis that is a multiple of {group}, not {x.shape[-1]}")
    if scale_fmt not in SCALE_FORMATS:
        raise ValueError(f"scale_fmt {scale_fmt!r} is unknown; it is one of {SCALE_FORMATS}")


def quantize(
    x: jax.Array, scale_fmt: str | None = "ue8m0", *, group: int = GROUP, backend: str = "auto"
) -> tuple[jax.Array, jax.Array]:
    """Returns FP8 values and scales of `x`, one scale for each `group` consecutive values.

    Source: `act_quant` in the official `inference/kernel.py` of DeepSeek-V3.2-Exp.

    Args:
      x: float [..., N].
      scale_fmt: "ue8m0" rounds scales up to powers of two; None keeps amax / 448.
      group: values to a scale; must divide N.
      backend: "auto", "mosaic_gpu", "interpret" or "reference". None has a gradient.

    Returns:
      values float8_e4m3fn [..., N] and scales float32 [..., N / group]; x is about values * scales.

    Raises:
      ValueError: x is not float, N is no multiple of `group`, or `scale_fmt` is unknown.
      BackendError: the kernel was asked for and does not take these arguments, or there is no such GPU.
    """
    check_arrays("quantize", x=(x, FLOATS, "... N"))
    check_size("quantize", group=group)
    unsupported = mosaic_gpu.unsupported(x, group)
    chosen = resolve(backend, "quantize", KERNEL, unsupported)
    check(x, scale_fmt, group)
    if chosen == "reference" or x.size == 0:
        return reference.quantize(x, scale_fmt, group)
    interpret = mosaic.interpret_on(chosen)
    kernel = functools.partial(mosaic_gpu.quantize, scale_fmt=scale_fmt, interpret=interpret)
    return without_gradient(launched(kernel, "quantize", chosen), "quantize")(x)


def quantize_int8(x: jax.Array, *, backend: str = "auto") -> tuple[jax.Array, jax.Array]:
    """Returns symmetric int8 values of `x`, one scale for each row: its largest magnitude / 127.

    Args:
      x: float [..., N].
      backend: "auto", "mosaic_gpu", "interpret" or "reference". None has a gradient.

    Returns:
      values int8 [..., N], from -127 to 127, and scales float32 [...]; x is about values * scales.

    Raises:
      ValueError: x is not float.
      BackendError: the kernel was asked for and does not take these arguments, or there is no such GPU.
    """
    check_arrays("quantize_int8", x=(x, FLOATS, "... N"))
    chosen = resolve(backend, "quantize_int8", KERNEL, mosaic_gpu.int8_unsupported(x))
    if chosen == "reference" or x.size == 0:
        return reference.quantize_int8(x)
    interpret = mosaic.interpret_on(chosen)
    kernel = functools.partial(mosaic_gpu.quantize_int8, interpret=interpret)
    return without_gradient(launched(kernel, "quantize_int8", chosen), "quantize_int8")(x)


def dequantize(values: jax.Array, scales: jax.Array, dtype: jax.typing.DTypeLike = "float32") -> jax.Array:
    """What `quantize` made of an array, in `dtype`.

    Args:
      values: float8_e4m3fn [..., N].
      scales: float32 [..., G], each for N / G consecutive values.
      dtype: of the result.

    Raises:
      ValueError: other dtypes than these, or the shapes do not fit.
    """
    check_arrays("dequantize", values=(values, E4M3, "... N"), scales=(scales, FLOAT32, "... G"))
    if values.shape[:-1] != scales.shape[:-1] or values.shape[-1] % max(1, scales.shape[-1]):
        raise ValueError(f"dequantize: scales {scales.shape} are not one for each group of values {values.shape}")
    if str(jax.numpy.dtype(dtype)) not in FLOATS:
        raise ValueError(f"dequantize gives one of {', '.join(FLOATS)}, not {dtype}")
    return reference.dequantize(refuse_gradient(values, NO_GRADIENT_OF_WEIGHT), scales, dtype)
