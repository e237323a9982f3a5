"""Products with int8 and four-bit weights on a GPU: the kernels against NumPy, NaN wherever nothing may be read.

XLA's own int8 product is no reference: without autotuning (`--xla_gpu_autotune_level=0`) it is wrong.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.matmul import INT4, INT8, QTensor, few_rows, grouped_matmul, many_rows, matmul, pack_int4
from pallas_kernels.matmul import config as tuning
from pallas_kernels.quantize import quantize_int8
from tests.kernels.cases import few_rows as few_rows_cases
from tests.kernels.cases import integer_matmul as cases

INT8_CASES, INT4_CASES = cases.real(cases.int8), cases.real(cases.int4)
VARIANTS = {
    "as tuned": None,
    "by columns": tuning.MANY_ROWS,
    "short tiles": tuning.MANY_ROWS_SHORT_TILES,
    "by rows": tuning.MANY_ROWS_INT8,
}


def plan_of(case):
    return () if case.plan is None else (jnp.asarray(case.plan.tile_expert), jnp.int32(case.plan.used))


def weight_of(case):
    """As the ops take it."""
    if len(case.weight) == 3:
        return QTensor(*pack_int4(*map(jnp.asarray, case.weight)), INT4)
    return QTensor(*map(jnp.asarray, case.weight), INT8)


def poisoned(scheme, case, x_scales, config=None):
    """`written` by the kernel of few rows."""
    (rows, depth), tiles = case.x.shape, None if case.plan is None else len(case.plan.tile_expert)
    config = config or few_rows_cases.tuned(scheme, rows, case.weight[0].shape[-2], depth, tiles)
    weight = weight_of(case)

    def product(x, values, scales, *plan):
        options = {"stage": scheme.few_rows, "dtype": jnp.float32, "config": config}
        return few_rows.matmul(x, x_scales, values, scales, *plan, **options)

    return written(product, case, jnp.float32, jnp.asarray(case.x), weight.values, weight.scales)


def written(function, case, dtype, *arrays):
    """The rows that the kernel writes, in memory that very likely held NaN; the same twice."""
    call = jax.jit(function)
    arrays = jax.block_until_ready([*arrays, *plan_of(case)])

    def run():
        shape = (len(case.x), case.weight[0].shape[-2])
        poison = jax.block_until_ready([jnp.full(shape, jnp.nan, dtype) for _ in range(3)])
        del poison
        return np.asarray(call(*arrays)[: case.written])

    got = run()
    np.testing.assert_array_equal(got, run(), err_msg="from run to run")
    return got


@pytest.mark.parametrize("case", INT8_CASES, ids=lambda case: case.name)
def test_int8_kernel_is_exact(case):
    check_int8(case)


@pytest.mark.parametrize("config", tuning.CONFIGS["few_rows"], ids=repr)
def test_every_int8_config_is_exact(config):
    for case in cases.uneven(cases.int8, config.tile):
        check_int8(case, config)


@pytest.mark.parametrize("config", few_rows_cases.token_parts(), ids=repr)
def test_token_parts_of_int8_are_exact(config):
    for case in cases.uneven(cases.int8, config.tile):
        check_int8(case, config)


def check_int8(case, config=None):
    got = poisoned(INT8, case, jnp.asarray(case.x_scales), config)
    np.testing.assert_array_equal(got, cases.expected_int8(case))


def many_rows_config(case):
    tile = None if case.plan is None else case.plan.tile
    return tuning.many_rows(len(case.x), case.weight[0].shape[-2], tile, by_rows=True)


def many_rows_product(config):
    return functools.partial(many_rows.matmul, stage=INT8.many_rows, config=config)


@pytest.mark.parametrize("case", cases.many_real(), ids=lambda case: case.name)
@pytest.mark.parametrize("variant", VARIANTS)
def test_int8_kernel_of_many_rows_is_exact(case, variant):
    config = VARIANTS[variant] or many_rows_config(case)
    if case.plan is not None and case.plan.tile % config.rows:
        pytest.skip("these are no whole tiles of the config")
    arrays = map(jnp.asarray, (case.x, case.x_scales, *case.weight))
    got = written(many_rows_product(config), case, jnp.bfloat16, *arrays)
    np.testing.assert_array_equal(got, cases.expected_int8(case).astype(ml_dtypes.bfloat16))


def test_int8_kernel_of_8192_rows_is_exact():
    """Rows of all tiles, against NumPy in parts."""
    size, chosen = 8192, np.arange(3, 8192, 257)
    rng = np.random.default_rng(0)
    x, values = (rng.integers(-127, 128, (size, size), np.int8) for _ in range(2))
    x_scales, scales = (rng.uniform(0.001, 0.01, size).astype(np.float32) for _ in range(2))
    case = cases.Case("", x, (values, scales), None, x_scales)
    product = many_rows_product(many_rows_config(case))
    got = written(product, case, jnp.bfloat16, *map(jnp.asarray, (x, x_scales, values, scales)))[chosen]
    for i in range(0, size, 1024):
        part = slice(i, i + 1024)
        few = cases.Case("", x[chosen], (values[part], scales[part]), None, x_scales[chosen])
        np.testing.assert_array_equal(got[:, part], cases.expected_int8(few).astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("case", INT4_CASES, ids=lambda case: case.name)
def test_int4_kernel(case):
    check_int4(case)


@pytest.mark.parametrize("config", tuning.CONFIGS["few_rows_int4"], ids=repr)
def test_every_int4_config(config):
    for case in cases.uneven(cases.int4, config.tile):
        check_int4(case, config)


def check_int4(case, config=None):
    got = poisoned(INT4, case, None, config)
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


def exactly(op, x, case, backend):
    """The int8 op in bfloat16 and what NumPy makes of the rows that `backend` quantises; tiles in use."""
    experts = plan_of(case)
    options = {"used_tiles": experts[1]} if experts else {}
    call = jax.jit(functools.partial(op, backend="mosaic_gpu", **options))
    got = np.asarray(call(x, weight_of(case), *experts[:1]))[: case.written]
    quantised, x_scales = map(np.asarray, jax.jit(functools.partial(quantize_int8, backend=backend))(x))
    expected = cases.expected_int8(cases.Case("", quantised, case.weight, case.plan, x_scales))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, expected.astype(ml_dtypes.bfloat16))


def close(got, expected):
    """To the bfloat16 weights of the reference."""
    assert np.sqrt(((got - expected) ** 2).mean()) <= 4e-3 * np.sqrt((expected**2).mean())


@pytest.mark.parametrize("rows", [1, 20, 128])
def test_ops(rows):
    x = jnp.asarray(np.random.default_rng(rows).standard_normal((rows, 1536)), jnp.bfloat16)
    exactly(matmul, x, cases.int8("", rows, 576, 1536), "auto")
    close(*both(matmul, x, weight_of(cases.int4("", 1, 576, 1536))))


@pytest.mark.parametrize("tile", [8, 32, 128])
def test_grouped_ops(tile):
    plan = cases.Plan({0: 1, 2: 2 * tile, 3: tile - 1}, 4, tile)
    x = jnp.asarray(np.random.default_rng(tile).standard_normal((len(plan.filled), 1024)), jnp.bfloat16)
    int8, int4 = cases.int8("", plan, 192, 1024), cases.int4("", plan, 192, 1024)
    experts, used = plan_of(int8)
    exactly(grouped_matmul, x, int8, "mosaic_gpu" if tile >= 128 else "auto")
    got, expected = both(grouped_matmul, x, weight_of(int4), experts, used_tiles=used)
    close(got[: int8.written], expected[: int8.written])


@pytest.mark.parametrize(("rows", "depth"), [(129, 1536), (1000, 1536), (100, 640)])
def test_int8_op_of_many_rows(rows, depth):
    """Also few, with a K that the kernel of few rows does not take."""
    x = jnp.asarray(np.random.default_rng(rows).standard_normal((rows, depth)), jnp.bfloat16)
    exactly(matmul, x, cases.int8("", rows, 576, depth), "mosaic_gpu")
