"""Gate and up as one product with SwiGLU behind it, on a GPU: the kernels against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.matmul import (
    FP8_BLOCK,
    PLAIN,
    Product,
    QTensor,
    choose,
    grouped_swiglu,
    many_rows_swiglu,
    swiglu,
)
from pallas_kernels.matmul.swiglu import Result
from pallas_kernels.quantize import quantize
from tests.kernels.cases import grouped_swiglu as cases


def choice_of(case):
    """The kernel that the op takes for a case."""
    (rows, depth), tiles = case.rows.shape, None if case.tile is None else len(case.tile_expert)
    scheme = PLAIN if case.row_scales is None else FP8_BLOCK
    shape = {"rows": rows, "columns": case.gate.shape[-2], "depth": depth, "tiles": tiles}
    return scheme, choose(Product(**shape, scheme=scheme, swiglu=True))


def poisoned(case, *, unused=0, quantize_result=False, scale_fmt="ue8m0", scales_by_group=False):
    """What the op gives of the tiles that are used, twice, in memory that very likely held NaN.

    Of one weight in bfloat16, which the op leaves to XLA, what the kernel gives.
    """
    scheme, choice = choice_of(case)
    fp8, by_group = scheme == FP8_BLOCK, scales_by_group
    used = None if case.tile is None else jnp.int32(len(case.tile_expert) - unused)
    options = {"quantize_result": quantize_result, "scale_fmt": scale_fmt, "scales_by_group": by_group}

    @jax.jit
    def call(rows, row_scales, weights, scales, tile_expert):
        if tile_expert is None and not fp8:
            how = {"config": choice.config, "result": Result(quantize_result, scale_fmt, by_group)}
            found = many_rows_swiglu.swiglu(rows, None, weights, (), None, None, stage=scheme.many_rows, **how)
            return found if quantize_result else found[0]
        weights = tuple(map(QTensor, weights, scales)) if fp8 else weights
        plan, op = (
            ((), swiglu)
            if tile_expert is None
            else ((tile_expert,), functools.partial(grouped_swiglu, used_tiles=used))
        )
        return op(rows, *weights, *plan, row_scales=row_scales, **options, backend="mosaic_gpu")

    row_scales = case.row_scales if by_group or not fp8 else case.row_scales.T
    scales = (case.gate_scales, case.up_scales) if fp8 else ()
    weights = (case.gate, case.up)
    arguments = jax.tree.map(jnp.asarray, (case.rows, row_scales, weights, scales, case.tile_expert))
    shape, runs = (case.rows.shape[0], case.gate.shape[-2]), []
    written = slice(0, shape[0] - unused * (case.tile or 0))
    for _ in range(2):
        poison = jax.block_until_ready([jnp.full(shape, jnp.nan, jnp.bfloat16) for _ in range(3)])
        del poison
        found = call(*arguments)
        if not quantize_result:
            runs.append([np.asarray(found)[written]])
            continue
        values, by_row = found[0], found[1].T if by_group else found[1]
        runs.append([np.asarray(values).view(np.uint8)[written], np.asarray(by_row)[written]])
    for first, second in zip(*runs, strict=True):
        np.testing.assert_array_equal(first, second, err_msg="from run to run")
    return runs[0]


def check(got, case):
    """Against NumPy: whatever separates them is in the order of sums, and then rounded to a neighbour."""
    want = cases.rounded(case)[: len(got)]
    error = got.astype(np.float64) - want
    assert np.isfinite(got.astype(np.float32)).all()
    assert np.sqrt((error**2).mean()) <= 3e-3 * np.sqrt((want**2).mean())
    assert np.abs(error).max() <= 2e-2 * np.abs(want).max()
    assert (got[(case.rows[: len(got)] == 0).all(axis=1)] == 0).all()


CASES = [*cases.real(), *cases.real_few()]


FORMATS = [("ue8m0", True), (None, False), ("ue8m0", False)]


@pytest.mark.parametrize("which", range(len(CASES)), ids=lambda which: CASES[which].name)
def test_kernel(which):
    """The plain result, and one of the quantised forms: bit for bit the plain one quantised."""
    case, (scale_fmt, by_group) = CASES[which], FORMATS[which % len(FORMATS)]
    unused = 0 if case.tile is None else 1
    (got,) = poisoned(case, unused=unused)
    check(got, case)
    options = {"quantize_result": True, "scale_fmt": scale_fmt, "scales_by_group": by_group}
    values, scales = poisoned(case, unused=unused, **options)
    with jax.default_device(jax.devices("cpu")[0]):  # on a GPU, XLA's own division may be off in the last bit
        want_values, want_scales = quantize(jnp.asarray(got), scale_fmt, backend="reference")
    np.testing.assert_array_equal(scales, want_scales)
    np.testing.assert_array_equal(values, np.asarray(want_values).view(np.uint8))


def test_both_kernels_are_asked():
    """The cases of few rows take the kernel of few rows, and the others the other one, but for the one row in FP8."""
    few = [not choice_of(case)[1].many for case in CASES if case.row_scales is not None]
    assert sum(few) == len(cases.real_few()) + 1


def test_rows_that_are_not_quantised_yet():
    """Both backends quantise them alike."""
    case = cases.case("op", 8 * 128, 512, 1024, fp8=True, tile_expert=[i // 3 for i in range(8)])
    x = jax.random.normal(jax.random.key(0), case.rows.shape, jnp.bfloat16)
    gate, up = (QTensor(*map(jnp.asarray, w)) for w in ((case.gate, case.gate_scales), (case.up, case.up_scales)))

    def run(backend):
        call = jax.jit(functools.partial(grouped_swiglu, backend=backend))
        return np.asarray(call(x, gate, up, jnp.asarray(case.tile_expert)), np.float64)

    got, want = run("mosaic_gpu"), run("reference")
    assert np.sqrt(((got - want) ** 2).mean() / (want**2).mean()) <= 3e-3
