"""Products with int8 and four-bit weights on a GPU: the kernels against NumPy, NaN wherever nothing may be read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quant_matmul import (
    few_rows_int4,
    few_rows_int8,
    grouped_int4_matmul,
    grouped_int8_matmul,
    int4_matmul,
    int8_matmul,
    pack_int4,
)
from tests.kernels.cases import integer_matmul as cases

INT8, INT4 = cases.real(cases.int8), cases.real(cases.int4)


def plan_of(case):
    return () if case.plan is None else (jnp.asarray(case.plan.tile_expert), jnp.int32(case.plan.used))


def poisoned(kernel, case, dtype, *arrays):
    """The rows that the kernel writes, in memory that very likely held NaN; the same twice."""
    function = kernel.matmul if case.plan is None else kernel.grouped_matmul
    call = jax.jit(functools.partial(function, dtype=dtype))
    arrays = jax.block_until_ready([*arrays, *plan_of(case)])

    def run():
        shape = (len(case.x), case.weight[0].shape[-2])
        poison = jax.block_until_ready([jnp.full(shape, jnp.nan, dtype) for _ in range(3)])
        del poison
        return np.asarray(call(*arrays)[: case.written])

    got = run()
    np.testing.assert_array_equal(got, run(), err_msg="from run to run")
    return got


@pytest.mark.parametrize("case", INT8, ids=lambda case: case.name)
def test_int8_kernel_is_exact(case):
    arrays = map(jnp.asarray, (case.x, case.x_scales, *case.weight))
    got = poisoned(few_rows_int8, case, jnp.float32, *arrays)
    np.testing.assert_array_equal(got, cases.expected_int8(case))


@pytest.mark.parametrize("case", INT4, ids=lambda case: case.name)
def test_int4_kernel(case):
    got = poisoned(few_rows_int4, case, jnp.float32, jnp.asarray(case.x), *pack_int4(*map(jnp.asarray, case.weight)))
    expected = cases.expected_int4(case, np.float32).astype(np.float64)
    assert got.shape == expected.shape
    if not got.size:
        return
    assert np.sqrt(((got - expected) ** 2).mean()) <= 1e-4 * np.sqrt((expected**2).mean())
    assert np.abs(got - expected).max() <= 1e-3 * np.abs(expected).max()


def both(op, *arrays, **options):
    """In bfloat16, of the kernel and, after it, of the reference."""
    kernel, reference = (functools.partial(op, backend=name, **options) for name in ("mosaic_gpu", "reference"))
    got = np.asarray(jax.jit(kernel)(*arrays))
    expected = np.asarray(jax.jit(reference)(*arrays))
    assert got.dtype == expected.dtype == jnp.bfloat16
    return got.astype(np.float64), expected.astype(np.float64)


def close(got, expected):
    """To the bfloat16 weights of the reference."""
    assert np.sqrt(((got - expected) ** 2).mean()) <= 4e-3 * np.sqrt((expected**2).mean())


@pytest.mark.parametrize("rows", [1, 20, 128])
def test_ops(rows):
    x = jnp.asarray(np.random.default_rng(rows).standard_normal((rows, 1536)), jnp.bfloat16)
    np.testing.assert_array_equal(*both(int8_matmul, x, *map(jnp.asarray, cases.int8("", 1, 576, 1536).weight)))
    close(*both(int4_matmul, x, *pack_int4(*map(jnp.asarray, cases.int4("", 1, 576, 1536).weight))))


@pytest.mark.parametrize("tile", [8, 32, 128])
def test_grouped_ops(tile):
    plan = cases.Plan({0: 1, 2: 2 * tile, 3: tile - 1}, 4, tile)
    x = jnp.asarray(np.random.default_rng(tile).standard_normal((len(plan.filled), 1024)), jnp.bfloat16)
    int8, int4 = cases.int8("", plan, 192, 1024), cases.int4("", plan, 192, 1024)
    experts, used = plan_of(int8)
    written = int8.written
    got, expected = both(grouped_int8_matmul, x, *map(jnp.asarray, int8.weight), experts, used_tiles=used)
    np.testing.assert_array_equal(got[:written], expected[:written])
    got, expected = both(grouped_int4_matmul, x, *pack_int4(*map(jnp.asarray, int4.weight)), experts, used_tiles=used)
    close(got[:written], expected[:written])


@pytest.mark.parametrize("rows", [129, 1000])
def test_int8_product_of_many_rows_is_exact(rows):
    """XLA's own, beside the kernel: of the same rows, the same bits."""
    x = jnp.asarray(np.random.default_rng(rows).standard_normal((rows, 1536)), jnp.bfloat16)
    weight = list(map(jnp.asarray, cases.int8("", 1, 576, 1536).weight))
    few = jax.jit(functools.partial(int8_matmul, backend="mosaic_gpu"))(x[:100], *weight)
    np.testing.assert_array_equal(np.asarray(jax.jit(int8_matmul)(x, *weight))[:100], np.asarray(few))
