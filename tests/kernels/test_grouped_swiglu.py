"""Gate and up as one product with SwiGLU behind it: the op, and its kernels in the interpreter and lowered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.backend import BackendError
from pallas_kernels.matmul import (
    FP8_BLOCK,
    PLAIN,
    Product,
    QTensor,
    choose,
    few_rows_swiglu,
    grouped_matmul,
    grouped_swiglu,
    many_rows_swiglu,
    matmul,
    quantize_weight,
    silu_product,
    swiglu,
)
from pallas_kernels.matmul import config as tuning
from pallas_kernels.matmul.swiglu import Result
from pallas_kernels.quantize import dequantize, quantize
from tests.kernels.cases import grouped_swiglu as cases

ROUNDED = Result(quantized=False, scale_fmt="ue8m0", scales_by_group=True)
BY_GROUP = Result(quantized=True, scale_fmt="ue8m0", scales_by_group=True)
BY_ROW = Result(quantized=True, scale_fmt=None, scales_by_group=False)


def arrays(case, *, by_group):
    """Arguments of the kernels' functions, all but how many tiles are used."""
    fp8 = case.row_scales is not None
    row_scales = case.row_scales if by_group or not fp8 else case.row_scales.T
    scales = (case.gate_scales, case.up_scales) if fp8 else ()
    return jax.tree.map(jnp.asarray, (case.rows, row_scales, (case.gate, case.up), scales, case.tile_expert))


def named(case, *, by_group):
    """The same for the public ops: positional and named ones."""
    rows, row_scales, weights, scales, experts = arrays(case, by_group=by_group)
    weights = tuple(map(QTensor, weights, scales)) if scales else weights
    plan = () if experts is None else (experts,)
    return (rows, *weights, *plan), {"row_scales": row_scales, "scales_by_group": by_group}


def op_of(case):
    return swiglu if case.tile_expert is None else grouped_swiglu


def kernel(rows, row_scales, weights, scales, experts, used, *, config, **options):
    """The kernel that takes such a config; `row_scales` as it takes them."""
    scheme = PLAIN if row_scales is None else FP8_BLOCK
    many = isinstance(config, tuning.ManyRows)
    module, stage = (many_rows_swiglu, scheme.many_rows) if many else (few_rows_swiglu, scheme.few_rows)
    return module.swiglu(rows, row_scales, weights, scales, experts, used, stage=stage, config=config, **options)


def check(found, case, result, rows=slice(None)):
    """Against float64."""
    values, *scales = map(np.asarray, found)
    if not result.quantized:
        assert values.dtype == cases.BF16
        return cases.check(values, case, rows)
    return cases.check_quantized(values, scales[0].T if result.scales_by_group else scales[0], case, rows)


# ---- the reference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", [ROUNDED, BY_GROUP, BY_ROW], ids=repr)
@pytest.mark.parametrize("experts", [None, [0, 2, 2]])
@pytest.mark.parametrize("fp8", [True, False])
def test_reference(fp8, experts, result):
    case = cases.case("reference", 24, 256, 256, fp8=fp8, tile_expert=experts)
    given, options = named(case, by_group=result.scales_by_group)
    found = op_of(case)(*given, **options, quantize_result=result.quantized, scale_fmt=result.scale_fmt)
    check(found if result.quantized else (found,), case, result)


@pytest.mark.parametrize("fp8", [True, False])
def test_equals_separate_operations(fp8):
    """Rows that are not quantised yet, and the product down of the quantised result."""
    case = cases.case("apart", 24, 256, 256, fp8=fp8, tile_expert=[0, 2, 2])
    (_, gate, up, experts), _ = named(case, by_group=False)
    rows = jnp.asarray(np.random.default_rng(5).standard_normal(case.rows.shape), jnp.bfloat16)
    want = silu_product(*(grouped_matmul(rows, weight, experts) for weight in (gate, up)))
    np.testing.assert_array_equal(grouped_swiglu(rows, gate, up, experts), want)
    values, by_group = grouped_swiglu(rows, gate, up, experts, quantize_result=True, scales_by_group=True)
    wanted_values, by_row = quantize(want)
    np.testing.assert_array_equal(values, wanted_values)
    np.testing.assert_array_equal(by_group, by_row.T)
    if fp8:
        down = QTensor(jnp.swapaxes(gate.values, 1, 2), jnp.swapaxes(gate.scales, 1, 2))
        again = grouped_matmul(values, down, experts, row_scales=by_group, scales_by_group=True)
        np.testing.assert_array_equal(again, grouped_matmul(want, down, experts))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("grouped", [False, True])
def test_schemes_without_a_kernel_of_their_own(scheme, grouped):
    """Two products and SwiGLU."""
    rng, lead = np.random.default_rng(0), (3,) if grouped else ()
    x = jnp.asarray(rng.standard_normal((24, 128)), jnp.bfloat16)
    gate, up = (quantize_weight(jnp.asarray(rng.standard_normal((*lead, 128, 128))), scheme) for _ in range(2))
    plan = (jnp.asarray([0, 2, 2]),) if grouped else ()
    product, fused = (grouped_matmul, grouped_swiglu) if grouped else (matmul, swiglu)
    want = silu_product(*(product(x, weight, *plan) for weight in (gate, up)))
    np.testing.assert_array_equal(fused(x, gate, up, *plan), want)
    for got, expected in zip(fused(x, gate, up, *plan, quantize_result=True), quantize(want), strict=True):
        np.testing.assert_array_equal(got, expected)


# ---- kernels in the interpreter --------------------------------------------------------------------------------


def interpreted(case, result, config):
    arguments = arrays(case, by_group=isinstance(config, tuning.ManyRows))
    found = kernel(*arguments, None, result=result, config=config, interpret=mosaic.interpreter())
    return [np.asarray(x) for x in found]


MANY = {"stages": 2, "group": 2}
MANY_CASES = [
    ("fp8", 128, None, BY_GROUP, tuning.ManyRows(rows=64, ctas=1, **MANY)),
    ("fp8", 256, [2, 0], BY_ROW, tuning.ManyRows(rows=128, ctas=2, **MANY)),
    ("fp8", 128, [1, 0], ROUNDED, tuning.ManyRows(rows=64, ctas=3, **MANY)),
    ("bf16", 150, None, BY_GROUP, tuning.ManyRows(rows=128, ctas=1, **MANY)),
    ("bf16", 128, [0, 2], ROUNDED, tuning.ManyRows(rows=64, ctas=2, **MANY)),
]


@pytest.mark.interpret
@pytest.mark.parametrize(("kind", "rows", "experts", "result", "config"), MANY_CASES)
def test_many_rows_in_the_interpreter(kind, rows, experts, result, config, capfd):
    case = cases.case(kind, rows, 256, 256, fp8=kind == "fp8", tile_expert=experts)
    check(interpreted(case, result, config), case, result)
    assert "RACE DETECTED" not in capfd.readouterr().out


FEW_CASES = [
    (8, [0, 2, 2], BY_ROW, tuning.FewRowsSwiGLU(tile=8, rows=256, warpgroups=4, blocks=1, stages=2, ctas=2)),
    (5, None, BY_GROUP, tuning.FewRowsSwiGLU(tile=8, rows=256, warpgroups=4, blocks=2, stages=3, ctas=1)),
    (16, [1, 0], ROUNDED, tuning.FewRowsSwiGLU(tile=16, rows=128, warpgroups=2, blocks=2, stages=2, ctas=2)),
    (8, [1], BY_GROUP, tuning.FewRowsSwiGLU(tile=8, rows=64, blocks=4, stages=2, ctas=1)),
    (3, None, BY_ROW, tuning.FewRowsSwiGLU(tile=8, rows=32, blocks=4, stages=2, ctas=3)),
]


@pytest.mark.interpret
@pytest.mark.parametrize(("rows", "experts", "result", "config"), FEW_CASES)
def test_few_rows_in_the_interpreter(rows, experts, result, config, capfd):
    case = cases.case("few", rows * len(experts or [0]), 128, 512, fp8=True, tile_expert=experts)
    check(interpreted(case, result, config), case, result)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.interpret
@pytest.mark.parametrize(("tile", "depth"), [(8, 512), (64, 128)])
@pytest.mark.parametrize("used", [0, 1])
def test_tiles_in_use_in_the_interpreter(tile, depth, used, capfd):
    """Through the op, which chooses the kernel; the other tiles are left alone, and their expert's weights are NaN."""
    case = cases.case("used", 2 * tile, 128, depth, fp8=True, tile_expert=[0, 1])
    given, options = named(case, by_group=False)
    options |= {"used_tiles": jnp.int32(used), "quantize_result": True}
    values, scales = map(np.asarray, grouped_swiglu(*given, **options, backend="interpret"))
    written = slice(0, used * tile)
    cases.check_quantized(values, scales, case, written)
    want, _ = map(np.asarray, grouped_swiglu(*given, **options, backend="reference"))
    same = (values.view(np.uint8) == want.view(np.uint8)).all(axis=1)
    assert not same[used * tile : tile + tile // 2].any()
    assert "RACE DETECTED" not in capfd.readouterr().out


# ---- without running -------------------------------------------------------------------------------------------


def shapes(rows, width, depth, *, fp8, experts=None, tiles=None, by_group=False):
    of, leading = jax.ShapeDtypeStruct, () if experts is None else (experts,)
    dtype = jnp.float8_e4m3fn if fp8 else jnp.bfloat16
    weight = of((*leading, width, depth), dtype)
    scale = of((*leading, width // 128, depth // 128), jnp.float32)
    grid = (depth // 128, rows) if by_group else (rows, depth // 128)
    return (
        of((rows, depth), dtype),
        of(grid, jnp.float32) if fp8 else None,
        (weight, weight),
        (scale, scale) if fp8 else (),
        None if experts is None else of((tiles,), jnp.int32),
        None if experts is None else of((), jnp.int32),
    )


def lower(arguments, result, config):
    call = jax.jit(functools.partial(kernel, result=result, config=config))
    return call.trace(*arguments).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("config", tuning.CONFIGS["many_rows"], ids=repr)
@pytest.mark.parametrize("result", [ROUNDED, BY_GROUP, BY_ROW], ids=repr)
@pytest.mark.parametrize("fp8", [True, False])
def test_every_config_of_many_rows_lowers(config, result, fp8):
    lower(shapes(1024, 2048, 1536, fp8=fp8, experts=3, tiles=8, by_group=True), result, config)
    lower(shapes(1000, 384, 1536, fp8=fp8, by_group=True), result, config)


@pytest.mark.parametrize("config", tuning.CONFIGS["few_rows_swiglu"], ids=repr)
@pytest.mark.parametrize("result", [ROUNDED, BY_GROUP, BY_ROW], ids=repr)
def test_every_config_of_few_rows_lowers(config, result):
    tile = config.tile
    lower(shapes(8 * tile, 2048, 1536, fp8=True, experts=9, tiles=8), result, config)
    lower(shapes(tile - 1, 2048, 1536, fp8=True), result, config)


@pytest.mark.parametrize("tile", [8, 16, 32, 64])
@pytest.mark.parametrize(("width", "tiles"), [(128, 1), (2048, 1), (2048, 4), (2048, 8), (2048, 256), (18432, 1)])
def test_the_choice_is_one_of_the_configs(tile, width, tiles):
    config = tuning.few_rows_swiglu(tile, width, tiles)
    assert config in tuning.CONFIGS["few_rows_swiglu"]
    assert config.tile == tile and width % (config.rows // 2) == 0
    assert (config.rows == 256) == (width // 128 * tiles >= 99)


def test_configs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="up to 64 tokens"):
        tuning.FewRowsSwiGLU(tile=128, rows=64, blocks=1, stages=2)
    with pytest.raises(ValueError, match="shared memory"):
        tuning.FewRowsSwiGLU(tile=64, rows=256, warpgroups=4, blocks=1, stages=5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 192}, "W a multiple of 128"),
        ({"depth": 192, "fp8": False}, None),
        ({"depth": 96, "fp8": False}, "K of 64"),
        ({"depth": 640}, None),
        ({"tile": 24}, "tiles of 24 rows"),
        ({"tile": 8, "depth": 640}, "K in multiples of 512"),
        ({"tile": 8, "fp8": False}, "tiles of 8 rows; it takes multiples of 64"),
        ({"tile": None, "rows": 0}, "one or more"),
        ({"tile": None, "rows": 65}, None),
    ],
    ids=repr,
)
def test_unsupported(changes, message):
    given = {"rows": 384, "width": 256, "depth": 512, "tile": 64, "fp8": True} | changes
    tiles = None if given["tile"] is None else given["rows"] // given["tile"]
    scheme = FP8_BLOCK if given["fp8"] else PLAIN
    shape = {"rows": given["rows"], "columns": given["width"], "depth": given["depth"], "tiles": tiles}
    found = choose(Product(**shape, scheme=scheme, swiglu=True)).unsupported
    assert found is None if message is None else message in found


def test_what_no_backend_takes():
    case = cases.case("wrong", 16, 128, 128, fp8=True, tile_expert=[0, 1])
    (rows, gate, up, experts), options = named(case, by_group=False)
    fewer = QTensor(up.values[:, :64], up.scales)
    with pytest.raises(ValueError, match="one shape"):
        grouped_swiglu(rows, gate, fewer, experts, **options)
    with pytest.raises(ValueError, match="others without"):
        grouped_swiglu(rows, gate, up, experts, **options | {"row_scales": None})
    with pytest.raises(ValueError, match=r"must be \(1, 16\)"):
        grouped_swiglu(rows, gate, up, experts, **options | {"scales_by_group": True})
    with pytest.raises(ValueError, match=r"up_scales of float32 \(3, 1, 1\), not of \(2, 1, 1\)"):
        grouped_swiglu(rows, gate, QTensor(up.values, up.scales[:2]), experts, **options)
    with pytest.raises(ValueError, match="needs rows float"):
        grouped_swiglu(rows, gate.dequantize(), up.dequantize(), experts, row_scales=options["row_scales"])
    with pytest.raises(ValueError, match="scale_fmt"):
        grouped_swiglu(rows, gate, up, experts, **options, scale_fmt="e8m0")
    with pytest.raises(ValueError, match="whole groups"):
        swiglu(jnp.zeros((8, 64)), jnp.zeros((64, 64)), jnp.zeros((64, 64)), quantize_result=True)
    with pytest.raises(BackendError, match="K in multiples of 512"):
        grouped_swiglu(rows, gate, up, experts, **options, backend="mosaic_gpu")


@pytest.mark.parametrize("fp8", [True, False])
def test_gradient_is_that_of_the_reference(fp8, monkeypatch):
    """With a kernel that cannot run here: only its gradient is asked for."""
    case = cases.case("gradient", 128, 128, 128, fp8=fp8, tile_expert=[0, 2])
    (_, gate, up, experts), options = named(case, by_group=False)
    rows = jnp.asarray(np.random.default_rng(1).standard_normal(case.rows.shape), jnp.bfloat16)
    monkeypatch.setattr(many_rows_swiglu, "swiglu", lambda *_, **__: (jnp.zeros((128, 128), jnp.bfloat16),))
    options["row_scales"] = None

    def gradient(backend):
        def total(rows):
            return grouped_swiglu(rows, gate, up, experts, **options, backend=backend).astype(jnp.float32).sum()

        return jax.jit(jax.grad(total))(rows)

    if fp8:  # behind FP8 activations there is none
        for backend in ("reference", "mosaic_gpu"):
            with pytest.raises(NotImplementedError, match="rounding activations has no gradient"):
                gradient(backend)
        return
    assert np.abs(np.asarray(gradient("reference"), np.float32)).max() > 0
    np.testing.assert_array_equal(gradient("mosaic_gpu"), gradient("reference"))


def test_a_wrong_epilogue_does_not_pass():
    """What the bounds are for: gate and up in each other's place, no silu, and a neighbour's scale."""
    case = cases.case("wrong", 64, 128, 256, fp8=False)
    gate, up, hidden = cases.expected(case)
    for wrong in (up / (1 + np.exp(-up)) * gate, gate * up, np.roll(hidden, 1, axis=0), hidden * (1 + 2**-5)):
        with pytest.raises(AssertionError):
            cases.check(wrong.astype(cases.BF16), case)
    values, scales = map(np.asarray, quantize(jnp.asarray(hidden, jnp.float32)))
    cases.check_quantized(values, scales, case)
    assert np.asarray(dequantize(jnp.asarray(values), jnp.asarray(scales))).shape == hidden.shape
    with pytest.raises(AssertionError):
        cases.check_quantized(values, np.roll(scales, 1, axis=0), case)
