"""The kernels of `quantize`: in the interpreter, and lowered for a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.backend import BackendError
from pallas_kernels.quantize import quantize, quantize_int8, rms_norm_quantize
from tests.kernels.cases import quantize as cases

EPS = 1e-6


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
def test_norm_in_the_interpreter(capfd):
    x, weight = jnp.asarray(cases.rows(3, 256, "bfloat16")), jnp.asarray(cases.weight(256, "float32"))
    got, wanted = (rms_norm_quantize(x, weight, EPS, backend=backend) for backend in ("interpret", "reference"))
    cases.check_nearly(got, wanted)
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
    norm = jax.jit(lambda x, weight: rms_norm_quantize(x, weight, EPS, scale_fmt, backend="mosaic_gpu"))
    arguments = jax.ShapeDtypeStruct((5, 7168), jnp.bfloat16), jax.ShapeDtypeStruct((7168,), dtype)
    assert "mosaic_gpu" in norm.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def test_norm_then_quantise_is_what_the_two_give():
    x, weight = jnp.asarray(cases.rows(4, 256, "bfloat16")), jnp.asarray(cases.weight(256, "float32"))
    x64 = np.asarray(x, np.float64)
    normed = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + EPS) * np.asarray(weight, np.float64)
    cases.check_nearly(rms_norm_quantize(x, weight, EPS), quantize(jnp.asarray(normed, jnp.bfloat16)))


def test_what_the_kernels_do_not_take():
    with pytest.raises(BackendError, match="x of dtype float16; it takes bfloat16 or float32"):
        quantize(jnp.zeros((2, 128), jnp.float16), backend="interpret")
    with pytest.raises(BackendError, match="rows of at most 16384"):
        rms_norm_quantize(jnp.zeros((1, 16512), jnp.bfloat16), jnp.ones(16512), EPS, backend="interpret")
    with pytest.raises(BackendError, match="rows of a multiple of 128"):
        quantize_int8(jnp.zeros((1, 100), jnp.bfloat16), backend="interpret")
    with pytest.raises(ValueError, match="multiple of 128, not 100"):
        rms_norm_quantize(jnp.zeros((2, 100)), jnp.ones(100), EPS)
