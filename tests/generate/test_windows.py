"""Texts of any length in windows."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv32_jax.errors import UserError
from dsv32_jax.generate.loading import load
from dsv32_jax.generate.windows import check_windows, score_windows, windows_of
from tests.harness import one_shape

BOS = 0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.booleans(), st.integers(2, 12), st.data())
def test_every_token_is_new_once_with_enough_before_it(count, has_bos, window, data):
    stride = data.draw(st.integers(1, window - 1))
    ids = [BOS] * has_bos + list(range(1, count + 1))
    windows = windows_of(ids, window, stride, BOS)
    assert [id for stretch, new in windows for id in stretch[len(stretch) - new :]] == ids[1:]
    for number, (stretch, new) in enumerate(windows):
        assert len(stretch) <= window and (stretch[0] == BOS) == has_bos
        assert number == 0 or len(stretch) - new >= window - stride
    if len(ids) <= window:
        assert windows == [(ids, len(ids) - 1)]


@pytest.mark.parametrize("wrong", [(1, None), (None, 0), (8, 8), (8, 9)])
def test_lengths_that_would_leave_tokens_out_are_refused(wrong):
    with pytest.raises(UserError, match=r"--window|--stride"):
        check_windows(*wrong)


def test_scores_are_those_of_the_windows_and_exact_where_the_text_fits(tiny):
    with one_shape():
        m = load(tiny, compute_dtype="float32", act_quant=False)
        ids = np.random.default_rng(0).integers(3, 500, 90).tolist()
        whole, windows = m.score([ids]), windows_of(ids, 90, 40)
        np.testing.assert_array_equal(score_windows(m, ids, windows).log_likelihoods, whole.log_likelihoods)

        out = np.zeros((1, 90, m.config.vocab_size), np.float32)
        score = score_windows(m, ids, windows_of(ids, 50, 20), out)
        parts = [m.score([ids[:50]]), m.score([ids[20:70]]), m.score([ids[40:90]])]
        expected = np.concatenate(
            [part.log_likelihoods[0, start:] for part, start in zip(parts, (0, 29, 29), strict=True)]
        )
        np.testing.assert_array_equal(score.log_likelihoods[0], expected)
        assert score.tokens == 89
        assert score.perplexity == pytest.approx(math.exp(-expected.mean()))
        shifted = out[0] - np.log(np.exp(out[0]).sum(-1, keepdims=True))
        np.testing.assert_allclose(shifted[np.arange(89), ids[1:]], expected, atol=1e-4)
