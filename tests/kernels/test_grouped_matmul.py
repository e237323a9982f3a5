"""Products of rows sorted by expert: the ops, and their kernels through them in the interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.backend import BackendError
from pallas_kernels.matmul import QTensor, grouped_matmul, many_rows
from pallas_kernels.quantize import dequantize, quantize
from tests.kernels.cases import many_rows_matmul as cases

EXPERTS = [0, 2, 2]
jitted_quantize = jax.jit(quantize)


def arguments(tile: int, depth: int, fp8: bool):
    """Rows, weights (and their scales), and experts of the tiles."""
    case = cases.case("grouped", tile * len(EXPERTS), 64, depth, fp8=fp8, tile_expert=EXPERTS)
    x = jnp.asarray(np.random.default_rng(1).standard_normal(case.x.shape), jnp.bfloat16)
    weights = [jnp.asarray(case.weights), *([jnp.asarray(case.weight_scales)] if fp8 else [])]
    return x, *weights, jnp.asarray(case.tile_expert)


def op(fp8: bool, **options):
    if fp8:
        return lambda x, values, scales, experts: grouped_matmul(x, QTensor(values, scales), experts, **options)
    return lambda *arrays: grouped_matmul(*arrays, **options)


@functools.cache
def interpreted(tile: int, depth: int, fp8: bool) -> np.ndarray:
    """What the kernel gives for `arguments`; the interpreter takes seconds."""
    return np.asarray(op(fp8, backend="interpret")(*arguments(tile, depth, fp8)))


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("tile", [8, 64])
def test_reference(fp8, tile):
    x, *weights, experts = arguments(tile, 256, fp8)
    rows, scales = (np.asarray(y) for y in jitted_quantize(x)) if fp8 else (np.asarray(x), None)
    case = cases.Case(
        "grouped",
        rows,
        None if scales is None else scales.T,
        *map(np.asarray, weights),
        *([] if fp8 else [None]),
        experts,
    )
    want = cases.expected(case)
    got = np.asarray(jax.jit(op(fp8))(x, *weights, experts), np.float64)
    np.testing.assert_allclose(got, want, rtol=2**-8, atol=1e-5 * np.abs(want).max())
    if fp8:
        plain = jax.jit(op(True, quantize_input=False))(x, *weights, experts)
        assert np.abs(np.asarray(plain, np.float64) - want).max() > 1e-3 * np.abs(want).max()
        assert np.abs(np.asarray(jax.jit(lambda x: dequantize(*quantize(x)) - x)(x))).max() > 0


@pytest.mark.interpret
@pytest.mark.parametrize(("fp8", "tile", "depth"), [(True, 8, 512), (True, 64, 128), (True, 128, 128), (False, 64, 64)])
def test_kernel(fp8, tile, depth, capfd):
    arrays = arguments(tile, depth, fp8)
    want = np.asarray(jax.jit(op(fp8, backend="reference"))(*arrays), np.float64)
    got = interpreted(tile, depth, fp8).astype(np.float64)
    np.testing.assert_allclose(got, want, rtol=2**-7, atol=1e-5 * np.abs(want).max())
    used = np.asarray(op(fp8, backend="interpret", used_tiles=jnp.int32(2))(*arrays), np.float64)
    np.testing.assert_array_equal(used[: 2 * tile], got[: 2 * tile])
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.interpret
@pytest.mark.parametrize(("tile", "depth"), [(8, 512), (64, 128)])
@pytest.mark.parametrize("by_group", [True, False])
def test_rows_that_are_quantised_already(tile, depth, by_group, capfd):
    x, *others = arguments(tile, depth, True)
    want = jax.jit(op(True, backend="reference"))(x, *others)
    rows, scales = jitted_quantize(x)
    given = {"row_scales": scales.T if by_group else scales, "scales_by_group": by_group}
    found = jax.jit(lambda *arrays: op(True, backend="reference", **given)(*arrays))(rows, *others)
    np.testing.assert_array_equal(found, want)
    got = op(True, backend="interpret", **given)(rows, *others)
    np.testing.assert_array_equal(got, interpreted(tile, depth, True))
    assert got.dtype == jnp.bfloat16 and "RACE DETECTED" not in capfd.readouterr().out


def test_row_scales_that_do_not_fit():
    x, *others = arguments(8, 512, True)
    rows, scales = jitted_quantize(x)
    with pytest.raises(ValueError, match=r"must be \(4, 24\)"):
        op(True, row_scales=scales, scales_by_group=True)(rows, *others)
    with pytest.raises(ValueError, match="come with row_scales"):
        op(True)(rows, *others)
    with pytest.raises(ValueError, match="others without"):
        op(True, row_scales=scales)(x, *others)


@pytest.mark.parametrize("fp8", [True, False])
def test_gradient_is_that_of_the_reference(fp8, monkeypatch):
    """With a kernel that cannot run here: only its gradient is asked for. Behind FP8 activations there is none."""
    x, *others = arguments(64, 128, fp8)
    shape = (x.shape[0], 64)
    monkeypatch.setattr(many_rows, "matmul", lambda *_, **__: jnp.zeros(shape, jnp.bfloat16))

    def gradient(backend):
        return jax.jit(jax.grad(lambda x: op(fp8, backend=backend)(x, *others).astype(jnp.float32).sum()))(x)

    if fp8:
        for backend in ("reference", "mosaic_gpu"):
            with pytest.raises(NotImplementedError, match="rounding activations has no gradient"):
                gradient(backend)
        return
    assert np.abs(np.asarray(gradient("reference"), np.float32)).max() > 0
    np.testing.assert_array_equal(gradient("mosaic_gpu"), gradient("reference"))


@pytest.mark.parametrize(
    ("fp8", "tile", "depth", "message"),
    [
        (True, 24, 512, "tiles of 24 rows"),
        (True, 8, 128, "K in multiples of 512"),
        (False, 32, 128, "tiles of 32 rows; it takes multiples of 64"),
        (False, 64, 32, "K of 64"),
    ],
)
def test_what_the_kernels_do_not_take(fp8, tile, depth, message):
    with pytest.raises(BackendError, match=message):
        op(fp8, backend="mosaic_gpu")(*arguments(tile, depth, fp8))


def test_what_no_backend_takes():
    x, values, scales, experts = arguments(8, 128, True)
    with pytest.raises(ValueError, match=r"scales of float32 \(4, 1, 1\), not of \(3, 1, 1\)"):
        op(True)(x, values, scales[:3], experts)
    with pytest.raises(ValueError, match="as many rows in each tile"):
        op(True)(x[:-1], values, scales, experts)
    with pytest.raises(BackendError, match="quantize_input=True"):
        op(True, quantize_input=False, backend="mosaic_gpu")(x, values, scales, experts)
