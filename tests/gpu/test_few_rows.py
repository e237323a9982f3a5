"""Products with few rows on a GPU: the kernels against NumPy, with NaN wherever nothing may be read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.matmul import FP8_BLOCK, few_rows
from pallas_kernels.matmul.config import CONFIGS
from tests.kernels.cases import few_rows as cases


def poisoned(case, dtype, config=None):
    """The kernel's result, in memory that very likely held NaN."""
    (rows, depth), tiles = case.x.shape, None if case.tile_expert is None else len(case.tile_expert)
    config = config or cases.tuned(FP8_BLOCK, rows, case.values.shape[-2], depth, tiles)
    call = jax.jit(functools.partial(few_rows.matmul, stage=FP8_BLOCK.few_rows, dtype=dtype, config=config))
    arguments = jax.block_until_ready(list(map(jnp.asarray, case.arguments)))
    shape = (case.x.shape[0], case.values.shape[-2])
    poison = jax.block_until_ready([jnp.full(shape, jnp.nan, dtype) for _ in range(3)])
    del poison
    return np.asarray(call(*arguments)[: case.written])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", cases.real(), ids=lambda case: case.name)
def test_kernel(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("config", CONFIGS["few_rows"], ids=repr)
def test_every_config(config):
    for case in cases.uneven(config.tile):
        check(case, jnp.float32, config)


@pytest.mark.parametrize("config", cases.token_parts(), ids=repr)
def test_token_parts(config):
    for case in cases.uneven(config.tile):
        check(case, jnp.float32, config)


def check(case, dtype, config=None):
    got = poisoned(case, dtype, config)
    np.testing.assert_array_equal(got, poisoned(case, dtype, config), err_msg="from run to run")
    expected = cases.expected(case, np.float32).astype(np.float64)
    error = got.astype(np.float64) - expected
    assert np.isfinite(got.astype(np.float32)).all()
    if not error.size:
        return
    rms = np.sqrt((expected**2).mean())
    # The products' own accumulator keeps fewer bits than float32: 1e-3 is above that, and below bfloat16's rounding.
    assert np.sqrt((error**2).mean()) <= (1e-3 if dtype == jnp.float32 else 3e-3) * rms
    assert np.abs(error).max() <= 1e-2 * np.abs(expected).max()
