"""Every kernel once at the smallest shapes that it takes, against its reference: short enough for a sanitizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.experiments.bench import matmuls
from dsv32_jax.experiments.bench.run import module_of
from dsv32_jax.experiments.bench.shapes import SMALL
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


def outputs(shape, backend, runs=1):
    """What the op gives in each run, as NumPy arrays, FP8 as bytes; of a grouped product the rows that are defined."""
    case = module_of(shape).build(shape, backend)
    assert case.backend == backend
    rows = slice(matmuls.written_rows(shape) if shape.op == "grouped_matmul" else None)
    fp8 = jnp.float8_e4m3fn

    def once():
        return jax.tree.map(lambda x: np.asarray(x.view(jnp.uint8) if x.dtype == fp8 else x)[rows], case.run())

    return [once() for _ in range(runs)]


@pytest.mark.parametrize("shape", ALL, ids=[f"{shape.op}-{shape.name}" for shape in ALL])
def test_small(shape):
    found, again = outputs(shape, "mosaic_gpu", runs=2)
    jax.tree.map(np.testing.assert_array_equal, found, again)
    (expected,) = outputs(shape, "reference")
    match shape.op:
        case "sparse_mla":
            assert relative_error(found[0], expected[0]) <= 1e-2  # the reference is bfloat16 too
            assert relative_error(found[1], expected[1]) <= 1e-4
        case "indexer_logits":
            assert relative_error(found, expected) <= 1e-3
        case "top_k":
            assert overlap(found, expected) == 1
        case "index_select":
            assert overlap(found, expected) >= 0.98  # scores that are nearly equal may change places
        case "grouped_matmul" | "matmul":
            # The reference makes weights in bfloat16; int8 sums are exact.
            assert relative_error(found, expected) <= (1e-3 if shape.scheme == "int8" else 1e-2)
        case "quantize":
            check_quantized(shape, found, expected)
        case "moe_dispatch":
            check_dispatched(shape, found, expected)
        case "moe_layer":
            # Where the products differ in the last bit, some of what is quantised again goes to the other neighbour.
            assert relative_error(found, expected) <= 5e-2
        case _:
            raise AssertionError(f"{shape.op}: nothing is compared")


def check_quantized(shape, found, expected):
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def check_dispatched(shape, found, expected):
    """Plans and quantised rows bit for bit."""
    if shape.step == "plan":
        assert relative_error(found[0], expected[0]) <= 1e-6
        jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])
    elif shape.step == "combine":
        assert relative_error(found, expected) <= 1e-6
    else:
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_small_cache_write():
    """Its reference is not jitted: within one program XLA keeps numbers that should have been rounded to bfloat16."""
    (shape,) = SMALL["cache_write"]
    case = write_cases.case("small", write_cases.scattered(shape.tokens, 3), blocks=3)
    kernel = jax.jit(lambda *arguments: write_cases.run(case, "mosaic_gpu", arguments))
    write_cases.check_against_reference(case, *kernel(*map(jnp.asarray, case.arguments)))
