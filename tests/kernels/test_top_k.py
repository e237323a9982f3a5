"""Exact top-k: the k best by value, then by lowest position; never a masked one."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.top_k import top_k

# Few distinct values make ties the rule, and the special values meet one another.
score = st.sampled_from([-np.inf, np.nan, -2.0, -0.0, 0.0, 1e-45, 1.0, 3.5, np.inf])


def expected(row: np.ndarray, k: int) -> set[int]:
    usable = [(-value, position) for position, value in enumerate(row) if value > -np.inf]  # false for NaN
    return {position for _, position in sorted(usable)[:k]}


@settings(max_examples=60, deadline=None)
@given(row=st.lists(score, min_size=13, max_size=13), k=st.sampled_from([1, 4, 13, 20]))
def test_chosen_are_the_best_with_ties_to_the_lowest_position(row, k):
    row = np.array(row, np.float32)
    row[np.abs(row) == np.float32(1e-45)] = 1e-30  # denormals may be flushed by the hardware
    chosen = np.asarray(top_k(jnp.asarray(row)[None], k))[0]
    assert chosen.shape == (k,) and chosen.dtype == np.int32
    present = chosen[chosen >= 0]
    assert len(set(present.tolist())) == len(present)
    assert set(present.tolist()) == expected(row, k)


def test_equal_scores_go_to_the_first_positions():
    assert sorted(np.asarray(top_k(jnp.zeros((1, 100)), 7))[0].tolist()) == list(range(7))


def test_minus_zero_equals_zero():
    assert sorted(np.asarray(top_k(jnp.array([[-0.0, 0.0, -0.0, 0.0]]), 2))[0].tolist()) == [0, 1]


def test_more_than_there_are_gives_minus_one():
    chosen = np.asarray(top_k(jnp.array([[1.0, -np.inf, 2.0], [-np.inf] * 3]), 5))
    assert sorted(chosen[0].tolist()) == [-1, -1, -1, 0, 2]
    assert (chosen[1] == -1).all()


@pytest.mark.parametrize("k", [0, -1])
def test_k_must_be_positive(k):
    with pytest.raises(ValueError, match="k >= 1"):
        top_k(jnp.zeros((1, 4)), k)
