"""Statistics of linears' inputs, and models in other schemes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.convert import calibration
from dsv32_jax.convert.calibration import calibrate
from dsv32_jax.convert.quantization import quantize_model, uniform
from dsv32_jax.convert.rounding import round_int4
from dsv32_jax.convert.statistics import SMALLEST, Statistics
from dsv32_jax.errors import UserError
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.params import is_linear, named_parameters
from pallas_kernels.matmul import INT4, INT8, is_qtensor, quantize_weight
from pallas_kernels.rowwise import rms_norm
from tests.harness import EXACT, Piece, flat_batch, load_golden, tables_of


@pytest.fixture(scope="module")
def lm():
    model = load_golden("tiny128_fp8")
    return LanguageModel(model, model.config, options=EXACT)


@pytest.fixture(scope="module")
def windows(lm):
    return np.random.default_rng(0).integers(0, lm.config.vocab_size, (2, 40))


@pytest.fixture(scope="module")
def statistics(lm, windows):
    return calibrate(lm, windows)


def test_no_memory_for_it(lm, windows, monkeypatch):
    monkeypatch.setattr(calibration, "available_bytes", lambda: (1e6, "host memory"))
    with pytest.raises(UserError, match=r"calibration: linears in float32 .* of host memory; quantise without"):
        calibrate(lm, windows)


def test_statistics_of_rows():
    x = np.random.default_rng(0).standard_normal((50, 7)).astype(np.float32)
    x[3] = 0
    present = np.arange(50) < 40
    statistics, real = Statistics.of(jnp.asarray(x), jnp.asarray(present)), x[:40]
    assert statistics.rows == 40
    np.testing.assert_array_equal(statistics.largest, np.abs(real).max(0))
    np.testing.assert_allclose(statistics.moments, real.T @ real, rtol=1e-5, atol=1e-5)
    edges = 2.0 ** np.arange(SMALLEST, SMALLEST + statistics.histogram.size)
    counted = np.histogram(np.abs(real), edges)[0]
    np.testing.assert_array_equal(statistics.histogram, [7, *counted])
    for share in (0.5, 0.9, 1.0):
        bound = float(statistics.percentile(share))
        assert np.mean(np.abs(real) < bound) >= share > np.mean(np.abs(real) < bound / 2)


def test_every_linear_is_seen_and_nothing_else(lm, statistics):
    linears = {path for path in named_parameters(lm.model) if is_linear(path)}
    assert set(statistics) == linears and any(path.startswith("mtp.") for path in linears)
    in_fp8 = {path for path, leaf in named_parameters(lm.model).items() if is_qtensor(leaf)}
    assert in_fp8 == {path for path in named_parameters(lm.model) if is_linear(path)}


def test_the_first_layer_sees_the_normalised_embeddings(lm, windows, statistics):
    layer = lm.model.layers[0]
    x = rms_norm(lm.model.embed[windows.reshape(-1)].astype(jnp.float32), layer.attn_norm, lm.config.rms_norm_eps)
    expected = np.asarray(x, np.float64).T @ np.asarray(x, np.float64)
    for name in ("q_a", "kv_a", "indexer.k"):
        of_linear = statistics[f"layers.0.attn.{name}"]
        assert of_linear.rows == windows.size
        np.testing.assert_allclose(of_linear.moments, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
        np.testing.assert_allclose(of_linear.largest, np.abs(x).max(0), rtol=1e-5)


def test_the_mtp_layer_sees_each_token_with_the_next_one(lm, windows, statistics):
    mtp, eps, count = lm.model.mtp, lm.config.rms_norm_eps, windows.shape[1]
    expected = 0.0
    for window in windows:
        batch = flat_batch([Piece(window)], tables_of(1, 1))
        states = lm.model.states(batch, KVCache.create(lm.config, 1, EXACT), EXACT)[0]
        pair = (
            rms_norm(mtp.embed[window[1:]].astype(jnp.float32), mtp.enorm, eps),
            rms_norm(states, mtp.hnorm, eps)[:-1],
        )
        x = np.asarray(rms_norm(jnp.concatenate(pair, -1) @ mtp.eh_proj.T, mtp.layer.attn_norm, eps), np.float64)
        expected = expected + x.T @ x
    of_linear = statistics["mtp.layer.attn.kv_a"]
    assert of_linear.rows == len(windows) * (count - 1)
    np.testing.assert_allclose(of_linear.moments, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_experts_see_each_token_as_often_as_it_chooses(lm, windows, statistics):
    """The shared expert sees every token once."""
    chosen, last = lm.config.num_experts_per_tok, len(lm.model.layers) - 1
    shared, gate = (statistics[f"layers.{last}.ffn.{part}.gate"] for part in ("shared", "experts"))
    assert gate.rows.shape == (lm.config.n_routed_experts,) and gate.rows.sum() == chosen * windows.size
    scale = np.abs(shared.moments).max()
    np.testing.assert_allclose(gate.moments.sum(0), chosen * shared.moments, rtol=1e-4, atol=1e-4 * scale)
    np.testing.assert_allclose(gate.histogram.sum(0), chosen * shared.histogram, atol=2)
    np.testing.assert_array_equal(gate.largest.max(0), shared.largest)
    down = statistics[f"layers.{last}.ffn.experts.down"]
    np.testing.assert_array_equal(down.rows, gate.rows)
    assert (np.asarray(down.moments).any((1, 2)) == (np.asarray(gate.rows) > 0)).all()


def test_four_bits_are_rounded_for_what_was_seen(lm, statistics):
    """And by themselves where nothing was."""
    paths = ("layers.1.attn.q_b", "layers.1.ffn.experts.down", "mtp.layer.attn.q_b", "layers.0.attn.o")
    before, known_statistics = named_parameters(lm.model), {path: statistics[path] for path in paths[:3]}
    after = named_parameters(quantize_model(lm.model, dict.fromkeys(paths, "int4"), known_statistics))
    for path in paths:
        weight = before[path].dequantize()
        plain = quantize_weight(weight, "int4").values
        expected = round_int4(weight, known_statistics[path].moments).values if path in known_statistics else plain
        np.testing.assert_array_equal(after[path].values, expected)
        assert (path in known_statistics) == bool((after[path].values != plain).any())


def test_mixed_schemes_and_what_stays(lm):
    schemes = {"layers.0.attn.o": "int8", "layers.1.ffn.experts.gate": "int4", "layers.0.ffn.up": "bf16"}
    before, after = (named_parameters(m) for m in (lm.model, quantize_model(lm.model, schemes)))
    assert after["layers.0.attn.o"].scheme == INT8 and after["layers.1.ffn.experts.gate"].scheme == INT4
    np.testing.assert_array_equal(after["layers.0.ffn.up"], before["layers.0.ffn.up"].dequantize(jnp.bfloat16))
    for path in set(before) - set(schemes):
        for a, b in zip(jax.tree.leaves(before[path]), jax.tree.leaves(after[path]), strict=True):
            assert a is b


def test_uniform_schemes_are_for_every_linear(lm):
    schemes = uniform(lm.model, "int8")
    assert set(schemes.values()) == {"int8"} and set(schemes) == {p for p in named_parameters(lm.model) if is_linear(p)}


def test_refused_schemes(lm):
    with pytest.raises(UserError, match=r"layers\.1\.ffn\.router: no linear"):
        quantize_model(lm.model, {"layers.1.ffn.router": "int8"})
    with pytest.raises(
        UserError, match=r"layers\.0\.attn\.o: scheme 'int2'; must be one of fp8_block, int8, int4, bf16"
    ):
        quantize_model(lm.model, {"layers.0.attn.o": "int2"})
