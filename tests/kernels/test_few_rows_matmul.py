"""Products with few rows: the kernels in the interpreter, and that they lower."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic, tuning
from pallas_kernels.backend import BackendError
from pallas_kernels.moe_dispatch import make_plan
from pallas_kernels.quant_matmul import few_rows, quant_matmul
from tests.kernels.cases import few_rows as cases

TINY = {case.name: case for case in cases.tiny()}
INTERPRETED = [
    ("one row", tuning.FewRows(tile=8, rows=32, blocks=4, stages=2, ctas=3)),
    ("one row", tuning.FewRows(tile=8, rows=128, blocks=2, stages=3, ctas=1)),
    ("part of a tile", tuning.FewRows(tile=8, rows=64, blocks=1, stages=3, ctas=2)),
    ("two tiles' worth", tuning.FewRows(tile=16, rows=64, blocks=2, stages=3, ctas=2)),
    ("experts", tuning.FewRows(tile=8, rows=64, blocks=2, stages=2, ctas=3)),
    ("nothing", tuning.FewRows(tile=8, rows=64, blocks=2, stages=2, ctas=2)),
]


def function(case):
    return few_rows.matmul if case.tile_expert is None else few_rows.grouped_matmul


@pytest.mark.interpret
@pytest.mark.parametrize(("name", "config"), INTERPRETED, ids=lambda x: x if isinstance(x, str) else None)
def test_kernel_in_the_interpreter(name, config, capfd):
    case = TINY[name]
    arguments = map(jnp.asarray, case.arguments)
    got = function(case)(*arguments, dtype=jnp.float32, config=config, interpret=mosaic.interpreter())
    expected = cases.expected(case)
    assert got.shape == (case.x.shape[0], case.values.shape[-2])
    np.testing.assert_allclose(
        np.asarray(got)[: case.written], expected, rtol=0, atol=1e-6 * np.abs(expected).max(initial=0)
    )
    assert "RACE DETECTED" not in capfd.readouterr().out


def shapes(case_tokens, rows, columns, experts=(), tiles=None):
    of = jax.ShapeDtypeStruct
    f8, f32 = jnp.float8_e4m3fn, jnp.float32
    plan = () if tiles is None else (of((tiles,), jnp.int32), of((), jnp.int32))
    return (
        of((case_tokens, columns), f8),
        of((case_tokens, columns // 128), f32),
        of((*experts, rows, columns), f8),
        of((*experts, -(-rows // 128), columns // 128), f32),
        *plan,
    )


@pytest.mark.parametrize("config", tuning.CONFIGS["few_rows"], ids=repr)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_every_config_lowers(config, dtype):
    def lower(f, arguments):
        jax.jit(functools.partial(f, config=config, dtype=dtype)).trace(*arguments).lower(lowering_platforms=("cuda",))

    lower(few_rows.matmul, shapes(config.tile // 2 + 1, 7168, 2048))
    lower(few_rows.matmul, shapes(1, 7168, 2048))
    lower(few_rows.grouped_matmul, shapes(3 * config.tile, 4096, 7168, (16,), 3))


@pytest.mark.parametrize("tile", few_rows.TILES)
@pytest.mark.parametrize(
    ("rows", "tiles"), [(64, 1), (576, 1), (2112, 1), (4096, 1), (4096, 8), (36864, 1), (7168, 276)]
)
def test_the_choice_is_one_of_the_configs(tile, rows, tiles):
    config = tuning.few_rows(tile, rows, tiles)
    assert config in tuning.CONFIGS["few_rows"]
    assert config.tile == tile and rows % config.rows == 0


def test_what_the_kernel_does_not_take():
    def reason(x, values, dtype=jnp.float8_e4m3fn, tile=None):
        return few_rows.unsupported(jax.ShapeDtypeStruct(x, dtype), jax.ShapeDtypeStruct(values, dtype), tile)

    assert reason((128, 512), (64, 512)) is None
    assert reason((1024, 512), (3, 64, 512), tile=8) is None
    assert "1 to 128 rows" in reason((129, 512), (64, 512))
    assert "tiles of 24 rows" in reason((240, 512), (3, 64, 512), tile=24)
    assert "N in multiples of 64" in reason((1, 512), (96, 512))
    assert "K in multiples of 512" in reason((1, 640), (64, 640))
    assert "dtype bfloat16" in reason((1, 512), (64, 512), jnp.bfloat16)


def test_used_tiles_of_a_plan():
    experts = jnp.asarray([[5, 1], [5, 2], [0, 3], [5, 1]], jnp.int32)
    plan = make_plan(experts, jnp.asarray([True, True, False, True]), 8, tile=8)
    assert int(plan.used_tiles) == 3  # experts 1, 2 and 5
    assert list(plan.tile_expert[:3]) == [1, 2, 5]


@pytest.mark.interpret
def test_kernel_through_the_op(monkeypatch):
    small = tuning.FewRows(tile=8, rows=64, blocks=2, stages=2, ctas=1)
    monkeypatch.setattr(tuning, "few_rows", lambda *_: small)
    rng = np.random.default_rng(0)
    case = TINY["part of a tile"]
    x = jnp.asarray(rng.standard_normal((3, 512)), jnp.bfloat16)
    arguments = (x, jnp.asarray(case.values), jnp.asarray(case.scales))
    got, expected = (
        quant_matmul(*arguments, quantize_input=True, backend=backend) for backend in ("interpret", "reference")
    )
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(expected, np.float32), rtol=2**-7, atol=1e-4)
    with pytest.raises(BackendError, match="an input that stays as it is"):
        quant_matmul(*arguments, quantize_input=False, backend="mosaic_gpu")


def test_gradient_is_that_of_the_reference(monkeypatch):
    """With a kernel that cannot run here: only its gradient is asked for."""
    case = TINY["part of a tile"]
    x = jnp.ones((3, 512))
    monkeypatch.setattr(few_rows, "matmul", lambda *_, **__: jnp.zeros((3, 192)))

    def gradient(backend):
        def loss(x):
            arguments = (jnp.asarray(case.values), jnp.asarray(case.scales))
            return quant_matmul(x, *arguments, quantize_input=True, backend=backend).sum()

        return jax.grad(loss)(x)

    np.testing.assert_array_equal(gradient("mosaic_gpu"), gradient("reference"))
