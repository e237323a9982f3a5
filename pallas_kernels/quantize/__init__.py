"""FP8 quantisation of activations in groups along the last axis."""

import jax

from pallas_kernels.backend import resolve
from pallas_kernels.quantize import reference
from pallas_kernels.quantize.reference import FP8_MAX, GROUP, SCALE_FORMATS, dequantize

__all__ = ["FP8_MAX", "GROUP", "SCALE_FORMATS", "dequantize", "quantize"]


def quantize(
    x: jax.Array, scale_fmt: str | None = "ue8m0", *, group: int = GROUP, backend: str = "auto"
) -> tuple[jax.Array, jax.Array]:
    """FP8 values and scales of `x`, one scale for each `group` consecutive values.

    Source: `act_quant` in the official `inference/kernel.py` of DeepSeek-V3.2-Exp.

    Args:
      x: float [..., N].
      scale_fmt: "ue8m0" rounds scales up to powers of two; None keeps amax / 448.
      group: values to a scale; must divide N.
      backend: "auto" or "reference".

    Returns:
      values float8_e4m3fn [..., N] and scales float32 [..., N / group]; x is about values * scales.

    Raises:
      ValueError: N is no multiple of `group`, or `scale_fmt` is unknown.
    """
    resolve(backend, "quantize")
    if x.shape[-1] % group:
        raise ValueError(f"FP8 groups of {group} need a last axis that is a multiple of {group}, not {x.shape[-1]}")
    if scale_fmt not in SCALE_FORMATS:
        raise ValueError(f"scale_fmt {scale_fmt!r} is unknown; it is one of {SCALE_FORMATS}")
    return reference.quantize(x, scale_fmt, group)
