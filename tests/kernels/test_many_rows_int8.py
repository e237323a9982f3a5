"""The kernel of int8 products of many rows: in the interpreter, through the ops, and lowered."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.backend import BackendError
from pallas_kernels.matmul import FP8_BLOCK, INT8, PLAIN, Product, QTensor, choose, grouped_matmul, many_rows, matmul
from pallas_kernels.matmul import config as tuning
from pallas_kernels.matmul.many_rows import Problem
from tests.kernels.cases import integer_matmul as cases
from tests.kernels.cases import many_rows_matmul as other_cases

SMALL = tuning.ManyRows(rows=64, stages=2, group=2, ctas=2)
BY_ROWS = dataclasses.replace(SMALL, rows=128, by_rows=True)
TINY = {case.name.split(",")[0]: case for case in cases.many_tiny()}
of = jax.ShapeDtypeStruct


product = functools.partial(many_rows.matmul, stage=INT8.many_rows)


def plan_of(case):
    """The plan's arguments of a function."""
    return () if case.plan is None else (jnp.asarray(case.plan.tile_expert), jnp.int32(case.plan.used))


def expected(case):
    """bfloat16, exact sums in float64."""
    return cases.expected_int8(case).astype(ml_dtypes.bfloat16)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ragged rows", SMALL),
        ("ragged rows", BY_ROWS),
        ("one piece of columns", BY_ROWS),
        ("columns of two tiles", dataclasses.replace(BY_ROWS, ctas=1)),
        ("columns of two tiles", dataclasses.replace(SMALL, rows=128, stages=4)),
        ("experts", SMALL),
        ("experts", BY_ROWS),
        ("nothing", BY_ROWS),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{x.rows}{' by rows' * x.by_rows}",
)
def test_kernel_in_the_interpreter(name, config, capfd):
    case = TINY[name]
    arguments = (*map(jnp.asarray, (case.x, case.x_scales, *case.weight)), *plan_of(case))
    got = np.asarray(product(*arguments, config=config, interpret=mosaic.interpreter()))
    assert got.shape == (len(case.x), case.weight[0].shape[-2]) and got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got[: case.written], expected(case))
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.interpret
def test_bfloat16_by_rows_in_the_interpreter(capfd):
    case = other_cases.case("ragged", 200, 320, 192, fp8=False)
    arguments = [None if x is None else jnp.asarray(x) for x in case.arguments]
    got = np.asarray(
        many_rows.matmul(*arguments, stage=PLAIN.many_rows, config=BY_ROWS, interpret=mosaic.interpreter()), np.float64
    )
    want = other_cases.expected(case)
    np.testing.assert_allclose(got, want, rtol=2**-8, atol=1e-5 * np.abs(want).max())
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.interpret
def test_kernel_through_the_op(capfd):
    """More rows than the kernel of few rows takes, and a K that it does not take."""
    case = cases.int8("", 1, 192, 384)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((130, 384)), jnp.bfloat16)
    got, want = (
        np.asarray(matmul(x, QTensor(*map(jnp.asarray, case.weight), INT8), backend=backend))
        for backend in ("interpret", "reference")
    )
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, want)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.interpret
def test_kernel_through_the_grouped_op(capfd):
    case = TINY["experts"]
    experts, used = plan_of(case)
    weight = QTensor(*map(jnp.asarray, case.weight), INT8)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(case.x.shape), jnp.bfloat16)
    got, want = (
        np.asarray(grouped_matmul(x, weight, experts, used_tiles=used, backend=backend))[: case.written]
        for backend in ("interpret", "reference")
    )
    np.testing.assert_array_equal(got, want)
    assert "RACE DETECTED" not in capfd.readouterr().out


# ---- lowered -----------------------------------------------------------------------------------------------------


def arguments_of(rows, columns, depth, experts=None, tile=128):
    leading = () if experts is None else (experts,)
    dense = [of((rows, depth), jnp.int8), of((rows,), jnp.float32)]
    dense += [of((*leading, columns, depth), jnp.int8), of((*leading, columns), jnp.float32)]
    return dense if experts is None else [*dense, of((rows // tile,), jnp.int32), of((), jnp.int32)]


@pytest.mark.parametrize("config", tuning.CONFIGS["many_rows_int8"], ids=repr)
@pytest.mark.parametrize("experts", [None, 3])
def test_every_config_lowers(config, experts):
    call = jax.jit(lambda *arguments: product(*arguments, config=config))
    for columns in (576, 4096):
        call.trace(*arguments_of(1024, columns, 1536, experts)).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(("rows", "columns", "by_rows"), [(129, 576, False), (8192, 8192, True), (4096, 7168, True)])
def test_the_choice_for_all_rows(rows, columns, by_rows):
    config = tuning.many_rows(rows, columns, by_rows=True)
    assert config.by_rows == by_rows and config in tuning.CONFIGS["many_rows_int8"]


@pytest.mark.parametrize("tile", [64, 128, 192, 256])
def test_the_choice_divides_the_tiles_of_experts(tile):
    config = tuning.many_rows(10 * tile, 4096, tile, by_rows=True)
    assert tile % config.rows == 0 and config in tuning.CONFIGS["many_rows_int8"]


# ---- which kernel, and what neither takes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "depth", "dtype", "tile", "many"),
    [
        (128, 512, jnp.bfloat16, None, False),
        (129, 512, jnp.bfloat16, None, True),
        (5, 640, jnp.bfloat16, None, True),
        (5, 512, jnp.float32, None, False),
        (256, 512, jnp.bfloat16, 64, False),
        (256, 512, jnp.bfloat16, 128, True),
        (256, 512, jnp.float32, 128, False),
        (256, 640, jnp.bfloat16, 64, True),
        (384, 512, jnp.bfloat16, 192, True),
    ],
)
def test_the_choice_of_a_kernel(rows, depth, dtype, tile, many):
    tiles = None if tile is None else rows // tile
    shape = {"rows": rows, "columns": 64, "depth": depth, "tiles": tiles}
    chosen = choose(Product(**shape, scheme=INT8, row_dtype=str(jnp.dtype(dtype))))
    assert chosen.kernel == ("many_rows" if many else "few_rows")


@pytest.mark.parametrize(
    ("rows", "columns", "depth", "dtype", "tile", "message"),
    [
        (129, 64, 512, jnp.float32, None, "rows of float32; it takes bfloat16"),
        (129, 64, 512, jnp.float16, None, "dtype float16; it takes bfloat16 and float32"),
        (129, 96, 512, jnp.bfloat16, None, "N a multiple of 64"),
        (129, 64, 192, jnp.bfloat16, None, "K of 128"),
        (144, 64, 512, jnp.bfloat16, 48, "tiles of 48 rows"),
        (384, 64, 512, jnp.float32, 192, "rows of float32; it takes bfloat16"),
    ],
)
def test_what_neither_kernel_takes(rows, columns, depth, dtype, tile, message):
    tiles = None if tile is None else rows // tile
    shape = {"rows": rows, "columns": columns, "depth": depth, "tiles": tiles}
    chosen = choose(Product(**shape, scheme=INT8, row_dtype=str(jnp.dtype(dtype))))
    assert chosen.kernel is None and message in chosen.unsupported


def test_the_op_says_what_it_does_not_take():
    with pytest.raises(BackendError, match="matmul does not take rows of float32; it takes bfloat16"):
        matmul(
            jnp.zeros((129, 512)), QTensor(jnp.zeros((64, 512), jnp.int8), jnp.zeros(64), INT8), backend="mosaic_gpu"
        )


def test_no_rows_give_none():
    weight = jnp.zeros((64, 128), jnp.int8), jnp.zeros(64)
    assert product(jnp.zeros((0, 128), jnp.int8), jnp.zeros(0), *weight, config=SMALL).shape == (0, 64)


def test_tiles_by_rows_where_there_are_none_are_refused():
    with pytest.raises(ValueError, match="share 128 rows, not 64"):
        tuning.ManyRows(rows=64, by_rows=True)
    with pytest.raises(ValueError, match="take no tiles by rows"):
        FP8_BLOCK.many_rows(Problem(128, 256, 128, jnp.dtype(jnp.float8_e4m3fn), BY_ROWS))
    with pytest.raises(ValueError, match="take no tiles by rows"):
        Problem(128, 256, 128, jnp.dtype(jnp.bfloat16), BY_ROWS, weights=2)
