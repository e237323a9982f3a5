"""Products with int8 and four-bit weights: the ops, the kernels in the interpreter, and that they lower."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic, tuning
from pallas_kernels.backend import BackendError
from pallas_kernels.quant_matmul import (
    dequantize_int4,
    dequantize_int8,
    few_rows_int4,
    few_rows_int8,
    grouped_int4_matmul,
    grouped_int8_matmul,
    int4_matmul,
    int8_matmul,
    pack_int4,
    quantize_weight_int4,
    quantize_weight_int8,
    unpack_int4,
)
from pallas_kernels.quantize import quantize_int8
from tests.kernels.cases import integer_matmul as cases

INT8 = {case.name.split(",")[0]: case for case in cases.tiny(cases.int8)}
INT4 = {case.name.split(",")[0]: case for case in cases.tiny(cases.int4)}
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
    case = INT4["experts"]
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
    got = int8_matmul(x, *map(jnp.asarray, case.weight))
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
    got = int4_matmul(jnp.asarray(case.x, dtype), *packed(case))
    assert got.dtype == dtype
    error = np.asarray(got, np.float64) - expected
    assert np.sqrt((error**2).mean() / (expected**2).mean()) <= limit


@pytest.mark.parametrize("name", ["experts"])
@pytest.mark.parametrize("used", [True, False])
def test_grouped_references(name, used):
    case, small = INT8[name], INT4[name]
    plan = {"used_tiles": plan_of(case)[1]} if used else {}
    x = jnp.asarray(np.where(np.isnan(small.x.astype(np.float32)), 0, small.x.astype(np.float32)))
    weight = list(map(jnp.asarray, case.weight))
    got = np.asarray(grouped_int8_matmul(x, *weight, plan_of(case)[0], **plan))[: case.written]
    quantised, x_scales = map(np.asarray, quantize_int8(x))
    np.testing.assert_array_equal(got, cases.expected_int8(cases.Case("", quantised, case.weight, case.plan, x_scales)))
    got = np.asarray(grouped_int4_matmul(x, *packed(small), plan_of(small)[0], **plan))[: small.written]
    np.testing.assert_allclose(got, cases.expected_int4(small), rtol=0, atol=1e-4)


@pytest.mark.interpret
def test_kernels_through_the_ops(small_configs, capfd):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 512)), jnp.bfloat16)
    weight = list(map(jnp.asarray, INT8["part of a tile"].weight))
    got, expected = (int8_matmul(x, *weight, backend=backend) for backend in ("interpret", "reference"))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(expected, np.float32))
    weight = packed(INT4["part of a tile"])
    got, expected = (int4_matmul(x, *weight, backend=backend) for backend in ("interpret", "reference"))
    assert got.dtype == jnp.bfloat16
    difference = np.asarray(got, np.float64) - np.asarray(expected, np.float64)
    assert np.sqrt((difference**2).mean() / (np.asarray(expected, np.float64) ** 2).mean()) <= 3e-3
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.interpret
def test_grouped_kernels_through_the_ops(small_configs, capfd):
    case = INT8["experts"]
    experts, used = plan_of(case)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(case.x.shape), jnp.bfloat16)
    int8 = [*map(jnp.asarray, case.weight), experts]
    got, expected = (
        np.asarray(grouped_int8_matmul(x, *int8, used_tiles=used, backend=backend), np.float32)[: case.written]
        for backend in ("interpret", "reference")
    )
    np.testing.assert_array_equal(got, expected)
    got, expected = (
        np.asarray(grouped_int4_matmul(x, *packed(INT4["experts"]), experts, used_tiles=used, backend=backend), float)
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

    for kernel in (few_rows_int8, few_rows_int4):
        monkeypatch.setattr(kernel, "grouped_matmul" if grouped else "matmul", nothing)
    case = INT8[name]
    # No NaN here: all rows and experts take part.
    values, scales = jnp.asarray(case.weight[0]), jnp.full(case.weight[1].shape, 0.01)
    four = quantize_weight_int4(dequantize_int8(values, scales))
    x = jnp.asarray(np.random.default_rng(0).standard_normal(case.x.shape), jnp.bfloat16)
    plan = plan_of(case)[:1]
    for op, weight in (
        (grouped_int8_matmul if grouped else int8_matmul, (values, scales)),
        (grouped_int4_matmul if grouped else int4_matmul, four),
    ):

        def gradient(backend, op=op, weight=weight):
            return jax.jit(jax.grad(lambda x: op(x, *weight, *plan, backend=backend).astype(jnp.float32).sum()))(x)

        np.testing.assert_array_equal(gradient("mosaic_gpu"), gradient("reference"))
        full = dequantize_int8(*weight) if weight is not four else dequantize_int4(*weight)
        expected = np.asarray(full, np.float64).sum(axis=-2)
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
        ("two tiles' worth", 24, 2, 2, 2, {"tile": 16, "token_parts": 2, "cluster": 2}),
    ],
)
def test_int8_kernel_in_the_interpreter(name, rows, warpgroups, blocks, ctas, more, capfd):
    case = INT8[name]
    arguments = map(jnp.asarray, (case.x, case.x_scales, *case.weight))
    kernel = few_rows_int8.matmul if case.plan is None else few_rows_int8.grouped_matmul
    how = {"tile": 8, "stages": 2, **more}
    config = tuning.FewRows(rows=rows, warpgroups=warpgroups, blocks=blocks, ctas=ctas, **how)
    got = kernel(*arguments, *plan_of(case), dtype=jnp.float32, config=config, interpret=mosaic.interpreter())
    assert got.shape == (len(case.x), case.weight[0].shape[-2])
    np.testing.assert_array_equal(np.asarray(got)[: case.written], cases.expected_int8(case))
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("case", "rows", "ctas", "depth"),
    [
        (INT4["one row"], 64, 1, 1),
        (INT4["part of a tile"], 32, 3, 1),
        (INT4["a whole tile"], 64, 2, 2),
        (cases.int4("more than a tile", 12, 64, 512), 64, 2, 1),
        (INT4["experts"], 64, 3, 1),
        (cases.int4("tiles in parts", cases.Plan({0: 3, 2: 17}, 3, 16, spare=1), 64, 512), 64, 2, 1),
        (INT4["nothing"], 64, 2, 1),
        (INT4["part of a tile"], 56, 2, 1),  # the last strip ends past the weight
        (INT4["one row"], 48, 2, 2),
        (INT4["experts"], 48, 3, 1),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_int4_kernel_in_the_interpreter(case, rows, ctas, depth, capfd):
    kernel = few_rows_int4.matmul if case.plan is None else few_rows_int4.grouped_matmul
    config = tuning.FewRowsInt4(tile=8, rows=rows, stages=2, ctas=ctas, depth=depth)
    how = {"dtype": jnp.float32, "config": config, "interpret": mosaic.interpreter()}
    got = kernel(jnp.asarray(case.x), *packed(case), *plan_of(case), **how)
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

    dense = functools.partial(few_rows_int8.matmul, config=config, dtype=jnp.float32)
    lower(dense, *arguments(config.tile // 2 + 1))
    lower(functools.partial(few_rows_int8.grouped_matmul, config=config), *arguments(3 * config.tile, 16), *PLAN)


def lowered_int8(config):
    """The dense product of nine rows."""
    weight = of((7168, 2048), jnp.int8), of((7168,), jnp.float32)
    x = of((9, 2048), jnp.int8), of((9,), jnp.float32)
    return lower(functools.partial(few_rows_int8.matmul, config=config), *x, *weight)


def test_clusters_lower_for_int8():
    lowered_int8(tuning.FewRows(tile=128, rows=112, warpgroups=2, blocks=2, stages=3, cluster=2))


@pytest.mark.parametrize(("rows", "warpgroups", "cluster"), [(64, 2, 1), (96, 4, 1), (96, 4, 2)])
def test_token_parts_lower_for_int8(rows, warpgroups, cluster):
    """Each warpgroup's product is of its own tokens."""
    how = {"warpgroups": warpgroups, "token_parts": 2, "blocks": 1, "stages": 6, "cluster": cluster}
    lowered = lowered_int8(tuning.FewRows(tile=128, rows=rows, **how))
    assert set(re.findall(r"m64n(\d+)k32", lowered.as_text())) == {"64"}


@pytest.mark.parametrize("config", tuning.CONFIGS["few_rows_int4"], ids=repr)
def test_every_config_lowers_for_int4(config):
    def arguments(rows, *experts):
        weight = of((*experts, 7168, 1024), jnp.uint8), of((*experts, 16, 7168), jnp.uint32)
        return of((rows, 2048), jnp.bfloat16), *weight

    dense = functools.partial(few_rows_int4.matmul, config=config, dtype=jnp.float32)
    for rows in (1, 2 * config.tile + 1):
        lower(dense, *arguments(rows))
    lower(functools.partial(few_rows_int4.grouped_matmul, config=config), *arguments(12 * config.tile, 16), *PLAN)


@pytest.mark.parametrize("tile", few_rows_int4.TILES)
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

    def layers(x, experts, used, first, second, packed, words):
        for weight in (first, second):
            x = int8_matmul(x, weight, jnp.ones(512), backend="mosaic_gpu")
        for _ in range(2):
            x = grouped_int4_matmul(x, packed, words, experts, used_tiles=used, backend="mosaic_gpu")
        return x

    weight = of((512, 512), jnp.int8)
    four = of((2, 512, 256), jnp.uint8), of((2, 4, 512), jnp.uint32)
    text = lower(layers, of((24, 512), jnp.bfloat16), *PLAN, weight, weight, *four).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 2


# ---- what is not taken -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "values", "dtype", "tile", "message"),
    [
        ((129, 512), (64, 512), jnp.bfloat16, None, "1 to 128 rows"),
        ((0, 512), (64, 512), jnp.bfloat16, None, "1 to 128 rows"),
        ((1, 640), (64, 640), jnp.bfloat16, None, "K in multiples of 512"),
        ((1, 512), (96, 512), jnp.bfloat16, None, "N in multiples of 64"),
        ((1, 512), (64, 512), jnp.float16, None, "dtype float16"),
        ((48, 512), (3, 64, 512), jnp.bfloat16, 24, "tiles of 24 rows"),
        ((1024, 512), (3, 64, 512), jnp.bfloat16, 8, None),
        ((128, 512), (64, 512), jnp.float32, None, None),
    ],
)
def test_what_the_int8_kernel_does_not_take(x, values, dtype, tile, message):
    reason = few_rows_int8.unsupported(of(x, dtype), of(values, jnp.int8), tile)
    assert (reason is None) if message is None else (message in reason)


@pytest.mark.parametrize(
    ("x", "values", "dtype", "tile", "message"),
    [
        ((129, 512), (64, 256), jnp.bfloat16, None, "1 to 128 rows"),
        ((1, 640), (64, 320), jnp.bfloat16, None, "K in multiples of 512"),
        ((1, 512), (96, 256), jnp.bfloat16, None, "N in multiples of 64"),
        ((1, 512), (64, 256), jnp.float32, None, "dtype float32"),
        ((48, 512), (3, 64, 256), jnp.bfloat16, 24, "tiles of 24 rows"),
        ((48, 512), (3, 64, 256), jnp.bfloat16, 48, "tiles of 48 rows"),
        ((1024, 512), (3, 64, 256), jnp.bfloat16, 128, None),
        ((128, 512), (64, 256), jnp.bfloat16, None, None),
    ],
)
def test_what_the_int4_kernel_does_not_take(x, values, dtype, tile, message):
    reason = few_rows_int4.unsupported(of(x, dtype), of(values, jnp.uint8), tile)
    assert (reason is None) if message is None else (message in reason)


def test_errors():
    x = jnp.zeros((2, 512), jnp.bfloat16)
    values, scales = jnp.zeros((64, 512), jnp.int8), jnp.zeros(64)
    packed, words = jnp.zeros((64, 256), jnp.uint8), jnp.zeros((4, 64), jnp.uint32)
    experts = jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match=r"scales of float32 \(64,\), not of float32 \(63,\)"):
        int8_matmul(x, values, scales[1:])
    with pytest.raises(ValueError, match=r"values of int8 \(64, 512\), not of uint8"):
        int8_matmul(x, values.astype(jnp.uint8), scales)
    with pytest.raises(ValueError, match=r"packed of uint8 \(64, 256\)"):
        int4_matmul(x, packed[:, 1:], words)
    with pytest.raises(ValueError, match=r"words of uint32 \(4, 64\)"):
        int4_matmul(x, packed, words.T)
    with pytest.raises(ValueError, match="groups of 128"):
        int4_matmul(x[:, 1:], packed, words)
    with pytest.raises(ValueError, match="three axes"):
        grouped_int8_matmul(x, values, scales, experts)
    with pytest.raises(ValueError, match="as many rows in each tile"):
        grouped_int4_matmul(x[1:], packed[None], words[None], experts)
    with pytest.raises(BackendError, match="int4_matmul does not take x of shape"):
        int4_matmul(jnp.zeros((129, 512), jnp.bfloat16), packed, words, backend="mosaic_gpu")
    with pytest.raises(BackendError, match="grouped_int4_matmul does not take tiles of 1 rows"):
        grouped_int4_matmul(x, packed[None], words[None], experts, backend="mosaic_gpu")
    with pytest.raises(BackendError, match="grouped_int8_matmul does not take tiles of 1 rows"):
        grouped_int8_matmul(x, values[None], scales[None], experts, backend="mosaic_gpu")
    with pytest.raises(BackendError, match="int4_matmul does not take x of dtype float32"):
        int4_matmul(x.astype(jnp.float32), packed, words, backend="mosaic_gpu")
