"""The kernel of products of many rows: in the interpreter, and lowered."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.backend import BackendError
from pallas_kernels.matmul import FP8_BLOCK, PLAIN, Product, QTensor, choose, many_rows, matmul
from pallas_kernels.matmul import config as tuning
from tests.kernels.cases import many_rows_matmul as cases

SMALL = tuning.ManyRows(rows=64, stages=2, group=2, ctas=2)


def product(x, *others, **options):
    scheme = FP8_BLOCK if x.dtype == jnp.float8_e4m3fn else PLAIN
    return many_rows.matmul(x, *others, stage=scheme.many_rows, **options)


def interpreted(case, config):
    """The kernel's result in the interpreter."""
    arguments = [None if x is None else jnp.asarray(x) for x in case.arguments]
    return np.asarray(product(*arguments, config=config, interpret=mosaic.interpreter()), np.float64)


def check(got, case):
    """Only bfloat16 rounding of the result, 2^-9 of a value at most, and the order of float32 sums separate them."""
    want = cases.expected(case)
    np.testing.assert_allclose(got, want, rtol=2**-8, atol=1e-5 * np.abs(want).max())


@pytest.mark.interpret
@pytest.mark.parametrize("case", cases.tiny(), ids=lambda case: case.name)
def test_kernel_in_the_interpreter(case, capfd):
    check(interpreted(case, SMALL), case)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.interpret
@pytest.mark.parametrize("changes", [{"rows": 128, "ctas": 1}, {"stages": 4, "ctas": 5, "group": 1}], ids=repr)
@pytest.mark.parametrize("fp8", [True, False])
def test_other_configs_in_the_interpreter(changes, fp8, capfd):
    case = cases.case("ragged", 200, 320, 256, fp8=fp8)
    check(interpreted(case, dataclasses.replace(SMALL, **changes)), case)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.interpret
@pytest.mark.parametrize("used", [0, 1, 3])
def test_tiles_in_use_in_the_interpreter(used, capfd):
    case = cases.case("grouped", 256, 128, 128, fp8=True, tile_expert=[0, 2, 2, 1])
    arguments = (*map(jnp.asarray, case.arguments), jnp.int32(used))
    got = np.asarray(product(*arguments, config=SMALL, interpret=mosaic.interpreter()), np.float64)
    want = cases.expected(case)
    np.testing.assert_allclose(got[: 64 * used], want[: 64 * used], rtol=2**-8, atol=1e-5 * np.abs(want).max())
    assert not (got[64 * used : 192] == want[64 * used : 192]).all(axis=1).any()
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.interpret
@pytest.mark.parametrize(("rows", "depth"), [(130, 128), (3, 256)])
def test_kernel_through_the_op(rows, depth, capfd):
    """More rows than the kernel of few rows takes, and a K that it does not take."""
    case = cases.case("dense", rows, 192, depth, fp8=True)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, depth)), jnp.bfloat16)
    got, want = (
        matmul(x, QTensor(jnp.asarray(case.weights), jnp.asarray(case.weight_scales)), backend=backend)
        for backend in ("interpret", "reference")
    )
    assert got.dtype == jnp.bfloat16
    got, want = (np.asarray(y, np.float64) for y in (got, want))
    np.testing.assert_allclose(got, want, rtol=2**-7, atol=1e-5 * np.abs(want).max())
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_the_op_says_what_it_does_not_take():
    weight, scales = jnp.zeros((64, 128), jnp.float8_e4m3fn), jnp.ones((1, 1))
    with pytest.raises(BackendError, match="rows of float32; it takes bfloat16"):
        matmul(jnp.zeros((129, 128)), QTensor(weight, scales), backend="mosaic_gpu")


def shapes(rows, columns, depth, *, fp8, experts=None, tile=128):
    of, leading = jax.ShapeDtypeStruct, () if experts is None else (experts,)
    dtype = jnp.float8_e4m3fn if fp8 else jnp.bfloat16
    return (
        of((rows, depth), dtype),
        of((depth // 128, rows), jnp.float32) if fp8 else None,
        of((*leading, columns, depth), dtype),
        of((*leading, -(-columns // 128), depth // 128), jnp.float32) if fp8 else None,
        None if experts is None else of((rows // tile,), jnp.int32),
        None if experts is None else of((), jnp.int32),
    )


@pytest.mark.parametrize("config", tuning.CONFIGS["many_rows"], ids=repr)
@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("experts", [None, 3])
def test_every_config_lowers(config, fp8, experts):
    call = jax.jit(lambda *arguments: product(*arguments, config=config))
    for columns in (576, 4096):
        call.trace(*shapes(1024, columns, 1536, fp8=fp8, experts=experts)).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
    ("rows", "columns", "height"),
    [(1, 65536, 64), (64, 65536, 64), (65, 65536, 128), (256, 7168, 64), (512, 7168, 128), (4160, 7168, 128)],
)
def test_the_choice_for_all_rows(rows, columns, height):
    config = tuning.many_rows(rows, columns)
    assert config.rows == height and config in tuning.CONFIGS["many_rows"]


@pytest.mark.parametrize("tile", [64, 128, 192, 256, 320])
def test_the_choice_divides_the_tiles_of_experts(tile):
    config = tuning.many_rows(10 * tile, 4096, tile)
    assert tile % config.rows == 0 and config in tuning.CONFIGS["many_rows"]


def test_no_rows_give_none():
    arrays = jnp.zeros((0, 128), jnp.bfloat16), None, jnp.zeros((64, 128), jnp.bfloat16), None
    assert product(*arrays, config=SMALL).shape == (0, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_dtype": "float32"}, "rows of float32"),
        ({"weight_dtype": "bfloat16"}, "weights of bfloat16; it takes float8_e4m3fn"),
        ({"columns": 96}, r"weights \(96, 256\); it takes"),
        ({"depth": 192}, r"weights \(256, 192\); it takes"),
        ({"tiles": 2, "scheme": PLAIN}, "tiles of 32 rows; it takes multiples of 64"),
        ({}, None),
    ],
)
def test_unsupported(changes, message):
    product = {"rows": 64, "columns": 256, "depth": 256, "tiles": 1, "scheme": FP8_BLOCK} | changes
    chosen = choose(Product(**product))
    assert (chosen.kernel == "many_rows") == (message is None) == (chosen.unsupported is None)
    if message is not None:
        with pytest.raises(ValueError, match=message):
            raise ValueError(chosen.unsupported)


def test_configs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="shared memory"):
        tuning.ManyRows(stages=5)
    with pytest.raises(ValueError, match="64 or 128 rows"):
        tuning.ManyRows(rows=256)
    with pytest.raises(ValueError, match="registers"):
        tuning.ManyRows(registers=(248, 40))
