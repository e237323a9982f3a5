"""Rounding that knows its inputs against rounding that does not, and the ranges that it is done in."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.convert.quantization import quantize_model
from dsv32_jax.convert.ranges import RANGES
from dsv32_jax.convert.rounding import DAMPING, round_int4, round_int8
from dsv32_jax.errors import UserError
from pallas_kernels.matmul import INT8, quantize_weight, unpack_int4
from tests.harness import load_golden

RNG = np.random.default_rng(0)
NOTHING = np.zeros((256, 256), np.float32)


def square_error(x, weight, rounded):
    """Mean square error of products with rows x."""
    return np.square(x @ (np.asarray(rounded.dequantize()) - weight).T).mean()


def test_what_four_bits_can_say_stays_as_it_is():
    steps = RNG.integers(0, 16, (8, 256))
    steps[:, ::128], steps[:, 1::128] = 0, 15
    weight = np.repeat([[0.5, 0.25]], 128, 1).reshape(1, 256) * (steps - 7)
    x = RNG.standard_normal((64, 256)).astype(np.float32)
    for moments in (NOTHING, x.T @ x):
        rounded = round_int4(jnp.asarray(weight), jnp.asarray(moments))
        np.testing.assert_allclose(rounded.dequantize(), weight, atol=1e-6)


def test_the_range_is_the_best_and_not_the_widest():
    weight = RNG.standard_t(3, (16, 256)).astype(np.float32)
    searched, nearest = round_int4(weight, NOTHING), quantize_weight(weight, "int4")
    assert square_error(np.eye(256), weight, searched) < 0.95 * square_error(np.eye(256), weight, nearest)


def test_errors_make_each_other_good_where_inputs_go_together():
    weight = RNG.standard_normal((32, 256)).astype(np.float32)
    x = (RNG.standard_normal((2000, 24)) @ RNG.standard_normal((24, 256))).astype(np.float32)
    x += 0.1 * RNG.standard_normal(x.shape).astype(np.float32)
    informed, blind = round_int4(weight, x[:1000].T @ x[:1000]), round_int4(weight, NOTHING)
    assert square_error(x[1000:], weight, informed) < 0.2 * square_error(x[1000:], weight, blind)


def test_experts_are_rounded_each_for_its_own_inputs():
    weight = RNG.standard_normal((3, 8, 256)).astype(np.float32)
    x = RNG.standard_normal((3, 300, 256)).astype(np.float32) @ RNG.standard_normal((3, 256, 256)).astype(np.float32)
    moments = np.einsum("erk,erl->ekl", x, x)
    moments[1] = 0  # an expert that the calibration did not reach
    together = round_int4(weight, moments)
    assert together.shape == weight.shape
    for expert in range(3):
        alone = round_int4(weight[expert], moments[expert])
        np.testing.assert_array_equal(together.values[expert], alone.values)
        np.testing.assert_array_equal(together.scales[expert], alone.scales)


# ---- eight-bit rows ------------------------------------------------------------------------------------------------


def row_errors(weight, rounded, importance):
    """float64 [..., N], square errors of rows by the importance [..., K] of their columns."""
    error = np.asarray(rounded.dequantize(), np.float64) - weight
    return (error**2 * importance[..., None, :]).sum(-1)


def test_rows_never_lose_more_than_by_their_largest_value():
    """And less where tails are heavy and meet inputs of which some are small."""
    heavy = RNG.standard_t(3, (3, 64, 512)).astype(np.float32)
    heavy[0, 0] = 0
    x = (RNG.standard_normal((3, 600, 512)) * np.exp(RNG.standard_normal((3, 1, 512)))).astype(np.float32)
    moments = np.einsum("erk,erl->ekl", x, x)
    moments[2] = 0  # an expert that the calibration did not reach
    mean_square = np.einsum("ekk->ek", moments).astype(np.float64)
    mean = mean_square.mean(-1, keepdims=True)
    importance = np.where(mean > 0, mean_square / np.where(mean > 0, mean, 1), 1) + DAMPING
    searched, nearest = round_int8(heavy, moments), quantize_weight(jnp.asarray(heavy), "int8")
    assert searched.scheme == INT8 and searched.values.dtype == jnp.int8 and searched.scales.shape == (3, 64)
    after, before = (row_errors(heavy, rounded, importance) for rounded in (searched, nearest))
    assert (after <= before * (1 + 1e-5)).all()
    assert (after[:2].sum(-1) < 0.95 * before[:2].sum(-1)).all(), after.sum(-1) / before.sum(-1)
    assert (after < 0.999 * before).mean(-1)[:2].min() > 0.25
    alone = round_int8(heavy[1], moments[1])
    np.testing.assert_array_equal(alone.values, searched.values[1])
    np.testing.assert_array_equal(alone.scales, searched.scales[1])


def test_what_eight_bits_can_say_stays_as_it_is():
    steps = RNG.integers(-127, 128, (16, 256))
    steps[:, 0] = 127
    weight = (0.5 * steps).astype(np.float32)
    for moments in (np.zeros((256, 256), np.float32), np.eye(256, dtype=np.float32)):
        np.testing.assert_allclose(round_int8(weight, moments).dequantize(), weight, rtol=1e-6)


# ---- ranges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "rounded"), [("int8", round_int8), ("int4", round_int4)])
def test_from_the_smallest_to_the_largest_is_plain_rounding(scheme, rounded):
    weight = jnp.asarray(RNG.standard_t(3, (2, 8, 256)), jnp.float32)
    ranged, plain = rounded(weight, None, "min-max"), quantize_weight(weight, scheme)
    np.testing.assert_array_equal(ranged.values, plain.values)
    np.testing.assert_array_equal(ranged.scales, plain.scales)


@pytest.mark.parametrize("moments", [None, NOTHING], ids=["without inputs", "none seen"])
def test_percentiles_cut_what_is_far_out(moments):
    weight = RNG.standard_normal((8, 256)).astype(np.float32)
    weight[:, 7] = 50
    eight, four = (rounded(jnp.asarray(weight), moments, "percentile") for rounded in (round_int8, round_int4))
    np.testing.assert_allclose(eight.scales, np.sort(np.abs(weight))[:, -2] / 127, rtol=1e-6)  # 99.9% of 256
    assert (eight.values[:, 7] == 127).all()
    ordered = np.sort(weight.reshape(8, 2, 128))
    _, scales, _ = unpack_int4(four.values, four.scales)
    np.testing.assert_allclose(scales.astype(np.float32), (ordered[..., -2] - ordered[..., 1]) / 15, rtol=2**-8)
    assert (np.asarray(four.dequantize())[:, 7] < 5).all()


def test_no_range_loses_less_than_the_searched_one():
    weight = jnp.asarray(RNG.standard_t(3, (16, 512)), jnp.float32)
    for rounded in (round_int8, round_int4):
        by_ranges = {ranges: rounded(weight, None, ranges) for ranges in RANGES}
        errors = {
            ranges: np.square(np.asarray(of_range.dequantize()) - weight).sum()
            for ranges, of_range in by_ranges.items()
        }
        assert errors["mse"] == min(errors.values()) < errors["percentile"], errors


def test_an_unknown_kind_of_range():
    with pytest.raises(UserError, match="ranges: 'max'; must be one of mse, percentile, min-max"):
        quantize_model(load_golden("tiny128_fp8"), {}, ranges="max")
