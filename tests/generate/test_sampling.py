"""Sampling against NumPy's account of the distribution."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.generate.sampling import NOT_FINITE, row_keys, sample


def keys(rows, seed=0, position=0):
    return row_keys(seed, jnp.arange(rows), jnp.full(rows, position))


def draw(logits, count, temperature=1.0, top_p=1.0):
    """`count` draws from one row of logits."""
    rows = np.broadcast_to(np.asarray(logits, np.float32), (count, len(logits)))
    return np.asarray(sample(rows, keys(count), temperature, top_p, nucleus=top_p < 1))


def nucleus(probabilities, top_p):
    """The shortest run by falling probability, ties by id, that reaches top_p."""
    chosen, total = set(), 0.0
    for token in sorted(range(len(probabilities)), key=lambda token: (-probabilities[token], token)):
        if chosen and total >= top_p:
            break
        chosen.add(token)
        total += probabilities[token]
    return chosen


def test_greedy_takes_the_lowest_of_equal_logits():
    logits = np.array([[0, 3, 3, 1], [5, 5, 5, 5], [-1, -2, -3, -0.5]], np.float32)
    assert sample(logits, keys(3), 0.0, 1.0).tolist() == [1, 0, 3]


def test_frequencies_follow_the_tempered_softmax():
    logits = np.array([2.0, 1.0, 0.0, -1.0])
    drawn = draw(logits, 20000, temperature=0.7)
    expected = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 20000, expected, atol=0.015)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-37])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_the_smallest_temperatures_are_greedy(temperature, top_p):
    """Logits over such a temperature are infinite in float32."""
    logits = 40 + 10 * np.random.default_rng(0).normal(size=64)
    assert set(draw(logits, 50, temperature, top_p).tolist()) == {logits.argmax()}


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.5, 0.74, 0.76, 0.9, 0.999, 1.0])
def test_nucleus_is_exact(top_p):
    probabilities = np.array([0.02, 0.25, 0.25, 0.06, 0.25, 0.17])
    drawn = draw(np.log(probabilities), 4000, top_p=top_p)
    assert set(drawn.tolist()) == nucleus(probabilities, top_p)


def test_top_p_one_keeps_every_token():
    # In float32 the sum of these reaches 1 long before the last token.
    logits = np.concatenate([[20.0], np.zeros(5000)])
    rows = np.broadcast_to(logits.astype(np.float32), (1000, 5001))
    greatest = [sample(rows, keys(1000), 40.0, 1.0, nucleus=nucleus).max() for nucleus in (True, False)]
    assert greatest[0] == greatest[1] > 4900


def test_a_row_does_not_depend_on_its_neighbours():
    logits = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    together = sample(logits, keys(5), 1.0, 0.9)
    other = logits.copy()
    other[:4] = -other[:4]
    assert sample(other, keys(5), 1.0, 0.9)[4] == together[4]
    alone = sample(logits[4:], row_keys(0, jnp.array([4]), jnp.array([0])), 1.0, 0.9)
    assert alone[0] == together[4]


def test_greedy_and_drawn_rows_mix():
    logits = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    mixed = sample(logits, keys(3), np.array([0.0, 1.0, 0.0]), np.array([1.0, 0.5, 1.0]))
    assert mixed[0] == logits[0].argmax() and mixed[2] == logits[2].argmax()
    assert mixed[1] == sample(logits, keys(3), 1.0, 0.5)[1]


def test_greedy_may_be_told():
    logits = np.random.default_rng(2).normal(size=(3, 64)).astype(np.float32)
    np.testing.assert_array_equal(sample(logits, keys(3), 0.0, 1.0, greedy=True), sample(logits, keys(3), 0.0, 1.0))


def test_seed_row_and_position_each_change_the_draw():
    logits = np.zeros((1, 100000), np.float32)
    draws = [
        int(sample(logits, row_keys(seed, jnp.array([row]), jnp.array([position])), 1.0, 1.0)[0])
        for seed, row, position in [(0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 4


@pytest.mark.parametrize("greedy", [False, True])
def test_nothing_is_drawn_from_logits_that_are_not_finite(greedy):
    """A NaN anywhere, an infinite logit, or none above -infinity; neighbours and masked tokens stay as they are."""
    logits = np.zeros((64, 512), np.float32)  # XLA's maximum loses a NaN in arrays of this size
    logits[0, 3] = np.nan
    logits[1, 3] = np.inf
    logits[2] = -np.inf
    logits[3] = -np.inf
    logits[3, 7] = 0
    for temperature in (0.0, 1.0):
        drawn = np.asarray(sample(logits, None if greedy else keys(64), temperature, 0.9, greedy=greedy))
        assert drawn[:4].tolist() == [NOT_FINITE] * 3 + [7] and (drawn[4:] >= 0).all()
