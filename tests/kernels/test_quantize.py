"""FP8 quantisation: bit for bit what ml_dtypes' cast and an exact power-of-two rule give."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.matmul import quantize_weight
from pallas_kernels.matmul.fp8_block import dequantize_blocks, quantize_weight_fp8
from pallas_kernels.quantize import dequantize, quantize, quantize_int8
from pallas_kernels.quantize.reference import round_up_to_power_of_two
from tests import numpy_model


def rows(seed: int, scale: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, 256)) * scale * np.exp(rng.standard_normal((3, 256)) * 3)
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-20, 20))
def test_power_of_two_scales_match_numpy_bit_for_bit(seed, exponent):
    x = rows(seed, 2.0**exponent)
    values, scales = quantize(jnp.asarray(x), "ue8m0")
    expected, expected_scales = numpy_model.quantise_rows(x, "ue8m0")
    np.testing.assert_array_equal(np.asarray(scales, np.float64), expected_scales)
    np.testing.assert_array_equal(
        np.asarray(values).view(np.uint8) & 0x7F,
        (expected.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8) & 0x7F),
    )
    np.testing.assert_array_equal(np.asarray(values, np.float64), expected)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_plain_scales_are_amax_over_448(seed):
    x = rows(seed, 1.0)
    values, scales = quantize(jnp.asarray(x), None)
    amax = np.abs(x.reshape(3, 2, 128)).max(-1)
    np.testing.assert_array_equal(np.asarray(scales), amax * np.float32(1 / 448))
    relative = np.abs(np.asarray(dequantize(values, scales)) - x) / np.repeat(amax, 128, -1)
    assert relative.max() <= 2**-4  # half a step of 3 mantissa bits at the top of the range


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_values_are_quotients_rounded_once(form, jitted):
    """Quotients in the middle of two values: a product with an inverse often lands beside it."""
    rng = np.random.default_rng(0)
    largest = np.float32(448 if form == "fp8" else 127)
    amax = rng.uniform(0.5, 4, (64, 1)).astype(np.float32)
    scales = amax * (np.float32(1) / largest)
    middle = np.arange(0.5, 127)
    if form == "fp8":
        middle = (rng.integers(8, 16, 127) + 0.5) * 2.0 ** rng.integers(-3, 3, 127)
    x = np.concatenate([amax, np.float32(middle) * scales], axis=1)
    op = functools.partial(quantize, scale_fmt=None) if form == "fp8" else quantize_int8
    values, found = map(np.asarray, (jax.jit(op) if jitted else op)(jnp.asarray(x)))
    np.testing.assert_array_equal(found.reshape(-1), scales[:, 0])
    quotients = np.clip(x / scales, -largest, largest)
    assert (np.float32(x * (1 / scales)) != x / scales).any()
    expected = quotients.astype(ml_dtypes.float8_e4m3fn) if form == "fp8" else np.rint(quotients)
    np.testing.assert_array_equal(values.astype(np.float32), expected.astype(np.float32))


def test_every_e4m3_value_survives_and_halfway_cases_round_to_even():
    values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    values = np.unique(values[np.isfinite(values)])
    middle = (values[1:] + values[:-1]) / 2
    for points in (values, middle):
        x = np.zeros((-(-len(points) // 127), 128), np.float32)
        x[:, 0] = 448  # makes the scale exactly 1
        x[:, 1:].flat[: len(points)] = points
        quantised, scales = quantize(jnp.asarray(x), "ue8m0")
        assert (np.asarray(scales) == 1).all()
        np.testing.assert_array_equal(np.asarray(quantised, np.float32), numpy_model.round_e4m3(x))
        np.testing.assert_array_equal(
            np.asarray(quantised, np.float32), x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        )


def test_zeros_have_the_smallest_scale_and_no_nan():
    values, scales = quantize(jnp.zeros((1, 128)), "ue8m0")
    assert float(scales[0, 0]) == 2.0**-22
    assert not np.asarray(values, np.float32).any()


def test_quantising_twice_changes_nothing():
    once = dequantize(*quantize(jnp.asarray(rows(0, 1.0)), "ue8m0"))
    np.testing.assert_array_equal(dequantize(*quantize(once, "ue8m0")), once)


def test_largest_value_never_overflows():
    """amax just above a power of two times 448 is where a scale that is too small would clip or give NaN."""
    amax = np.nextafter(np.float32(448) * np.ldexp(np.float32(1), np.arange(-20, 20)), np.float32(np.inf))
    values, scales = quantize(jnp.asarray(np.repeat(amax[:, None], 128, 1)), "ue8m0")
    assert np.isfinite(np.asarray(values, np.float32)).all()
    top = np.asarray(values, np.float32)[:, 0]
    assert (top >= 224).all() and (top <= 448).all()
    np.testing.assert_allclose(np.asarray(dequantize(values, scales))[:, 0], amax, rtol=2**-4)


@settings(max_examples=30, deadline=None)
@given(mantissa=st.integers(0, 2**23 - 1), exponent=st.integers(-100, 100))
def test_power_of_two_is_exact_where_a_float_logarithm_may_not_be(mantissa, exponent):
    x = np.float32(np.ldexp(1 + mantissa / 2**23, exponent))
    expected = np.ldexp(1.0, exponent + (mantissa != 0))
    assert float(round_up_to_power_of_two(jnp.float32(x))) == expected


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="multiple of 128"):
        quantize(jnp.zeros((2, 100)))
    with pytest.raises(ValueError, match="scale_fmt 'e5m2'"):
        quantize(jnp.zeros((2, 128)), "e5m2")
    with pytest.raises(ValueError, match="kernel of quantize does not take groups of 64; it takes 128"):
        quantize(jnp.zeros((2, 128)), group=64, backend="mosaic_gpu")
    with pytest.raises(ValueError, match="'cuda' is unknown"):
        quantize(jnp.zeros((2, 128)), backend="cuda")


def test_fp8_weights_have_the_least_powers_of_two_that_hold_their_blocks():
    weight = np.random.default_rng(0).standard_normal((2, 130, 200)).astype(np.float32) * 50
    values, scales = quantize_weight_fp8(jnp.asarray(weight))
    assert values.shape == weight.shape and values.dtype == jnp.float8_e4m3fn and scales.shape == (2, 2, 2)
    for block in np.ndindex(scales.shape):
        lead, rows, columns = block[0], *(slice(128 * n, 128 * (n + 1)) for n in block[1:])
        largest, scale = np.abs(weight[lead, rows, columns]).max(), float(scales[block])
        assert scale == 2 ** np.ceil(np.log2(largest / 448))
    np.testing.assert_allclose(dequantize_blocks(values, scales), weight, atol=16 * float(scales.max()))
    stored = quantize_weight(jnp.asarray(weight))
    np.testing.assert_array_equal(np.asarray(stored.values).view(np.uint8), np.asarray(values).view(np.uint8))
    np.testing.assert_array_equal(stored.scales, scales)


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8_block"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_does_not_become_one(scheme, value):
    """In a group of its own, and in one that others are in."""
    weight = jnp.ones((128, 256)).at[0, 200].set(value)
    found = np.asarray(quantize_weight(weight, scheme).dequantize())
    assert not np.isfinite(found[0, 200]) and np.isfinite(found[1:, :128]).all()
    assert np.isfinite(found[0, :128]).all() or scheme == "int8"


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8_block"])
def test_rounding_refuses_a_gradient(scheme):
    with pytest.raises(NotImplementedError, match="rounding activations has no gradient"):
        jax.eval_shape(jax.grad(lambda w: quantize_weight(w, scheme).dequantize().sum()), jnp.ones((128, 128)))


def test_quantised_values_refuse_a_gradient():
    values, scales = quantize_weight_fp8(jnp.ones((128, 128)))
    for back in (lambda v: dequantize_blocks(v, scales), lambda v: dequantize(v, jnp.ones((128, 1)))):
        with pytest.raises(NotImplementedError, match="quantised weight has no gradient"):
            jax.eval_shape(jax.grad(lambda v, back=back: back(v).sum()), values)
