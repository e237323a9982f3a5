"""The block-scaled FP8 product against its definition in float64."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.matmul import QTensor, matmul
from pallas_kernels.matmul.fp8_block import dequantize_blocks
from pallas_kernels.quantize import dequantize, quantize
from tests import numpy_model


def case(out: int = 192, columns: int = 384):
    rng = np.random.default_rng(0)
    values = numpy_model.round_e4m3(rng.standard_normal((out, columns)) * 50).astype(ml_dtypes.float8_e4m3fn)
    scales = np.exp2(rng.integers(-9, -5, (-(-out // 128), -(-columns // 128)))).astype(np.float32)
    x = rng.standard_normal((7, columns)).astype(ml_dtypes.bfloat16).astype(np.float32)
    return x, values, scales


@pytest.mark.parametrize("shape", [(192, 384), (128, 128), (64, 256)])
def test_dequantised_blocks_with_ragged_edges(shape):
    _, values, scales = case(*shape)
    got = dequantize_blocks(jnp.asarray(values), jnp.asarray(scales))
    np.testing.assert_array_equal(got, numpy_model.dequantise_blocks(values, scales))


@pytest.mark.parametrize("quantize_input", [False, True])
@pytest.mark.parametrize("scale_fmt", ["ue8m0", None])
def test_product(quantize_input, scale_fmt):
    x, values, scales = case()
    weight = QTensor(jnp.asarray(values), jnp.asarray(scales))
    got = matmul(jnp.asarray(x), weight, quantize_input=quantize_input, scale_fmt=scale_fmt)
    # Quantised by the op itself (its own test checks it): with plain scales float64 could round a tie otherwise.
    rounded = dequantize(*quantize(jnp.asarray(x), scale_fmt)) if quantize_input else x
    exact = np.asarray(rounded, np.float64)
    expected = exact @ numpy_model.dequantise_blocks(values, scales).T
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


def test_the_input_is_really_quantised():
    x, values, scales = case()
    weight = QTensor(jnp.asarray(values), jnp.asarray(scales))
    plain, quantised = (matmul(jnp.asarray(x), weight, quantize_input=q) for q in (False, True))
    assert float(jnp.abs(plain - quantised).max()) > 1e-3 * float(jnp.abs(plain).max())


def test_shapes_that_do_not_fit_are_refused():
    x, values, scales = case()
    with pytest.raises(ValueError, match=r"scales of float32 \(2, 3\), not of \(3, 2\)"):
        matmul(jnp.asarray(x), QTensor(jnp.asarray(values), jnp.asarray(scales.T)), quantize_input=False)
    with pytest.raises(ValueError, match="last axes"):
        matmul(jnp.asarray(x[:, :128]), QTensor(jnp.asarray(values), jnp.asarray(scales)), quantize_input=False)
