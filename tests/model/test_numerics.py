"""Products with weights of every scheme against those with the weights they stand for."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.model.numerics import Numerics
from pallas_kernels.matmul import SCHEMES, QTensor, concatenated, dense, quantize_weight
from pallas_kernels.matmul.reference import int8_matmul
from pallas_kernels.moe_dispatch import combine, make_plan

WEIGHTS_ALONE = Numerics(act_quant=False, scale_fmt="ue8m0", backend="reference")
ROWS_TOO = Numerics(act_quant=True, scale_fmt="ue8m0", backend="reference")
WIDTH, DEPTH, EXPERTS, CHOSEN = 128, 256, 4, 2
STEP = {"fp8_block": 2.0**-3, "int8": 1 / 127, "int4": 2 / 15}
"""A step of a value next to the largest, of the largest, at most."""


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


quantize_at_once = jax.jit(quantize_weight, static_argnums=1)


def stored(weight, scheme):
    return weight if scheme is None else quantize_at_once(weight, scheme)


def assert_near(got, expected, tolerance):
    error, size = (np.sqrt(np.mean(np.square(x))) for x in (np.asarray(got) - np.asarray(expected), expected))
    assert error <= tolerance * size, error / size


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_is_the_nearest_of_its_scheme(scheme):
    weight = normal(3, 65, DEPTH)
    found = quantize_weight(weight, scheme)
    assert found.shape == weight.shape and found.scheme.name == scheme
    error = np.abs(np.asarray(found.dequantize()) - np.asarray(weight))
    assert error.max() <= 0.51 * STEP[scheme] * np.abs(weight).max()
    assert np.unique(np.asarray(found.dequantize())[0, 0, :128]).size <= (16 if scheme == "int4" else 128)


def test_an_unknown_scheme_and_a_depth_that_does_not_fit():
    with pytest.raises(ValueError, match="'int3' is unknown; it is one of fp8_block, int8, int4"):
        quantize_weight(normal(2, 128), "int3")
    with pytest.raises(ValueError, match="scheme 'fp9' is unknown; it is one of fp8_block, int8, int4"):
        QTensor(jnp.ones((64, 128), jnp.int8), jnp.ones(64), "fp9")
    with pytest.raises(ValueError, match=r"int4 is in groups of 128.*\[2, 192\]"):
        quantize_weight(normal(2, 192), "int4")


@pytest.mark.parametrize("scheme", [*SCHEMES, None])
def test_weights_one_below_the_other(scheme):
    rows = (256, 128, 64)
    weights = [stored(normal(n, DEPTH, seed=seed), scheme) for seed, n in enumerate(rows)]
    expected = np.concatenate([dense(weight, jnp.float32) for weight in weights])
    np.testing.assert_array_equal(dense(concatenated(*weights), jnp.float32), expected)


def test_weights_that_cannot_be_one():
    assert concatenated(stored(normal(128, DEPTH), "int8"), stored(normal(128, DEPTH), "int4")) is None
    assert concatenated(stored(normal(128, DEPTH), None), stored(normal(128, DEPTH), "int8")) is None
    in_blocks = [stored(normal(rows, DEPTH), "fp8_block") for rows in (192, 128)]  # a block would have rows of both
    assert concatenated(*in_blocks) is None and concatenated(*in_blocks[::-1]) is not None


@pytest.mark.parametrize("scheme", [*SCHEMES, None])
def test_product(scheme):
    x, weight = normal(5, DEPTH, seed=1), stored(normal(WIDTH, DEPTH), scheme)
    exact = np.asarray(x, np.float64) @ np.asarray(dense(weight, jnp.float32), np.float64).T
    assert_near(WEIGHTS_ALONE.matmul(x, weight), exact, 1e-6)
    with_rows = ROWS_TOO.matmul(x, weight)
    assert_near(with_rows, exact, {"fp8_block": 0.04, "int8": 0.02}.get(scheme, 1e-6))
    if scheme == "int8":
        np.testing.assert_array_equal(with_rows, int8_matmul(x, weight.values, weight.scales))


def experts_of(x, weights, choices, shares):
    """Of each token its experts, one after the other, in float64."""
    x, *weights = (np.asarray(dense(w, jnp.float32), np.float64) for w in (x, *weights))
    out = np.zeros_like(x)
    for token, slot in np.ndindex(choices.shape):
        gate, up, down = (weight[choices[token, slot]] for weight in weights)
        a, b = x[token] @ gate.T, x[token] @ up.T
        out[token] += shares[token, slot] * ((a / (1 + np.exp(-a)) * b) @ down.T)
    return out


@pytest.mark.parametrize(
    "schemes", [*itertools.product(SCHEMES, repeat=1), ("int8", "int4", "fp8_block"), ("int4", None, "int8")]
)
def test_experts_of_any_schemes(schemes):
    gate, up, down = (schemes * 3)[:3]
    weights = (
        stored(normal(EXPERTS, WIDTH, DEPTH) / 16, gate),
        stored(normal(EXPERTS, WIDTH, DEPTH, seed=1) / 16, up),
        stored(normal(EXPERTS, DEPTH, WIDTH, seed=2) / 11, down),
    )
    rng, tokens = np.random.default_rng(3), 9
    choices = np.argsort(rng.random((tokens, EXPERTS)), -1)[:, :CHOSEN].astype(np.int32)
    x, shares = normal(tokens, DEPTH, seed=4), jnp.asarray(rng.random((tokens, CHOSEN)), jnp.float32)
    plan = make_plan(jnp.asarray(choices), jnp.ones(tokens, bool), EXPERTS, backend="reference")
    expected = experts_of(x, weights, choices, np.asarray(shares))
    for numerics, tolerance in ((WEIGHTS_ALONE, 1e-5), (ROWS_TOO, 0.06)):
        rows = jax.jit(numerics.experts)(x, *weights, plan)
        assert_near(combine(rows, shares, plan, backend="reference"), expected, tolerance)
