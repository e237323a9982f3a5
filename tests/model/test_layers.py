"""Each layer of the model against the float64 NumPy formulation, on the golden weights and random inputs."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.config import ModelConfig
from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.model import Options, StepContext
from dsv32_jax.model.numerics import Numerics
from dsv32_jax.model.rope import rope_angles, yarn_frequencies
from dsv32_jax.model.taps import Taps
from pallas_kernels.rowwise import hadamard, layer_norm, rms_norm, rope_half_split, rope_interleaved
from tests import numpy_model
from tests.harness import EXACT, Piece, as_sets, flat_batch, layer_record, load_golden, numpy_golden, tables_of

TOKENS = 70
"""Two blocks of the cache."""
NUMERICS = Numerics(act_quant=False, scale_fmt="ue8m0", backend="auto")
NAMES = ["tiny", "tiny128_fp8"]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_close(got, expected, tolerance: float = 1e-5) -> None:
    """Largest error relative to the largest value: float32 sums of a few hundred products."""
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=0, atol=tolerance * np.abs(expected).max())


# ---- norms, RoPE, YaRN, Hadamard -------------------------------------------------------------------------------------


def test_rms_norm():
    x, weight = random(5, 64) * 3, random(64, seed=1)
    assert_close(rms_norm(jnp.asarray(x), jnp.asarray(weight), 1e-6), numpy_model.rms_norm(x.astype(float), weight))


def test_layer_norm_has_mean_weight_and_bias():
    x, weight, bias = random(5, 64) * 3 + 2, random(64, seed=1), random(64, seed=2)
    expected = numpy_model.layer_norm(x.astype(float), weight, bias)
    assert_close(layer_norm(jnp.asarray(x), jnp.asarray(weight), jnp.asarray(bias), 1e-6), expected)


def test_the_norm_sees_the_float32_sum_not_the_rounded_one():
    residual, update = (jnp.asarray(random(4, 64, seed=s), jnp.bfloat16) for s in (0, 1))
    total, normed = NUMERICS.add_rms_norm(residual, update, jnp.ones(64), 1e-6)
    exact = np.asarray(residual, np.float64) + np.asarray(update, np.float64)
    np.testing.assert_array_equal(total, jnp.asarray(exact, jnp.bfloat16))
    expected = jnp.asarray(numpy_model.rms_norm(exact, np.ones(64)), jnp.bfloat16)
    assert np.mean(np.asarray(normed) == np.asarray(expected)) > 0.98  # but for values next to a rounding boundary
    rounded = rms_norm(total, jnp.ones(64), 1e-6)
    assert np.mean(np.asarray(rounded) == np.asarray(expected)) < 0.95


def test_yarn_values_of_the_released_model():
    config = ModelConfig.deepseek_v32()
    frequencies = yarn_frequencies(config)
    expected = {
        0: 1.0,
        10: 0.0562341325,
        11: 0.0390069266,
        16: 0.0055,
        22: 1.77827941e-4,
        23: 3.33380358e-5,
        31: 3.33380358e-6,
    }
    for pair, value in expected.items():
        assert frequencies[pair] == pytest.approx(value, rel=1e-6), pair
    assert config.softmax_scale == pytest.approx(0.1352337788608801, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_yarn_frequencies_and_softmax_scale(name):
    config, reference = load_golden(name).config, numpy_golden(name).config
    np.testing.assert_allclose(yarn_frequencies(config), numpy_model.yarn_frequencies(reference), rtol=1e-6)
    assert config.softmax_scale == pytest.approx(numpy_model.softmax_scale(reference), rel=1e-12)


@pytest.mark.parametrize("shape", [(TOKENS, 64), (TOKENS, 3, 64)])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(rope_interleaved, numpy_model.rope_interleaved), (rope_half_split, numpy_model.rope_half)],
    ids=["interleaved", "half-split"],
)
def test_rope(ours, theirs, shape):
    config, positions, x = load_golden("tiny128_fp8").config, np.arange(TOKENS) * 3, random(*shape)
    angle = positions[:, None] * numpy_model.yarn_frequencies(numpy_golden("tiny128_fp8").config)
    expected = theirs(x.astype(float), angle.reshape(TOKENS, *(1,) * (len(shape) - 2), 32))
    assert_close(ours(jnp.asarray(x), *rope_angles(config, jnp.asarray(positions))), expected, 3e-5)


def test_the_two_rope_layouts_differ():
    angles = rope_angles(load_golden("tiny128_fp8").config, jnp.arange(TOKENS))
    x = jnp.asarray(random(TOKENS, 64))
    assert float(jnp.abs(rope_interleaved(x, *angles) - rope_half_split(x, *angles)).max()) > 0.1


@pytest.mark.parametrize("dim", [16, 128])
def test_hadamard(dim):
    x = random(7, dim)
    assert_close(hadamard(jnp.asarray(x)), x.astype(float) @ numpy_model.hadamard(dim))
    assert_close(hadamard(hadamard(jnp.asarray(x))), x)


# ---- feed-forward ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("act_quant", [False, True])
def test_mlp(name, act_quant):
    if act_quant and name == "tiny":
        pytest.skip("no FP8 weights in tiny: act_quant changes nothing")
    model, reference = load_golden(name), numpy_golden(name, act_quant)
    x = random(9, model.config.hidden_size)
    numerics = Numerics(act_quant, "ue8m0", "auto")
    expected = reference.mlp(x.astype(float), "model.layers.0.mlp.")
    # A float32 sum next to a rounding boundary of e4m3 may fall on the other side.
    out = jax.jit(lambda ffn, x: ffn(x, numerics))(model.layers[0].ffn, x)
    assert_close(out, expected, 1e-2 if act_quant else 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_router(name):
    model, reference = load_golden(name), numpy_golden(name)
    layer = model.config.first_k_dense_replace
    x = random(40, model.config.hidden_size)
    experts, weights = jax.jit(lambda ffn, x: ffn.route(x, jnp.arange(40), model.config, NUMERICS))(
        model.layers[layer].ffn, x
    )
    expected, expected_weights = reference.router(x.astype(float), layer)
    order = np.argsort(experts, -1)
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(experts), order, -1), expected)
    assert_close(np.take_along_axis(np.asarray(weights), order, -1), expected_weights)


@pytest.mark.parametrize("name", NAMES)
def test_moe_with_padding(name):
    model, reference = load_golden(name), numpy_golden(name)
    layer = model.config.first_k_dense_replace
    x, valid = random(23, model.config.hidden_size), np.arange(23) % 5 != 2
    positions = jnp.where(valid, jnp.arange(23), -1)
    out = jax.jit(lambda ffn, x: ffn(x, positions, model.config, NUMERICS))(model.layers[layer].ffn, x)
    expected, _ = reference.moe(x.astype(float), layer)
    assert_close(np.asarray(out)[valid], expected[valid])
    only_shared = reference.mlp(x.astype(float), f"model.layers.{layer}.mlp.shared_experts.")
    assert_close(np.asarray(out)[~valid], only_shared[~valid])


# ---- attention and whole layers --------------------------------------------------------------------------------------


@functools.cache
def attention(name: str, options: Options) -> SimpleNamespace:
    """Layer 1's attention on random inputs: ours (out, record) and NumPy's (expected, expected_record)."""
    model = load_golden(name)
    x = random(TOKENS, model.config.hidden_size)
    batch = flat_batch([Piece(np.zeros(TOKENS, np.int32))], tables_of(1, 2))

    @jax.jit
    def run(mla, x, cache):
        seams = options.seams(Taps.of(dict.fromkeys(("topk", "index_scores", "attention"))))
        out, *_ = mla(x, 1, cache, StepContext(model.config, options, batch, seams))
        return out, seams.values

    cache = KVCache.create(model.config, 2, options)
    out, record = jax.tree.map(np.asarray, run(model.layers[1].attn, jnp.asarray(x), cache))
    golden = numpy_golden(name)
    reference = numpy_model.Model(
        golden.config, golden.weights, attention=options.attention, index_topk=options.index_topk
    )
    expected, expected_record = reference.attention_part(x.astype(float), np.arange(TOKENS), 1)
    return SimpleNamespace(out=out, record=record, expected=expected, expected_record=expected_record)


@pytest.mark.parametrize("name", NAMES)
def test_indexer_scores_and_choice(name):
    case = attention(name, EXACT)
    expected = case.expected_record["index_scores"]
    seen = np.isfinite(expected)
    got = case.record["index_scores"][:, :TOKENS]
    np.testing.assert_array_equal(np.isfinite(got), seen)
    assert_close(got[seen], expected[seen])
    assert as_sets(case.record["topk"]) == case.expected_record["topk"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attention_kind", ["sparse", "dense"])
@pytest.mark.parametrize("absorb", [True, False])
def test_mla(name, attention_kind, absorb):
    case = attention(name, Options(attention=attention_kind, absorb=absorb))
    assert_close(case.out, case.expected, 2e-5)


def test_index_topk_can_be_overridden():
    case = attention("tiny", Options(index_topk=3))
    assert as_sets(case.record["topk"]) == case.expected_record["topk"]
    assert max(map(len, as_sets(case.record["topk"]))) == 3
    assert_close(case.out, case.expected, 2e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layer", [0, -1], ids=["dense", "moe"])
def test_whole_layer(name, layer):
    model, reference = load_golden(name), numpy_golden(name)
    layer %= model.config.num_hidden_layers
    hidden = random(TOKENS, model.config.hidden_size, seed=5)
    batch = flat_batch([Piece(np.zeros(TOKENS, np.int32))], tables_of(1, 2))
    cache = KVCache.create(model.config, 2, EXACT)
    record = layer_record(model, layer, hidden, batch, cache, EXACT)
    expected, trace = reference.decoder_layer(hidden.astype(float), np.arange(TOKENS), layer)
    assert as_sets(np.asarray(record["topk"])) == trace["topk"]
    assert_close(record["hidden"] - hidden, expected - hidden, 3e-5)
    if "experts" in trace:
        np.testing.assert_array_equal(np.sort(record["experts"], -1), trace["experts"])
