"""Rounding to FP8 inside a jitted program on a GPU is the rounding of a CPU: XLA may not drop it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantize import dequantize, quantize


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
