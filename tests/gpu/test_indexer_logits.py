"""The indexer's scores on a GPU: the kernel against the reference in float32, with NaN wherever nothing may be read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.indexer_logits import indexer_logits, mosaic_gpu
from tests.kernels.cases import indexer_logits as cases


def poisoned(function, case):
    """`function` of the case's arguments, into memory that very likely holds NaN."""
    arguments = jax.block_until_ready(list(map(jnp.asarray, case.arguments)))
    poison = jax.block_until_ready([jnp.full(case.visible.shape, jnp.nan, jnp.float32) for _ in range(3)])
    del poison
    return np.asarray(function(*arguments))


def check(scores, case):
    """Errors of the scores that a token sees, as parts of the largest and of the root mean square."""
    visible = case.visible
    expected = np.asarray(indexer_logits(*map(jnp.asarray, case.arguments), backend="reference"))
    error, values = scores[visible].astype(np.float64) - expected[visible], expected[visible].astype(np.float64)
    assert np.isfinite(scores[visible]).all()
    assert np.abs(error).max() <= 1e-3 * np.abs(values).max()
    assert np.sqrt((error**2).mean() / (values**2).mean()) <= 1e-3


@pytest.mark.parametrize("case", cases.real(), ids=lambda case: case.name)
def test_kernel(case):
    op = jax.jit(lambda *arguments: indexer_logits(*arguments, backend="mosaic_gpu"))
    scores = poisoned(op, case)
    np.testing.assert_array_equal(scores == -np.inf, ~case.visible)
    np.testing.assert_array_equal(scores, poisoned(op, case), err_msg="from run to run")
    check(scores, case)


@pytest.mark.parametrize("name", ["mixture", "decode with padding"])
def test_without_fill(name):
    (case,) = (case for case in cases.real() if case.name == name)
    scores = poisoned(jax.jit(lambda *arguments: mosaic_gpu.indexer_logits(*arguments, fill=False)), case)
    written = np.arange(scores.shape[1]) < (case.positions[:, None] + 64) // 64 * 64
    assert (scores[written & ~case.visible] == -np.inf).all()
    check(scores, case)


def test_auto_takes_the_kernel():
    case = cases.real()[-1]
    arguments = list(map(jnp.asarray, case.arguments))
    chosen = indexer_logits(*arguments)
    np.testing.assert_array_equal(chosen, indexer_logits(*arguments, backend="mosaic_gpu"))
