"""Products with int8 and four-bit weights: the ops, the kernels in the interpreter, and that they lower."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.backend import BackendError
from pallas_kernels.matmul import (
    INT4,
    INT8,
    Product,
    QTensor,
    choose,
    few_rows,
    grouped_matmul,
    matmul,
    pack_int4,
    quantize_weight,
    unpack_int4,
)
from pallas_kernels.matmul import config as tuning
from pallas_kernels.matmul.int4 import dequantize_int4, quantize_weight_int4
from pallas_kernels.matmul.int8 import dequantize_int8, quantize_weight_int8
from pallas_kernels.quantize import quantize_int8
from tests.kernels.cases import integer_matmul as cases

INT8_CASES = {case.name.split(",")[0]: case for case in cases.tiny(cases.int8)}
INT4_CASES = {case.name.split(",")[0]: case for case in cases.tiny(cases.int4)}
SMALL_INT8 = tuning.FewRows(tile=8, rows=64, blocks=2, stages=2, ctas=2)
SMALL_INT4 = tuning.FewRowsInt4(tile=8, stages=2, ctas=2)
of = jax.ShapeDtypeStruct


@pytest.fixture
def small_configs(monkeypatch):
    """For kernels through the ops in the interpreter."""
    monkeypatch.setattr(tuning, "few_rows", lambda *_: SMALL_INT8)
    monkeypatch.setattr(tuning, "few_rows_int4", lambda *_: SMALL_INT4)


def plan_of(case):
    """The plan's arguments of a function."""
    return () if case.plan is None else (jnp.asarray(case.plan.tile_expert), jnp.int32(case.plan.used))


def packed(case):
    return pack_int4(*map(jnp.asarray, case.weight))


def weight_of(case):
    """As the ops take it."""
    if len(case.weight) == 3:
        return QTensor(*packed(case), INT4)
    return QTensor(*map(jnp.asarray, case.weight), INT8)


int8_product = functools.partial(few_rows.matmul, stage=INT8.few_rows)


def int4_product(x, *others, **options):
    return few_rows.matmul(x, None, *others, stage=INT4.few_rows, **options)


# ---- weights -----------------------------------------------------------------------------------------------------


def test_int8_weights_are_the_nearest():
    weight = np.random.default_rng(0).standard_normal((2, 3, 256), np.float32)
    weight[0, 1] = 0
    values, scales = quantize_weight_int8(jnp.asarray(weight))
    assert (values.dtype, scales.shape) == (jnp.int8, (2, 3))
    assert np.abs(np.asarray(values, int)).max(axis=-1).tolist() == [[127, 0, 127], [127] * 3]
    error = np.abs(np.asarray(dequantize_int8(values, scales)) - weight)
    assert (error <= 0.501 * np.asarray(scales)[..., None]).all()


def test_int4_weights_are_the_nearest():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((2, 3, 256), np.float32) + np.array([[0], [2], [-9]], np.float32)
    weight[:, 0, 7] = 0
    values, words = quantize_weight_int4(jnp.asarray(weight))
    assert (values.shape, values.dtype, words.shape, words.dtype) == ((2, 3, 128), jnp.uint8, (2, 2, 3), jnp.uint32)
    error = np.abs(np.asarray(dequantize_int4(values, words)) - weight).reshape(2, 3, 2, 128)
    scales = np.asarray(unpack_int4(values, words)[1], np.float32)
    assert (error <= 0.54 * scales[..., None]).all()
    assert (error[:, 0, 0, 7] == 0).all()


def test_packing_is_undone_exactly():
    case = INT4_CASES["experts"]
    for part, got in zip(case.weight, unpack_int4(*packed(case)), strict=True):
        assert got.dtype == part.dtype
        np.testing.assert_array_equal(np.asarray(got).view(np.uint8), part.view(np.uint8))


def test_what_a_thread_loads_is_what_it_multiplies():
    """A lane of a quad has 16 bytes. From nibbles i and i + 4 of a word it makes a pair of neighbours along K, which
    begins at 2 * lane of 8; of four such pairs, each two are for one step of 16 of K.
    """
    values = jnp.arange(128, dtype=jnp.uint8)[None]
    halves = [
        pack_int4(part, jnp.ones((1, 1), jnp.bfloat16), jnp.zeros((1, 1), jnp.uint8))[0]
        for part in (values & 15, values >> 4)
    ]
    low, high = (np.stack([np.asarray(half)[0] & 15, np.asarray(half)[0] >> 4], -1).reshape(-1) for half in halves)
    k = (low + 16 * high.astype(int)).reshape(4, 4, 8)  # lane, word, nibble
    for lane in range(4):
        for word in range(4):
            for i in range(4):
                first = 32 * word + 8 * i + 2 * lane
                assert [k[lane, word, i], k[lane, word, i + 4]] == [first, first + 1]


# ---- the ops -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 200])
def test_int8_reference(rows, dtype):
    case = cases.int8("", rows, 64, 512)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, 512)), dtype)
    quantised, x_scales = map(np.asarray, quantize_int8(x))
    got = matmul(x, weight_of(case))
    assert got.dtype == dtype
    expected = cases.expected_int8(cases.Case("", quantised, case.weight, None, x_scales))
    np.testing.assert_array_equal(got, np.asarray(jnp.asarray(expected, dtype)))
    exact = np.asarray(x, np.float64) @ np.asarray(dequantize_int8(*map(jnp.asarray, case.weight)), np.float64).T
    rms = np.sqrt(((np.asarray(got, np.float64) - exact) ** 2).mean() / (exact**2).mean())
    assert 1e-4 < rms < 1.5e-2  # a step is about 3 / 127 of x's spread


@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float32, 1e-6), (jnp.bfloat16, 3e-3)])
@pytest.mark.parametrize("rows", [3, 150])
def test_int4_reference(rows, dtype, limit):
    case = cases.int4("", rows, 64, 512)
    expected = cases.expected_int4(case)
    got = matmul(jnp.asarray(case.x, dtype), weight_of(case))
    assert got.dtype == dtype
    error = np.asarray(got, np.float64) - expected
    assert np.sqrt((error**2).mean() / (expected**2).mean()) <= limit


@pytest.mark.parametrize("name", ["experts"])
@pytest.mark.parametrize("used", [True, False])
def test_grouped_references(name, used):
    case, small = INT8_CASES[name], INT4_CASES[name]
    plan = {"used_tiles": plan_of(case)[1]} if used else {}
    x = jnp.asarray(np.where(np.isnan(small.x.astype(np.float32)), 0, small.x.astype(np.float32)))
    got = np.asarray(grouped_matmul(x, weight_of(case), plan_of(case)[0], **plan))[: case.written]
    quantised, x_scales = map(np.asarray, quantize_int8(x))
    np.testing.assert_array_equal(got, cases.expected_int8(cases.Case("", quantised, case.weight, case.plan, x_scales)))
    got = np.asarray(grouped_matmul(x, weight_of(small), plan_of(small)[0], **plan))[: small.written]
    np.testing.assert_allclose(got, cases.expected_int4(small), rtol=0, atol=1e-4)


@pytest.mark.interpret
def test_kernels_through_the_ops(small_configs, capfd):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 512)), jnp.bfloat16)
    weight = weight_of(INT8_CASES["part of a tile"])
    got, expected = (matmul(x, weight, backend=backend) for backend in ("interpret", "reference"))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(expected, np.float32))
    weight = weight_of(INT4_CASES["part of a tile"])
    got, expected = (matmul(x, weight, backend=backend) for backend in ("interpret", "reference"))
    assert got.dtype == jnp.bfloat16
    difference = np.asarray(got, np.float64) - np.asarray(expected, np.float64)
    assert np.sqrt((difference**2).mean() / (np.asarray(expected, np.float64) ** 2).mean()) <= 3e-3
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.interpret
def test_grouped_kernels_through_the_ops(small_configs, capfd):
    case = INT8_CASES["experts"]
    experts, used = plan_of(case)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(case.x.shape), jnp.bfloat16)
    int8, int4 = weight_of(case), weight_of(INT4_CASES["experts"])
    got, expected = (
        np.asarray(grouped_matmul(x, int8, experts, used_tiles=used, backend=backend), np.float32)[: case.written]
        for backend in ("interpret", "reference")
    )
    np.testing.assert_array_equal(got, expected)
    got, expected = (
        np.asarray(grouped_matmul(x, int4, experts, used_tiles=used, backend=backend), float)
        for backend in ("interpret", "reference")
    )
    difference = (got - expected)[: case.written]
    assert np.sqrt((difference**2).mean() / (expected[: case.written] ** 2).mean()) <= 3e-3
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize("grouped", [False, True])
def test_gradients(grouped, monkeypatch):
    """With kernels that cannot run here: only their gradients are asked for. int8's is straight through."""
    name = "experts" if grouped else "part of a tile"

    def nothing(x, *_, dtype, **__):
        return jnp.zeros((len(x), 128), dtype)

    monkeypatch.setattr(few_rows, "matmul", nothing)
    case = INT8_CASES[name]
    # No NaN here: all rows and experts take part.
    eight = QTensor(jnp.asarray(case.weight[0]), jnp.full(case.weight[1].shape, 0.01), INT8)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(case.x.shape), jnp.bfloat16)
    plan = plan_of(case)[:1]
    for weight in (eight, quantize_weight(eight.dequantize(), "int4")):

        def gradient(backend, weight=weight):
            op = grouped_matmul if grouped else matmul
            return jax.jit(jax.grad(lambda x: op(x, weight, *plan, backend=backend).astype(jnp.float32).sum()))(x)

        np.testing.assert_array_equal(gradient("mosaic_gpu"), gradient("reference"))
        expected = np.asarray(weight.dequantize(), np.float64).sum(axis=-2)
        if grouped:
            expected = np.repeat(expected[case.plan.tile_expert], case.plan.tile, axis=0)
        else:
            expected = np.broadcast_to(expected, x.shape)
        got = np.asarray(gradient("reference"), np.float64)
        assert np.sqrt(((got - expected) ** 2).mean() / (expected**2).mean()) <= 5e-3


# ---- the kernels -------------------------------------------------------------------------------------------------


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("name", "rows", "warpgroups", "blocks", "ctas", "more"),
    [
        ("one row", 32, 1, 4, 3, {}),
        ("part of a tile", 64, 1, 2, 2, {}),
        ("a whole tile", 64, 1, 1, 1, {}),
        ("one row", 128, 2, 2, 1, {}),
        ("experts", 64, 1, 2, 3, {}),
        ("nothing", 64, 1, 2, 2, {}),
        # Strips and tiles are those of FP8, whose tests have more of them. Here the last strip ends past the weight,
        # and warpgroups share rows and take different tokens.
        ("part of a tile", 144, 3, 2, 1, {}),
        ("experts of two parts", 48, 4, 2, 2, {"tile": 16, "token_parts": 2}),
        ("two tiles' worth", 24, 2, 2, 2, {"tile": 16, "token_parts": 2}),
    ],
)
def test_int8_kernel_in_the_interpreter(name, rows, warpgroups, blocks, ctas, more, capfd):
    case = INT8_CASES[name]
    arguments = map(jnp.asarray, (case.x, case.x_scales, *case.weight))
    how = {"tile": 8, "stages": 2, **more}
    config = tuning.FewRows(rows=rows, warpgroups=warpgroups, blocks=blocks, ctas=ctas, **how)
    got = int8_product(*arguments, *plan_of(case), dtype=jnp.float32, config=config, interpret=mosaic.interpreter())
    assert got.shape == (len(case.x), case.weight[0].shape[-2])
    np.testing.assert_array_equal(np.asarray(got)[: case.written], cases.expected_int8(case))
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("case", "rows", "ctas", "depth"),
    [
        (INT4_CASES["one row"], 64, 1, 1),
        (INT4_CASES["part of a tile"], 32, 3, 1),
        (INT4_CASES["a whole tile"], 64, 2, 2),
        (cases.int4("more than a tile", 12, 64, 512), 64, 2, 1),
        (INT4_CASES["experts"], 64, 3, 1),
        (cases.int4("tiles in parts", cases.Plan({0: 3, 2: 17}, 3, 16, spare=1), 64, 512), 64, 2, 1),
        (INT4_CASES["nothing"], 64, 2, 1),
        (INT4_CASES["part of a tile"], 56, 2, 1),  # the last strip ends past the weight
        (INT4_CASES["one row"], 48, 2, 2),
        (INT4_CASES["experts"], 48, 3, 1),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_int4_kernel_in_the_interpreter(case, rows, ctas, depth, capfd):
    config = tuning.FewRowsInt4(tile=8, rows=rows, stages=2, ctas=ctas, depth=depth)
    how = {"dtype": jnp.float32, "config": config, "interpret": mosaic.interpreter()}
    got = int4_product(jnp.asarray(case.x), *packed(case), *plan_of(case), **how)
    assert got.shape == (len(case.x), case.weight[0].shape[-2])
    expected = cases.expected_int4(case)
    np.testing.assert_allclose(
        np.asarray(got)[: case.written], expected, rtol=0, atol=1e-6 * np.abs(expected).max(initial=0)
    )
    assert "RACE DETECTED" not in capfd.readouterr().out


def lower(f, *arguments):
    return jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",))


PLAN = of((3,), jnp.int32), of((), jnp.int32)


@pytest.mark.parametrize("config", tuning.CONFIGS["few_rows"], ids=repr)
def test_every_config_lowers_for_int8(config):
    def arguments(rows, *experts):
        weight = of((*experts, 7168, 2048), jnp.int8), of((*experts, 7168), jnp.float32)
        return of((rows, 2048), jnp.int8), of((rows,), jnp.float32), *weight

    dense = functools.partial(int8_product, config=config, dtype=jnp.float32)
    lower(dense, *arguments(config.tile // 2 + 1))
    lower(functools.partial(int8_product, config=config), *arguments(3 * config.tile, 16), *PLAN)


def lowered_int8(config):
    """The dense product of nine rows."""
    weight = of((7168, 2048), jnp.int8), of((7168,), jnp.float32)
    x = of((9, 2048), jnp.int8), of((9,), jnp.float32)
    return lower(functools.partial(int8_product, config=config), *x, *weight)


@pytest.mark.parametrize(("rows", "warpgroups"), [(64, 2), (96, 4)])
def test_token_parts_lower_for_int8(rows, warpgroups):
    """Each warpgroup's product is of its own tokens."""
    how = {"warpgroups": warpgroups, "token_parts": 2, "blocks": 1, "stages": 6}
    lowered = lowered_int8(tuning.FewRows(tile=128, rows=rows, **how))
    assert set(re.findall(r"m64n(\d+)k32", lowered.as_text())) == {"64"}


@pytest.mark.parametrize("config", tuning.CONFIGS["few_rows_int4"], ids=repr)
def test_every_config_lowers_for_int4(config):
    def arguments(rows, *experts):
        weight = of((*experts, 7168, 1024), jnp.uint8), of((*experts, 16, 7168), jnp.uint32)
        return of((rows, 2048), jnp.bfloat16), *weight

    dense = functools.partial(int4_product, config=config, dtype=jnp.float32)
    for rows in (1, 2 * config.tile + 1):
        lower(dense, *arguments(rows))
    lower(functools.partial(int4_product, config=config), *arguments(12 * config.tile, 16), *PLAN)


@pytest.mark.parametrize("tile", INT4.few_tiles)
@pytest.mark.parametrize(("rows", "tiles"), [(64, 1), (2112, 1), (4096, 1), (4096, 8), (36864, 1)])
@pytest.mark.parametrize("columns", [1536, 2048])
def test_the_choice_for_int4_is_one_of_the_configs(tile, rows, tiles, columns):
    config = tuning.few_rows_int4(tile, rows, tiles, columns)
    assert columns % (128 * config.groups) == 0
    assert config in tuning.CONFIGS["few_rows_int4"]
    assert config.tile == tile
    assert tiles == 1 or rows % config.rows == 0


def test_layers_share_a_kernel():
    """One function in the lowered program, called twice."""

    def layers(x, experts, used, first, second, values, scales):
        for weight in (first, second):
            x = matmul(x, QTensor(weight, jnp.ones(512), INT8), backend="mosaic_gpu")
        for _ in range(2):
            x = grouped_matmul(x, QTensor(values, scales, INT4), experts, used_tiles=used, backend="mosaic_gpu")
        return x

    weight = of((512, 512), jnp.int8)
    four = of((2, 512, 256), jnp.uint8), of((2, 4, 512), jnp.uint32)
    text = lower(layers, of((24, 512), jnp.bfloat16), *PLAN, weight, weight, *four).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 2


# ---- what is not taken -------------------------------------------------------------------------------------------


def reason(scheme, rows, columns, depth, dtype, tile):
    tiles = None if tile is None else rows // tile
    shape = {"rows": rows, "columns": columns, "depth": depth, "tiles": tiles}
    return choose(Product(**shape, scheme=scheme, row_dtype=str(jnp.dtype(dtype))))


@pytest.mark.parametrize(
    ("rows", "columns", "depth", "dtype", "tile", "message"),
    [
        (0, 96, 512, jnp.bfloat16, None, "N a multiple of 64"),
        (1, 96, 512, jnp.bfloat16, None, "N a multiple of 64"),
        (8, 64, 640, jnp.bfloat16, 8, "K in multiples of 512"),
        (8, 96, 512, jnp.bfloat16, 8, "N in multiples of 64"),
        (1, 64, 512, jnp.float16, None, "dtype float16"),
        (48, 64, 512, jnp.bfloat16, 24, "tiles of 24 rows"),
        (1024, 64, 512, jnp.bfloat16, 8, None),
        (128, 64, 512, jnp.float32, None, None),
    ],
)
def test_what_the_int8_kernels_do_not_take(rows, columns, depth, dtype, tile, message):
    chosen = reason(INT8, rows, columns, depth, dtype, tile)
    assert chosen.kernel == "few_rows" if message is None else message in chosen.unsupported


@pytest.mark.parametrize(
    ("rows", "columns", "depth", "dtype", "tile", "message"),
    [
        (129, 64, 512, jnp.bfloat16, None, "1 to 128 rows"),
        (1, 64, 640, jnp.bfloat16, None, "K in multiples of 512"),
        (1, 96, 512, jnp.bfloat16, None, "N in multiples of 64"),
        (1, 64, 512, jnp.float32, None, "dtype float32"),
        (48, 64, 512, jnp.bfloat16, 24, "tiles of 24 rows"),
        (48, 64, 512, jnp.bfloat16, 48, "tiles of 48 rows"),
        (1024, 64, 512, jnp.bfloat16, 128, None),
        (128, 64, 512, jnp.bfloat16, None, None),
    ],
)
def test_what_the_int4_kernel_does_not_take(rows, columns, depth, dtype, tile, message):
    chosen = reason(INT4, rows, columns, depth, dtype, tile)
    assert chosen.kernel == "few_rows" if message is None else message in chosen.unsupported


def test_errors():
    x = jnp.zeros((2, 512), jnp.bfloat16)
    values, scales = jnp.zeros((64, 512), jnp.int8), jnp.zeros(64)
    packed, words = jnp.zeros((64, 256), jnp.uint8), jnp.zeros((4, 64), jnp.uint32)
    experts = jnp.zeros(2, jnp.int32)
    int8, int4 = QTensor(values, scales, INT8), QTensor(packed, words, INT4)
    int8_experts, int4_experts = (jax.tree.map(lambda array: array[None], weight) for weight in (int8, int4))
    with pytest.raises(ValueError, match=r"scales of float32 \(64,\), not of \(63,\)"):
        matmul(x, QTensor(values, scales[1:], INT8))
    with pytest.raises(ValueError, match=r"values int8 \[N, K\], not uint8"):
        matmul(x, QTensor(values.astype(jnp.uint8), scales, INT8))
    with pytest.raises(ValueError, match=r"scales of uint32 \(3, 64\)|last axes must agree"):
        matmul(x, QTensor(packed[:, 1:], words, INT4))
    with pytest.raises(ValueError, match=r"scales of uint32 \(4, 64\)"):
        matmul(x, QTensor(packed, words.T, INT4))
    with pytest.raises(ValueError, match="last axes must agree"):
        matmul(x[:, 1:], int4)
    with pytest.raises(ValueError, match=r"values int8 \[E, N, K\]"):
        grouped_matmul(x, int8, experts)
    with pytest.raises(ValueError, match="as many rows in each tile"):
        grouped_matmul(x[1:], int4_experts, experts)
    with pytest.raises(BackendError, match="kernel of matmul does not take x of shape"):
        matmul(jnp.zeros((129, 512), jnp.bfloat16), int4, backend="mosaic_gpu")
    with pytest.raises(BackendError, match="grouped_matmul does not take tiles of 1 rows"):
        grouped_matmul(x, int4_experts, experts, backend="mosaic_gpu")
    with pytest.raises(BackendError, match="grouped_matmul does not take tiles of 1 rows"):
        grouped_matmul(x, int8_experts, experts, backend="mosaic_gpu")
    with pytest.raises(BackendError, match="kernel of matmul does not take x of dtype float32"):
        matmul(x.astype(jnp.float32), int4, backend="mosaic_gpu")
