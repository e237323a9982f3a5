"""The kernels of `quantize`: in the interpreter, and lowered for a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.backend import BackendError
from pallas_kernels.quantize import quantize, quantize_int8
from tests.kernels.cases import quantize as cases


@pytest.mark.interpret
@pytest.mark.parametrize(("dtype", "scale_fmt"), [("bfloat16", "ue8m0"), ("float32", None)])
def test_quantize_in_the_interpreter(dtype, scale_fmt, capfd):
    x = jnp.asarray(cases.rows(3, 768, dtype))
    got, wanted = (quantize(x, scale_fmt, backend=backend) for backend in ("interpret", "reference"))
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.interpret
def test_int8_in_the_interpreter(capfd):
    x = jnp.asarray(cases.rows(3, 384, "bfloat16"))
    got, wanted = (quantize_int8(x, backend=backend) for backend in ("interpret", "reference"))
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        np.testing.assert_array_equal(a, b)
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_int8_against_numpy():
    x = cases.rows(5, 256, "float32")
    values, scales = map(np.asarray, quantize_int8(jnp.asarray(x)))
    assert values.dtype == np.int8 and scales.shape == (5,)
    np.testing.assert_allclose(scales, np.abs(x).max(-1) / 127, rtol=1e-6)
    assert (np.abs(values).max(-1) == 127).all()
    assert (np.abs(values * scales[:, None] - x) <= 0.5001 * scales[:, None]).all()
    values, scales = map(np.asarray, quantize_int8(jnp.zeros((1, 128))))
    assert (values == 0).all() and (scales > 0).all()


def test_int8_kernel_lowers():
    call = jax.jit(lambda x: quantize_int8(x, backend="mosaic_gpu"))
    text = call.trace(jax.ShapeDtypeStruct((5, 7168), jnp.bfloat16)).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("scale_fmt", ["ue8m0", None])
def test_kernels_lower(dtype, scale_fmt):
    x = jax.ShapeDtypeStruct((5, 7168), dtype)
    call = jax.jit(lambda x: quantize(x, scale_fmt, backend="mosaic_gpu"))
    assert "mosaic_gpu" in call.trace(x).lower(lowering_platforms=("cuda",)).as_text()


def test_what_the_kernels_do_not_take():
    with pytest.raises(BackendError, match="x of dtype float16; it takes bfloat16 or float32"):
        quantize(jnp.zeros((2, 128), jnp.float16), backend="interpret")
    with pytest.raises(BackendError, match="rows of a multiple of 128"):
        quantize_int8(jnp.zeros((1, 100), jnp.bfloat16), backend="interpret")
    with pytest.raises(ValueError, match="multiple of 128, not 100"):
        quantize(jnp.zeros((2, 100)))
