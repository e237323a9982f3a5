"""Inputs, counts and references of the mixture-of-experts cases."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.experiments.bench import dispatch, matmuls, moe_layer
from dsv32_jax.experiments.bench.cases import compiled, made
from dsv32_jax.experiments.bench.shapes import SHAPES, TINY
from pallas_kernels.matmul import FP8_BLOCK, dense
from pallas_kernels.matmul.shapes import GroupedMatmul
from pallas_kernels.quantize import dequantize


def named(op, name):
    return next(shape for shape in SHAPES[op] if shape.name == name)


def relative_error(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean())


def test_rows_are_shared_evenly_by_the_experts_in_use():
    shape = GroupedMatmul(name="x", experts=5, used=3, rows=30, columns=64, depth=64)
    plan, used_tiles = jax.jit(lambda: (plan := matmuls.plan_of(shape), plan.used_tiles))()
    assert plan.tile == 8 and matmuls.written_rows(shape) == 3 * 16
    assert int(used_tiles) == 6
    experts = np.asarray(plan.tile_expert)[:6]
    assert len(set(experts.tolist())) == 3 and (experts[::2] == experts[1::2]).all()
    row_token = np.asarray(plan.row_token)
    assert (row_token >= 0).sum() == 30 and row_token[48:].max() == -1


product = functools.cache(lambda shape: matmuls.build(shape, "reference"))
"""A case of `matmuls`, compiled once for all tests."""

BITS = {"fp8_block": (8, 8), "bf16": (16, 16), "int8": (16, 8), "int4": (16, 4)}
"""Of an element of a row and of a weight."""


@pytest.mark.parametrize(
    "shape", [*TINY["grouped_matmul"], *TINY["matmul"]], ids=lambda shape: f"{shape.op}-{shape.name}"
)
def test_counts_are_those_of_the_peers(shape):
    """The peers' own file counts weights, rows and results, without scales."""
    case = product(shape)
    of_row, of_weight = BITS[shape.scheme]
    weights = shape.columns * shape.depth * getattr(shape, "used", 1)
    counted = (of_weight * weights + of_row * shape.tokens * shape.depth) // 8 + 2 * shape.tokens * shape.columns
    assert counted <= case.bytes < 1.12 * counted  # four-bit weights have 4 bytes of scale and zero for each 64
    assert list(case.work.values()) == [2 * shape.tokens * shape.columns * shape.depth]
    assert list(case.work) == ["fp8" if of_weight == 8 else "bf16"]


@pytest.mark.parametrize("shape", TINY["grouped_matmul"], ids=lambda shape: shape.name)
def test_grouped_products_are_those_of_each_expert(shape):
    found = np.asarray(product(shape).run(), np.float64)

    def dequantized(key):
        x, weights, tile_expert, _ = matmuls.grouped_inputs(shape, key)
        if matmuls.scheme_of(shape) == FP8_BLOCK:
            x = dequantize(*x)
        return x, dense(weights, jnp.float32), tile_expert

    x, weights, tile_expert = made(dequantized)
    expert = np.repeat(np.asarray(tile_expert), len(found) // len(tile_expert))
    x, weights = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    for row in range(matmuls.written_rows(shape)):
        assert relative_error(found[row], weights[expert[row]] @ x[row]) < 0.02


def test_fewer_rows_of_a_reference_are_whole_shares():
    assert matmuls.fewer(65536, 64, 64) == 8192 and matmuls.fewer(65536, 256, 256) == 2048
    assert matmuls.fewer(8, 256, 8) == 8 and matmuls.fewer(3, 1, 3) == 3
    assert matmuls.fewer(1000, 4096, 24) == 120


def test_a_long_reference_says_how_many_rows_it_had(monkeypatch):
    monkeypatch.setattr(matmuls, "MASKED_ROWS", 12)
    shape = TINY["grouped_matmul"][0]
    case = matmuls.build_reference(shape)
    assert (case.tokens, shape.tokens) == (4, 10) and case.run().shape == (4, shape.columns)


def test_every_step_of_dispatch_runs_the_op():
    plan, gather, combine = (dispatch.build(shape, "reference") for shape in TINY["moe_dispatch"])
    shape = TINY["moe_dispatch"][0]
    weights, made = plan.run()
    assert weights.shape == (shape.tokens, shape.chosen)
    assert dispatch.plan_rows(shape) == made.row_token.size == gather.run()[0].shape[0]
    assert combine.run().shape == (shape.tokens, shape.width)


def test_forms_of_quantisation():
    for shape in TINY["quantize"]:
        values, scales = dispatch.build(shape, "reference").run()
        assert values.dtype == (jnp.int8 if shape.form == "int8" else jnp.float8_e4m3fn)
        powers = np.log2(np.asarray(scales))
        assert (powers == np.round(powers)).all() == (shape.form == "ue8m0")


@pytest.fixture(scope="module")
def layer_programs():
    """Tests of one layer share its programs: those of its inputs, and of itself."""
    moe_layer.layer_program.cache_clear()
    yield {}
    moe_layer.layer_program.cache_clear()


@pytest.fixture
def shared(layer_programs):
    with compiled(layer_programs):
        yield


@pytest.mark.usefixtures("shared")
def test_the_layer_computes_what_stands_beside_it():
    """With the same weights, up to the quantisation of rows."""
    shape = TINY["moe_layer"][0]
    ours, *others = (moe_layer.build(shape, "reference", form).run() for form in moe_layer.FORMS)

    def plain_of(weight):
        return dense(weight, jnp.float32).astype(jnp.bfloat16)

    def beside(key):
        x, layer = moe_layer.layer_inputs(shape, key, True, shape.tokens)  # the same as in a case
        plain = layer._replace(
            gate=plain_of(layer.gate).transpose(0, 2, 1),
            up=plain_of(layer.up).transpose(0, 2, 1),
            down=plain_of(layer.down).transpose(0, 2, 1),
            shared_gate=plain_of(layer.shared_gate),
            shared_up=plain_of(layer.shared_up),
            shared_down=plain_of(layer.shared_down),
        )
        return [
            moe_layer.in_bfloat16(dataclasses.replace(shape, beside=form), x, plain) for form in ("ragged_dot", "loop")
        ]

    ragged, loop = made(beside)
    assert others
    for same in others:
        assert relative_error(same, ours) < 1e-3
    assert relative_error(ragged, loop) < 0.01
    assert relative_error(ours, loop) < 0.06
    assert 0.05 < np.asarray(ours, np.float32).std() < 20  # neither vanishes nor overflows


@pytest.mark.usefixtures("shared")
def test_the_layer_s_bytes_count_the_experts_in_use():
    shape = named("moe_layer", "decode-1")
    one, nine = moe_layer.layer_bytes(shape, 1), moe_layer.layer_bytes(shape, 9)
    expert = 3 * 7168 * 2048
    assert expert < (nine - one) / 8 < 1.001 * expert
    assert one < 2.1 * expert
    tiny = TINY["moe_layer"][0]

    def inputs(key):
        x, layer = moe_layer.layer_inputs(tiny, key, True, tiny.tokens)
        return (x, layer), moe_layer.routed(tiny, moe_layer.logits_of(x, layer.router), layer.bias, "reference")[0]

    arguments, experts = made(inputs)
    assert moe_layer.experts_used(tiny, *arguments) == len(set(np.asarray(experts).ravel().tolist()))
    assert moe_layer.build(tiny, "reference").bytes == moe_layer.layer_bytes(
        tiny, moe_layer.experts_used(tiny, *arguments)
    )


@pytest.mark.usefixtures("shared")
def test_layers_that_stand_beside_different_things_share_a_program(monkeypatch):
    calls = []
    compile_ = moe_layer.compile_
    monkeypatch.setattr(moe_layer, "compile_", lambda *x: calls.append(1) or compile_(*x))
    moe_layer.layer_program.cache_clear()
    outputs = [moe_layer.build(shape, "reference").run() for shape in TINY["moe_layer"][:2]]
    moe_layer.layer_program.cache_clear()
    assert len(calls) == 1
    np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in outputs))
    assert jax.tree.leaves(outputs)[0].dtype == jnp.bfloat16
