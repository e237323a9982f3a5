"""Products with few rows: the kernels in the interpreter, and that they lower."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.backend import BackendError
from pallas_kernels.hopper import SMS
from pallas_kernels.matmul import FP8_BLOCK, Product, QTensor, choose, few_rows, matmul
from pallas_kernels.matmul import config as tuning
from pallas_kernels.matmul import few_rows_fp8 as device
from pallas_kernels.moe_dispatch import make_plan
from tests.kernels.cases import few_rows as cases

TINY = {case.name: case for case in cases.tiny()}
INTERPRETED = [
    ("one row", tuning.FewRows(tile=8, rows=32, blocks=4, stages=2, ctas=3)),
    ("one row", tuning.FewRows(tile=8, rows=128, warpgroups=2, blocks=2, stages=3, ctas=1)),
    ("part of a tile", tuning.FewRows(tile=8, rows=64, blocks=1, stages=3, ctas=2)),
    ("two tiles' worth", tuning.FewRows(tile=16, rows=64, blocks=2, stages=3, ctas=2)),
    ("experts", tuning.FewRows(tile=8, rows=64, blocks=2, stages=2, ctas=3)),
    ("nothing", tuning.FewRows(tile=8, rows=64, blocks=2, stages=2, ctas=2)),
    # Strips that may have rows of two scales, and, but for those of 24 and 48, one that ends past the weight.
    ("part of a tile", tuning.FewRows(tile=8, rows=24, blocks=1, stages=5, ctas=3)),
    ("part of a tile", tuning.FewRows(tile=8, rows=48, blocks=2, stages=2, ctas=2)),
    ("part of a tile", tuning.FewRows(tile=8, rows=56, blocks=4, stages=2, ctas=3)),
    ("part of a tile", tuning.FewRows(tile=8, rows=112, warpgroups=2, blocks=2, stages=2, ctas=1)),
    ("part of a tile", tuning.FewRows(tile=8, rows=144, warpgroups=3, blocks=2, stages=2, ctas=2)),
    ("part of a tile", tuning.FewRows(tile=8, rows=128, warpgroups=4, blocks=2, stages=2, ctas=1)),
    ("experts", tuning.FewRows(tile=8, rows=56, blocks=2, stages=2, ctas=4)),
    # In two tiles, next to each other.
    ("two tiles' worth", tuning.FewRows(tile=8, rows=24, blocks=2, stages=3, ctas=4)),
    # Warpgroups that share rows and take different tokens: of one part of a strip, and of two.
    ("part of a tile", tuning.FewRows(tile=16, rows=24, warpgroups=2, token_parts=2, blocks=1, stages=3, ctas=3)),
    ("two tiles' worth", tuning.FewRows(tile=16, rows=56, warpgroups=2, token_parts=2, blocks=2, stages=2, ctas=2)),
    ("two tiles' worth", tuning.FewRows(tile=32, rows=64, warpgroups=4, token_parts=4, blocks=4, stages=2, ctas=1)),
    ("two tiles' worth", tuning.FewRows(tile=16, rows=48, warpgroups=4, token_parts=2, blocks=2, stages=3, ctas=1)),
    ("part of a tile", tuning.FewRows(tile=16, rows=112, warpgroups=4, token_parts=2, blocks=2, stages=2, ctas=1)),
    ("experts of two parts", tuning.FewRows(tile=16, rows=56, warpgroups=2, token_parts=2, blocks=2, stages=2, ctas=3)),
]


product = functools.partial(few_rows.matmul, stage=FP8_BLOCK.few_rows)


@pytest.mark.interpret
@pytest.mark.parametrize(("name", "config"), INTERPRETED, ids=lambda x: x if isinstance(x, str) else None)
def test_kernel_in_the_interpreter(name, config, capfd):
    case = TINY[name]
    arguments = map(jnp.asarray, case.arguments)
    got = product(*arguments, dtype=jnp.float32, config=config, interpret=mosaic.interpreter())
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
def test_every_config_lowers(config):
    def lower(f, dtype, arguments):
        jax.jit(functools.partial(f, config=config, dtype=dtype)).trace(*arguments).lower(lowering_platforms=("cuda",))

    lower(product, jnp.float32, shapes(config.tile // 2 + 1, 7168, 2048))
    lower(product, jnp.bfloat16, shapes(3 * config.tile, 4096, 7168, (16,), 3))


@pytest.mark.parametrize("config", cases.token_parts(), ids=repr)
def test_token_parts_lower(config):
    """Each warpgroup's product is of its own tokens."""
    for arguments in (shapes(config.tile - 3, 7168, 2048), shapes(3 * config.tile, 4096, 7168, (16,), 3)):
        lowered = (
            jax.jit(functools.partial(product, config=config)).trace(*arguments).lower(lowering_platforms=("cuda",))
        )
        assert set(re.findall(r"m64n(\d+)k32", lowered.as_text())) == {str(config.warpgroup_tokens)}


@pytest.mark.parametrize("tile", tuning.TILES)
@pytest.mark.parametrize(
    ("rows", "tiles"), [(64, 1), (576, 1), (2112, 1), (4096, 1), (4096, 8), (36864, 1), (7168, 276)]
)
@pytest.mark.parametrize("columns", [2048, 16384])
def test_the_choice_is_one_of_the_configs(tile, rows, tiles, columns):
    config = tuning.few_rows(tile, rows, tiles, columns)
    assert config in tuning.CONFIGS["few_rows"]
    assert config.tile == tile or (tiles == 1 and 2 * config.tile == tile)
    assert tiles == 1 or rows % config.rows == 0


@pytest.mark.parametrize("choice", [tuning.few_rows, tuning.few_rows_int4])
@pytest.mark.parametrize("rows", [4096, 7168, 24576, 36864])
def test_no_multiprocessor_has_much_more_than_its_share_of_one_weight(choice, rows):
    config = choice(8, rows, 1, 2048)
    strips = -(-rows // config.rows)
    busiest = -(-strips // SMS) * config.rows
    assert busiest <= 1.05 * rows / SMS


def test_many_tokens_have_tall_strips():
    """So that they are not read too often; but not so tall that most multiprocessors have none."""
    assert tuning.few_rows(128, 36864, 1, 7168).rows == 192
    assert tuning.few_rows(128, 24576, 1, 1536).rows == 192
    assert tuning.few_rows(128, 4096, 1, 7168).rows == 64


@pytest.mark.parametrize("rows", range(8, 257, 8))
def test_scales_of_a_strip(rows):
    """As many as the worst strip needs; one, that of the first row, where strips do not straddle."""
    starts = range(0, 128 * rows, rows)
    assert device.scale_rows(rows) == max((start + rows - 1) // 128 - start // 128 + 1 for start in starts)
    within = all((start % 128 + row) // 128 == row // 128 for start in starts for row in range(rows))
    assert device.straddles(rows) == (not within)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 60}, "in eights, of 60"),
        ({"rows": 72}, "up to 64 rows"),
        ({"rows": 88, "warpgroups": 2}, "each of 2 warpgroups"),
        ({"rows": 320, "warpgroups": 5}, "1 to 4 warpgroups"),
        ({"rows": 8, "blocks": 1, "stages": 3}, "reads past a warpgroup's 8"),
        ({"stages": 20}, "bytes of shared memory"),
        ({"warpgroups": 2, "token_parts": 2}, "token_parts divides .*: 2 does not divide 2 warpgroups and 8 tokens"),
        ({"tile": 64, "token_parts": 2}, "2 does not divide 1 warpgroups and 64 tokens"),
        ({"tile": 64, "warpgroups": 4, "token_parts": 3}, "3 does not divide 4 warpgroups and 64 tokens"),
        ({"token_parts": 0}, "0 does not divide 1 warpgroups"),
        ({"tile": 64, "warpgroups": 10, "token_parts": 2}, "1 to 8 warpgroups, not 10"),
        ({"tile": 64, "rows": 72, "warpgroups": 2, "token_parts": 2}, "each of 1 warpgroups along a strip"),
        ({"tile": 64, "rows": 136, "warpgroups": 4, "token_parts": 2}, "each of 2 warpgroups along a strip"),
        (
            {"tile": 16, "rows": 8, "warpgroups": 2, "token_parts": 2, "blocks": 1, "stages": 3},
            "reads past a warpgroup's 8",
        ),
    ],
)
def test_configs_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tuning.FewRows(tile=8, rows=56, blocks=2, stages=6), **change)


def test_strips_of_gate_and_up_are_not_split_by_tokens():
    with pytest.raises(ValueError, match="token_parts 1, not 2"):
        tuning.FewRowsSwiGLU(tile=16, rows=64, warpgroups=2, token_parts=2, blocks=1, stages=4)


def test_what_the_kernels_do_not_take():
    def chosen(rows, columns, depth, **options):
        return choose(Product(rows=rows, columns=columns, depth=depth, scheme=FP8_BLOCK, **options))

    assert chosen(128, 64, 512).kernel == "few_rows"
    assert chosen(1024, 64, 512, tiles=128).kernel == "few_rows"
    assert chosen(129, 64, 512).kernel == "many_rows"
    assert chosen(1, 64, 640).kernel == "many_rows"
    assert "tiles of 24 rows" in chosen(240, 64, 512, tiles=10).unsupported
    assert "N a multiple of 64" in chosen(1, 96, 512).unsupported
    assert "K in multiples of 512" in chosen(24, 64, 640, tiles=3).unsupported
    assert "dtype float16" in chosen(1, 64, 512, row_dtype="float16").unsupported


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
    weight = QTensor(jnp.asarray(case.values), jnp.asarray(case.scales), FP8_BLOCK)
    got, expected = (matmul(x, weight, backend=backend) for backend in ("interpret", "reference"))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(expected, np.float32), rtol=2**-7, atol=1e-4)
    with pytest.raises(BackendError, match="an input that stays as it is"):
        matmul(x, weight, quantize_input=False, backend="mosaic_gpu")


@pytest.mark.parametrize("backend", ["mosaic_gpu", "reference"])
def test_a_gradient_that_would_be_rounded_away_is_refused(monkeypatch, backend):
    """With a kernel that cannot run here. Of the scales and of an x that stays as it is, there is one."""
    case = TINY["part of a tile"]
    x = jnp.ones((3, 512))
    monkeypatch.setattr(few_rows, "matmul", lambda *_, **__: jnp.zeros((3, 192)))

    values, scales = jnp.asarray(case.values), jnp.asarray(case.scales)

    def loss(x, values, scales, backend=backend, quantize_input=True):
        return matmul(x, QTensor(values, scales), quantize_input=quantize_input, backend=backend).sum()

    with pytest.raises(NotImplementedError, match="rounding activations has no gradient"):
        jax.grad(loss)(x, values, scales)
    for quantize_input in (True, False) if backend == "reference" else (True,):
        with pytest.raises(NotImplementedError, match="a quantised weight has no gradient"):
            jax.grad(functools.partial(loss, quantize_input=quantize_input), 1)(x, values, scales)
    plain = functools.partial(loss, backend="reference", quantize_input=False)
    weight = QTensor(values, scales).dequantize()
    expected = jnp.broadcast_to(weight.sum(0), x.shape)
    np.testing.assert_allclose(jax.grad(plain)(x, values, scales), expected, rtol=1e-5, atol=1e-4)
