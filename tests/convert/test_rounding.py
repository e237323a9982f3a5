"""Four-bit rounding that knows its inputs against rounding that does not."""

import jax.numpy as jnp
import numpy as np

from convert.rounding import round_int4
from dsv32_jax.quant import quantize_weight

RNG = np.random.default_rng(0)
NOTHING = np.zeros((256, 256), np.float32)


def lost(x, weight, found):
    """Mean square error of products with rows x."""
    return np.square(x @ (np.asarray(found.dequantize()) - weight).T).mean()


def test_what_four_bits_can_say_stays_as_it_is():
    steps = RNG.integers(0, 16, (8, 256))
    steps[:, ::128], steps[:, 1::128] = 0, 15
    weight = np.repeat([[0.5, 0.25]], 128, 1).reshape(1, 256) * (steps - 7)
    x = RNG.standard_normal((64, 256)).astype(np.float32)
    for moments in (NOTHING, x.T @ x):
        found = round_int4(jnp.asarray(weight), jnp.asarray(moments))
        np.testing.assert_allclose(found.dequantize(), weight, atol=1e-6)


def test_the_range_is_the_best_and_not_the_widest():
    weight = RNG.standard_t(3, (16, 256)).astype(np.float32)
    found, nearest = round_int4(weight, NOTHING), quantize_weight(weight, "int4")
    assert lost(np.eye(256), weight, found) < 0.95 * lost(np.eye(256), weight, nearest)


def test_errors_make_each_other_good_where_inputs_go_together():
    weight = RNG.standard_normal((32, 256)).astype(np.float32)
    x = (RNG.standard_normal((2000, 24)) @ RNG.standard_normal((24, 256))).astype(np.float32)
    x += 0.1 * RNG.standard_normal(x.shape).astype(np.float32)
    found, blind = round_int4(weight, x[:1000].T @ x[:1000]), round_int4(weight, NOTHING)
    assert lost(x[1000:], weight, found) < 0.2 * lost(x[1000:], weight, blind)


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
