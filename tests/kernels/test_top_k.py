"""Exact top-k: the k best by value, then by lowest position; never a masked one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.top_k import mosaic_gpu, top_k
from pallas_kernels.top_k.config import CONFIGS, MANY_ROWS, choose_config
from tests.kernels.cases import top_k as cases

# Few distinct values make ties the rule, and the special values meet one another.
score = st.sampled_from([-np.inf, np.nan, -2.0, -0.0, 0.0, 1e-45, 1.0, 3.5, np.inf])


@settings(max_examples=60, deadline=None)
@given(row=st.lists(score, min_size=13, max_size=13), length=st.integers(0, 13), k=st.sampled_from([1, 4, 13, 20]))
def test_chosen_are_the_best_with_ties_to_the_lowest_position(row, length, k):
    case = cases.Case("", np.array([row], np.float32), np.array([length], np.int32))
    chosen = np.asarray(top_k(jnp.asarray(case.scores), k, lengths=jnp.asarray(case.lengths)))
    assert chosen.shape == (1, k) and chosen.dtype == np.int32
    assert cases.wrong_rows(case, k, chosen) == []


@pytest.mark.parametrize("k", [1, 64, 300, 700])
@pytest.mark.parametrize("case", cases.adversarial(600, 64, 128), ids=lambda case: case.name)
def test_reference_on_hard_rows(case, k):
    chosen = np.asarray(top_k(jnp.asarray(case.scores), k, lengths=jnp.asarray(case.lengths)))
    assert cases.wrong_rows(case, k, chosen) == []


def test_no_lengths_means_whole_rows():
    case = cases.adversarial(600, 64)[0]
    assert cases.wrong_rows(case, 64, np.asarray(top_k(jnp.asarray(case.scores), 64))) == []


def test_expectations_by_hand():
    scores = np.array([-0.0, np.nan, 0.0, np.inf, -np.inf, 1e-45, -1.0], np.float32)
    assert cases.expected(scores, 7, 4).tolist() == [0, 2, 3, 5]
    assert cases.expected(scores, 7, 2).tolist() == [3, 5]
    assert cases.expected(scores, 7, 6).tolist() == [0, 2, 3, 5, 6, -1]
    assert cases.expected(scores, 3, 1).tolist() == [0]
    case = cases.Case("", scores[None], np.array([7], np.int32))
    assert cases.wrong_rows(case, 2, np.array([[5, 3]])) == []
    for wrong in ([3, 0], [3, 3], [3, -1], [-1, 3]):
        assert cases.wrong_rows(case, 2, np.array([wrong])) == [0]
    assert cases.wrong_rows(case, 6, np.array([[0, 2, -1, 3, 5, 6]])) == [0]  # -1 comes last


@pytest.mark.parametrize("k", [0, -1])
def test_k_must_be_positive(k):
    with pytest.raises(ValueError, match="k >= 1"):
        top_k(jnp.zeros((1, 4)), k)


def test_a_length_for_each_row():
    with pytest.raises(ValueError, match="a length for each row"):
        top_k(jnp.zeros((2, 4)), 1, lengths=jnp.zeros(3, jnp.int32))


@pytest.mark.parametrize(
    ("shape", "dtype", "k", "message"),
    [
        ((2, 163841), jnp.float32, 4, r"scores of shape \(2, 163841\)"),
        ((2, 64), jnp.bfloat16, 4, "bfloat16"),
        ((64,), jnp.float32, 4, r"shape \(64,\)"),
        ((2, 4096), jnp.float32, 2049, "k=2049; it takes k up to 2048"),
    ],
)
def test_the_kernel_refuses_by_name(shape, dtype, k, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: top_k(x, k, backend="mosaic_gpu"), jax.ShapeDtypeStruct(shape, dtype))


# ---- the kernel ----


@pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda config: f"cluster {config.cluster}, {config.warpgroups} warpgroups"
)
@pytest.mark.parametrize("lengths", [False, True])
def test_configs_lower(config, lengths):
    def f(scores, *lengths):
        return mosaic_gpu.top_k(scores, 2048, lengths=lengths[0] if lengths else None, config=config)

    shapes = [jax.ShapeDtypeStruct((300, 65536), jnp.float32)]
    shapes += [jax.ShapeDtypeStruct((300,), jnp.int32)] if lengths else []
    assert "mosaic" in jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def test_chosen_configs_are_listed():
    for rows in (1, 16, 17, 33, 34, 66, 67, 132, 133, 300, 4096):
        for length in (64, 4096, 8192, 20000, 163840):
            config = choose_config(rows, length)
            assert config in CONFIGS
            assert config.cluster == 1 or config.cluster * config.chunk <= length


@pytest.mark.parametrize(
    "change",
    [{"per_thread": 6}, {"sample": 1000}, {"slack": 8}, {"capacity": 4096}, {"cluster": 3}, {"stages": 40}],
    ids=lambda change: next(iter(change)),
)
def test_impossible_configs_are_refused(change):
    with pytest.raises(ValueError):
        dataclasses.replace(MANY_ROWS, **change)


def test_no_rows():
    assert top_k(jnp.zeros((0, 300)), 4, backend="interpret").shape == (0, 4)


@pytest.mark.interpret
@pytest.mark.parametrize("case", cases.adversarial(2048, 70, 512)[1:], ids=lambda case: case.name)
def test_ring_rows_and_lengths_in_the_interpreter(case, capfd):
    """Several rows a CTA, rows of no, one and several chunks, and a last chunk that the array ends in."""
    scores = np.pad(case.scores, ((0, 0), (0, 200)), constant_values=np.nan)
    chosen = np.asarray(top_k(jnp.asarray(scores), 70, lengths=jnp.asarray(case.lengths), backend="interpret"))
    assert "RACE DETECTED" not in capfd.readouterr().out
    assert cases.wrong_rows(case, 70, chosen) == []


@pytest.mark.interpret
def test_whole_rows_that_do_not_fit_the_buffer(capfd):
    """Without lengths; more candidates than there is room for, so that the threshold rises."""
    scores = np.stack([row for name, row in cases.values(5000) if name in ("normal", "ascending", "four values")])
    case = cases.Case("", scores, np.full(3, 5000))
    chosen = np.asarray(top_k(jnp.asarray(scores), 300, backend="interpret"))
    assert "RACE DETECTED" not in capfd.readouterr().out
    assert cases.wrong_rows(case, 300, chosen) == []
