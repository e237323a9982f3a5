"""Products of many rows on a GPU: the kernel against float32 products of the same values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.matmul import FP8_BLOCK, PLAIN, QTensor, grouped_matmul, many_rows, matmul
from pallas_kernels.matmul import config as tuning
from tests.kernels.cases import many_rows_matmul as cases


@functools.partial(jax.jit, static_argnames="tile")
def reference(x, row_scales, weights, weight_scales, tile_expert, tile):
    """float32 [M, N], tile by tile."""

    def of_expert(expert, rows):
        weight = weights if tile_expert is None else weights[expert]
        if weight_scales is None:
            weight = weight.astype(jnp.float32)
        else:
            scales = weight_scales if tile_expert is None else weight_scales[expert]
            full = jnp.repeat(jnp.repeat(scales, cases.BLOCK, axis=0)[: weight.shape[0]], cases.BLOCK, axis=1)
            weight = weight.astype(jnp.float32) * full
        return jnp.matmul(rows, weight.T, precision="highest")

    rows = x.astype(jnp.float32)
    if row_scales is not None:
        rows = rows * jnp.repeat(row_scales.T, cases.BLOCK, axis=1)
    if tile_expert is None:
        return of_expert(None, rows)
    tiles = rows.reshape(-1, tile, rows.shape[1])
    return jax.lax.map(lambda item: of_expert(*item), (tile_expert, tiles)).reshape(len(rows), -1)


def poisoned(function, arguments, shape):
    """`function(*arguments)`, into memory that very likely holds NaN."""
    poison = jax.block_until_ready([jnp.full(shape, jnp.nan, jnp.bfloat16) for _ in range(3)])
    del poison
    return np.asarray(function(*arguments))


@pytest.mark.parametrize("case", cases.real(), ids=lambda case: case.name)
def test_kernel(case):
    arguments = [None if x is None else jnp.asarray(x) for x in case.arguments]
    shape = (case.x.shape[0], case.weights.shape[-2])
    tile = None if case.tile_expert is None else case.x.shape[0] // len(case.tile_expert)
    stage = (PLAIN if case.row_scales is None else FP8_BLOCK).many_rows
    function = jax.jit(functools.partial(many_rows.matmul, stage=stage, config=tuning.many_rows(*shape, tile)))
    got = poisoned(function, arguments, shape)
    np.testing.assert_array_equal(got, poisoned(function, arguments, shape), err_msg="from run to run")
    want = np.asarray(reference(*arguments, tile=tile), np.float64)
    error = got.astype(np.float64) - want
    # Tensor cores keep about 14 bits of a sum of FP8 products; bfloat16 rounds to 9 in the end.
    assert np.sqrt((error**2).mean() / (want**2).mean()) <= 3e-3
    assert np.abs(error).max() <= 1e-2 * np.abs(want).max()
    assert (got[(case.x == 0).all(axis=1)] == 0).all()


@pytest.mark.parametrize(("fp8", "tile"), [(True, 8), (True, 64), (True, 128), (False, 64), (False, 128)])
def test_grouped_ops(fp8, tile):
    """Rows of a plan through the public op; both backends quantise alike."""
    case = cases.case("op", tile * 12, 640, 1024, fp8=fp8, tile_expert=[i // 3 for i in range(12)])
    x = jax.random.normal(jax.random.key(tile), case.x.shape, jnp.bfloat16)
    weights = jnp.asarray(case.weights)
    weights = QTensor(weights, jnp.asarray(case.weight_scales)) if fp8 else weights

    def run(backend):
        call = jax.jit(functools.partial(grouped_matmul, used_tiles=jnp.int32(11), backend=backend))
        return np.asarray(call(x, weights, jnp.asarray(case.tile_expert)), np.float64)[: 11 * tile]

    got, want = run("mosaic_gpu"), run("reference")
    assert np.sqrt(((got - want) ** 2).mean() / (want**2).mean()) <= 3e-3


@pytest.mark.parametrize("shape", [(4096, 4096, 7168), (129, 576, 7168), (5, 1536, 640)], ids=str)
def test_dense_op(shape):
    rows, columns, depth = shape
    case = cases.case("op", rows, columns, depth, fp8=True)
    x = jax.random.normal(jax.random.key(rows), (rows, depth), jnp.bfloat16)
    weight = QTensor(jnp.asarray(case.weights), jnp.asarray(case.weight_scales))

    def run(backend):
        return np.asarray(jax.jit(functools.partial(matmul, backend=backend))(x, weight), np.float64)

    got, want = run("mosaic_gpu"), run("reference")
    assert np.sqrt(((got - want) ** 2).mean() / (want**2).mean()) <= 3e-3
