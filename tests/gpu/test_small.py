"""Every kernel once at the smallest shapes that it takes, against its reference: short enough for a sanitizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import cases
from pallas_kernels.shapes import SMALL
from tests.kernels.cases import cache_write as write_cases

ALL = [shape for op, shapes in SMALL.items() for shape in shapes if op != "cache_write"]


def relative_error(found, expected):
    """rms of the difference over rms of what is expected, where that is finite."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(found[~finite], expected[~finite])
    return np.sqrt(((found - expected)[finite] ** 2).mean() / (expected[finite] ** 2).mean())


def overlap(found, expected):
    """Smallest share of a row's expected positions that was found."""
    return min(
        len(set(a) & set(b)) / len(set(b))
        for a, b in zip(np.asarray(found).tolist(), np.asarray(expected).tolist(), strict=True)
    )


@pytest.mark.parametrize("shape", ALL, ids=[f"{shape.op}-{shape.name}" for shape in ALL])
def test_small(shape):
    case = cases.build(shape, "mosaic_gpu")
    assert case.backend == "mosaic_gpu"
    found = jax.tree.map(np.asarray, case.run())
    again = jax.tree.map(np.asarray, case.run())
    jax.tree.map(np.testing.assert_array_equal, found, again)
    expected = cases.build(shape, "reference").run()
    if shape.op == "sparse_mla":
        assert relative_error(found[0], expected[0].astype(jnp.float32)) <= 1e-2  # the reference is bfloat16 too
        assert relative_error(found[1], expected[1]) <= 1e-4
    elif shape.op == "indexer_logits":
        assert relative_error(found, expected) <= 1e-3
    elif shape.op == "top_k":
        assert overlap(found, expected) == 1
    else:
        assert shape.op == "index_select"
        assert overlap(found, expected) >= 0.98  # scores that are nearly equal may change places


def test_small_cache_write():
    """Its reference is not jitted: within one program XLA keeps numbers that should have been rounded to bfloat16."""
    (shape,) = SMALL["cache_write"]
    case = write_cases.case("small", write_cases.scattered(shape.tokens, 3), blocks=3)
    kernel = jax.jit(lambda *arguments: write_cases.run(case, "mosaic_gpu", arguments))
    write_cases.check_against_reference(case, *kernel(*map(jnp.asarray, case.arguments)))
