"""Rounding to FP8 inside a jitted program on a GPU is the rounding of a CPU: XLA may not drop it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantize import dequantize, quantize, quantize_int8
from tests.kernels.cases import quantize as cases


@pytest.mark.parametrize("scale_fmt", ["ue8m0", None])
def test_values_really_are_rounded(scale_fmt):
    x = np.asarray(jax.random.normal(jax.random.key(0), (64, 512), jnp.float32) * 3)

    def rounded(x):
        return dequantize(*quantize(x, scale_fmt))

    with jax.default_device(jax.devices("cpu")[0]):
        expected = np.asarray(rounded(jnp.asarray(x)))
    found = np.asarray(jax.jit(rounded)(x))
    if scale_fmt:  # a power of two; else XLA's own division by the scale may differ in the last bit
        np.testing.assert_array_equal(found, expected)
    assert np.mean(found != expected) <= 1e-3
    assert len(np.unique(np.abs(found[0, :128]))) <= 100  # of 128 values; unrounded ones are all different


@pytest.mark.parametrize("shape", [(1, 128), (1, 7168), (33, 640), (4096, 7168)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("scale_fmt", ["ue8m0", None])
def test_kernel_gives_the_bits_of_the_reference(shape, dtype, scale_fmt):
    x = cases.rows(*shape, dtype)
    got = jax.block_until_ready(quantize(jnp.asarray(x), scale_fmt, backend="mosaic_gpu"))
    with jax.default_device(jax.devices("cpu")[0]):
        wanted = quantize(jnp.asarray(x), scale_fmt, backend="reference")
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize("shape", [(1, 128), (33, 640), (5, 6016), (4096, 7168), (3, 18432), (2, 65536)])
def test_int8_kernel_gives_the_bits_of_the_reference(shape):
    x = cases.rows(*shape, "bfloat16")
    got = jax.block_until_ready(quantize_int8(jnp.asarray(x), backend="mosaic_gpu"))
    with jax.default_device(jax.devices("cpu")[0]):
        wanted = quantize_int8(jnp.asarray(x), backend="reference")
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
