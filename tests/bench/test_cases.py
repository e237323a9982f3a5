"""Inputs and counts of the measured calls."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.experiments.bench import attention, cases, moe_layer, run
from dsv32_jax.experiments.bench.shapes import SHAPES, TINY
from pallas_kernels.cache_format import read_index_keys, read_latents
from pallas_kernels.sparse_mla.shapes import SparseMLA
from pallas_kernels.top_k.shapes import TopK

KEY = jax.random.key(3)


def named(op, name):
    return next(shape for shape in SHAPES[op] if shape.name == name)


def test_chosen_positions_are_different_and_everywhere():
    chosen = np.asarray(cases.chosen_positions(KEY, 5, 96, 32))
    assert chosen.shape == (5, 32) and all(len(set(row)) == 32 for row in chosen.tolist())
    assert chosen.min() >= 0 and chosen.max() < 96
    assert len({tuple(row) for row in chosen.tolist()}) == 5


def test_every_block_is_used_once():
    tables = np.asarray(cases.block_tables(KEY, 3, 256))
    assert tables.shape == (3, 4) and sorted(tables.ravel().tolist()) == list(range(12))


def test_last_tokens_and_what_they_see():
    sequence, positions = cases.last_tokens(6, 10, 2)
    assert sequence.tolist() == [0, 0, 0, 1, 1, 1] and positions.tolist() == [7, 8, 9, 7, 8, 9]
    assert cases.visible(6, 10, 2) == int((positions + 1).sum())


@pytest.mark.parametrize("form", ["bf16", "fp8"])
def test_caches_hold_finite_random_rows(form):
    kv = cases.latent_cache(KEY, 3, 128, 64, form)
    rows = np.asarray(read_latents(kv, cases.LAYER, jnp.array([[0, 1, 2]]), 64, jnp.float32))
    assert np.isfinite(rows).all() and rows.std() == pytest.approx(1 / 8, rel=0.05)
    keys, scales = read_index_keys(cases.index_cache(KEY, 3, 128), cases.LAYER, jnp.array([[0, 1, 2]]))
    assert np.asarray(keys, np.float32).std() == pytest.approx(1, rel=0.05)
    assert 0.5 <= float(scales.min()) < float(scales.max()) <= 1.5


def test_counts_are_those_of_the_peers():
    """The peers' own file counts 2.336 TFLOP for FlashMLA's prefill and these for DeepGEMM's."""
    assert cases.sparse_mla_work(named("sparse_mla", "prefill-4096x65536")) == 2336462209024
    pairs = cases.visible(4096, 65536, 1)
    assert pairs == sum(range(65536 - 4096 + 1, 65537))
    assert cases.row_bytes(named("sparse_mla", "decode-8x32768")) == 656


def test_bytes_count_each_cached_row_once():
    few = SparseMLA(name="x", tokens=1, context=4096, chosen=64, heads=1)
    own = few.heads * (2 * 1088 + 4) + 4 * 64
    assert cases.sparse_mla_bytes(few) == 64 * 1152 + own
    many = SparseMLA(name="x", tokens=4096, context=4096, chosen=64, heads=1)
    assert cases.sparse_mla_bytes(many) == 4096 * (1152 + own)


def test_attention_counts_what_early_tokens_lack():
    shape = TINY["attention"][0]  # 128 tokens, 32 chosen: token t attends to min(t + 1, 32)
    keys = sum(min(t + 1, 32) for t in range(128))
    assert attention.chosen_work(shape) == 2 * keys * 2 * 1088
    assert attention.power_of_two(64) == 64 and attention.power_of_two(65) == 128


def test_top_k_case_runs_the_op():
    case = cases.build(TopK(name="x", tokens=3, context=256, chosen=16), "reference")
    assert case.run().shape == (3, 16) and case.work == {} and case.bytes == 4 * 3 * (256 + 16)
    assert case.backend == "reference" and case.memory["output"] == 4 * 3 * 16


def test_a_long_reference_runs_on_fewer_tokens(monkeypatch):
    built = []
    monkeypatch.setattr(cases, "build", lambda shape, backend: built.append((shape.tokens, backend)))
    cases.build_reference(named("sparse_mla", "prefill-4096x65536"))
    cases.build_reference(named("sparse_mla", "decode-128x32768"))
    cases.build_reference(named("top_k", "4096x65536"))
    assert built == [(256, "reference"), (128, "reference"), (4096, "reference")]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [s for shapes in TINY.values() for s in shapes], ids=lambda s: f"{s.op}-{s.name}")
def test_every_tiny_case_runs_twice_with_its_reference(shape):
    module = run.module_of(shape)
    for case in (module.build(shape, "reference"), module.build_reference(shape)):
        for leaf in jax.tree.leaves([case.run(), case.run()][1]):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                assert not jnp.isnan(leaf).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [s for shapes in SHAPES.values() for s in shapes if s.kernel], ids=lambda s: f"{s.op}-{s.name}"
)
def test_every_named_shape_lowers_to_kernels(shape, monkeypatch):
    """On a GPU the reference would be a silent answer to a shape that a kernel does not take."""
    module = run.module_of(shape)
    lowered = []

    def lower(f, *arguments, donate=()):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
        lowered.append(jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text())
        return cases.Program(lambda *_: None, "mosaic_gpu", {"temporary": 0, "output": 0})

    caches = attention.sparse_program.cache_clear, moe_layer.layer_program.cache_clear
    monkeypatch.setattr(module, "compile_", lower)
    for clear in caches:
        clear()
    jax.eval_shape(lambda: (module.build(shape, "mosaic_gpu"), 0)[1])
    for clear in caches:
        clear()
    assert lowered and all("mosaic_gpu" in text for text in lowered)


def test_prompts_share_the_programs_of_equal_chunks(monkeypatch):
    widths = []

    def compile_(f, *avals):
        widths.append((avals[0].shape[0], avals[5].shape[1]))
        return cases.Program(lambda *_: None, "reference", {"temporary": 0, "output": 0})

    monkeypatch.setattr(attention, "compile_", compile_)
    attention.sparse_program.cache_clear()
    short, long = (
        dataclasses.replace(TINY["attention"][0], context=length, tokens=length, chunk=64, room=512)
        for length in (128, 320)
    )
    for shape in (short, long):
        attention.build(shape, "reference")
    attention.sparse_program.cache_clear()
    assert widths == [(64, 1), (64, 2), (64, 4), (64, 5)]


def test_programs_of_a_case_are_kept_by_function_and_shapes():
    def double(x):
        return 2 * x

    programs = {}
    with cases.compiled(programs):
        first = cases.compile_(double, jnp.ones(3))
        assert cases.compile_(double, jax.ShapeDtypeStruct((3,), jnp.float32)) is first
        assert cases.compile_(double, jnp.ones(4)) is not first
        assert cases.compile_(lambda x: 3 * x, jnp.ones(3)) is not first
    assert len(programs) == 3
    assert cases.compile_(double, jnp.ones(3)) is not first  # nothing is kept outside
    assert first.call(jnp.ones(3)).tolist() == [2, 2, 2]
