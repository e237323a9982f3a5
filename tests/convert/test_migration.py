"""Outliers of inputs moved into weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax import convert
from dsv32_jax.convert.calibration import calibrate, is_linear
from dsv32_jax.convert.migration import FOLDS, migrate
from dsv32_jax.convert.quantization import quantize_checkpoint, quantize_model, uniform
from dsv32_jax.convert.statistics import Statistics
from dsv32_jax.errors import UserError
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.model.cache import BLOCK_SIZE, KVCache
from dsv32_jax.model.model import StepContext, abstract_model, step
from dsv32_jax.model.params import named_parameters, replace_parameters
from pallas_kernels.matmul import dense, is_qtensor
from tests.convert.test_conversion import equal_models
from tests.harness import EXACT, Piece, flat_batch, load_golden, tables_of

OUTLIER = 64
"""How much larger planted channels are."""
RNG = np.random.default_rng(0)
WINDOWS = RNG.integers(0, 512, (2, 40))
HELD_OUT = RNG.integers(0, 512, 40)


def times(parameters, path, channels, factor, axis):
    """Some rows (-2), columns (-1) or entries (0) of a parameter multiplied."""
    array = np.array(parameters[path])
    index = [slice(None)] * array.ndim
    index[axis] = channels
    array[tuple(index)] *= np.asarray(factor, array.dtype)
    parameters[path] = jnp.asarray(array)


@pytest.fixture(scope="module")
def in_fp8():
    """Two layers of the golden model, one dense and one of experts."""
    model = load_golden("tiny128_fp8")
    short = abstract_model(dataclasses.replace(model.config, num_hidden_layers=2, num_nextn_predict_layers=0))
    parameters = named_parameters(model)
    return replace_parameters(short, {path: parameters[path] for path in named_parameters(short)})


@pytest.fixture(scope="module")
def plain(in_fp8):
    """With linears in float32, so that one compiled step serves before and after."""
    parameters = named_parameters(in_fp8).items()
    return replace_parameters(in_fp8, {p: dense(leaf, jnp.float32) if is_linear(p) else leaf for p, leaf in parameters})


@pytest.fixture(scope="module")
def planted(plain):
    """The same function, written out by hand with some channels of inputs much larger."""
    parameters = named_parameters(plain)
    for n in range(len(plain.layers)):
        layer = f"layers.{n}."
        attention = ("q_a", "kv_a", "indexer.k", "indexer.head_weights")
        ffn = ("gate", "up") if n == 0 else ("router", "experts.gate", "experts.up", "shared.gate", "shared.up")
        for norm, consumers in (
            ("attn_norm", [f"attn.{name}" for name in attention]),
            ("attn.q_a_norm", ["attn.q_b", "attn.indexer.q_b"]),
            ("ffn_norm", [f"ffn.{name}" for name in ffn]),
        ):
            channels = np.arange(3) * 31 + n
            times(parameters, layer + norm, channels, OUTLIER, 0)
            for name in consumers:
                times(parameters, layer + name, channels, 1 / OUTLIER, -1)
        for part in ("ffn.",) if n == 0 else ("ffn.shared.", "ffn.experts."):
            times(parameters, f"{layer}{part}up", np.arange(2) * 17 + n, OUTLIER, -2)
            times(parameters, f"{layer}{part}down", np.arange(2) * 17 + n, 1 / OUTLIER, -1)
        nope, v, head = plain.config.qk_nope_head_dim, plain.config.v_head_dim, 2
        times(parameters, f"{layer}attn.kv_b", head * (nope + v) + nope + 5 + n, OUTLIER, -2)
        times(parameters, f"{layer}attn.o", head * v + 5 + n, 1 / OUTLIER, -1)
    return replace_parameters(plain, parameters)


def found_in(model):
    return calibrate(LanguageModel(model, model.config, options=EXACT), WINDOWS)


@pytest.fixture(scope="module")
def statistics(planted):
    return found_in(planted)


@pytest.fixture(scope="module")
def migrated(planted, statistics):
    return migrate(planted, statistics)


def logits(model, options=EXACT):
    tables = tables_of(1, -(-len(HELD_OUT) // BLOCK_SIZE))
    batch = flat_batch([Piece(HELD_OUT)], tables)
    return np.asarray(step(model, batch, KVCache.create(model.config, tables.size, options), options)[0])


def test_the_model_stays_the_same(plain, planted, migrated):
    expected = logits(plain)
    assert np.abs(expected).max() > 0.1
    for model in (planted, migrated[0]):
        np.testing.assert_allclose(logits(model), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_the_mtp_layer_guesses_the_same():
    model, rng = load_golden("tiny128_fp8"), np.random.default_rng(1)
    statistics = {
        path: Statistics(
            jnp.float32(1), jnp.exp(rng.normal(0, 2, inputs)), jnp.zeros((*inputs, inputs[-1])), jnp.ones(65)
        )
        for path, leaf in named_parameters(model).items()
        if is_linear(path)
        for inputs in [(*leaf.shape[:-2], leaf.shape[-1])]
    }
    migrated, _ = migrate(model, statistics)
    ids, tables = jnp.asarray(HELD_OUT, jnp.int32), tables_of(1, 1)
    batch, states = flat_batch([Piece(HELD_OUT)], tables), rng.standard_normal((len(ids), model.config.hidden_size))

    @jax.jit
    def guesses(mtp):
        cache = KVCache.create(model.config, 1, EXACT, layers=model.config.num_hidden_layers + 1)
        return mtp(
            jnp.asarray(states, jnp.float32), ids, cache, StepContext(model.config, EXACT, batch, EXACT.seams())
        )[0]

    expected = guesses(model.mtp)
    np.testing.assert_allclose(guesses(migrated.mtp), expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    before, after = named_parameters(model.mtp), named_parameters(migrated.mtp)
    for name in FOLDS:
        path = f"layer.{name}"
        if path in before:
            assert (after[path] != dense(before[path], jnp.float32)).any(), path


@pytest.mark.parametrize("name", [name for consumers in FOLDS.values() for name in consumers])
def test_a_forgotten_consumer_would_be_seen(name, plain, planted, migrated):
    before, after = named_parameters(planted), named_parameters(migrated[0])
    forgotten = {path: before[path] for path in after if path.endswith(f".{name}")}
    assert forgotten
    expected = logits(plain)
    difference = logits(replace_parameters(planted, after | forgotten)) - expected
    assert np.abs(difference).max() > 1e-3 * np.abs(expected).max()


def test_factors_are_powers_of_two_nearest_to_equation_4(planted, statistics):
    before = named_parameters(planted)
    path, up = "layers.1.ffn.experts.down", "layers.1.ffn.experts.up"
    unseen = dataclasses.replace(statistics[path], largest=statistics[path].largest.at[3].set(0))
    model, _ = migrate(planted, {**statistics, path: unseen}, 0.8)
    after = named_parameters(model)
    exact = np.asarray(unseen.largest) ** 0.8 / np.abs(before[path]).max(1) ** 0.2
    exact[3] = 1  # an expert that the calibration did not reach
    exact[exact == 0] = 1
    factors = 2.0 ** np.round(np.log2(exact))
    assert len(np.unique(factors)) > 3
    np.testing.assert_array_equal(after[path], before[path] * factors[:, None])
    norm = np.asarray(before["layers.1.ffn_norm"] / after["layers.1.ffn_norm"])
    np.testing.assert_array_equal(after[up], before[up] * norm / factors[..., None])
    inputs = [statistics[f"layers.1.ffn.{part}"] for part in ("shared.gate", "experts.gate")]
    linears = [before[f"layers.1.ffn.{part}.{name}"] for part in ("shared", "experts") for name in ("gate", "up")]
    columns = np.max([np.abs(weight).reshape(-1, weight.shape[-1]).max(0) for weight in linears], 0)
    np.testing.assert_array_equal(inputs[0].largest, inputs[1].largest.max(0))
    np.testing.assert_array_equal(norm, 2.0 ** np.round(np.log2(inputs[0].largest ** 0.8 / columns**0.2)))


def test_quantised_linears_become_plain_and_the_rest_stays(in_fp8, planted, statistics, migrated):
    before, after = named_parameters(in_fp8), named_parameters(migrate(in_fp8, statistics)[0])
    of_planted = named_parameters(migrated[0])
    changed = {*FOLDS, *(name for consumers in FOLDS.values() for name in consumers)}
    for path, leaf in before.items():
        if path.startswith("layers.") and path.split(".", 2)[2] in changed:
            assert not is_qtensor(after[path]) and after[path].dtype == of_planted[path].dtype
            assert after[path].dtype == (jnp.float32 if is_qtensor(leaf) else leaf.dtype)
            now, was = (np.asarray(array, np.float32) for array in (after[path], dense(leaf, jnp.float32)))
            powers = np.log2(now[was != 0] / was[was != 0])
            np.testing.assert_array_equal(powers, np.round(powers))
        else:
            assert after[path] is leaf
    for name in ("ffn.router", "attn.indexer.head_weights"):
        assert after[f"layers.1.{name}"].dtype == jnp.bfloat16


def test_outliers_become_smaller(statistics, migrated):
    def spread(of_linear):
        largest = np.asarray(of_linear.largest)[np.asarray(of_linear.rows) > 0]  # not every expert is reached
        return largest.max(-1) / np.median(largest, -1)

    for path, before in statistics.items():
        if not path.endswith(".kv_b"):
            assert (spread(migrated[1][path]) < 0.5 * spread(before)).all() and (spread(before) > 10).all(), path


def test_statistics_are_those_of_the_migrated_model(statistics, migrated):
    model, returned = migrated
    calibrated = found_in(model)
    assert set(returned) == set(calibrated)
    for path, of_linear in calibrated.items():
        for field in ("rows", "largest", "moments"):
            exact = getattr(of_linear, field)
            bound = {"rtol": 1e-5, "atol": 1e-6 * np.abs(exact).max()}
            np.testing.assert_allclose(getattr(returned[path], field), exact, **bound, err_msg=path)
        if path.endswith(".kv_b"):
            assert returned[path] is statistics[path]
        else:
            assert returned[path].histogram.shape == (*of_linear.histogram.shape[:-1], 0)


def test_eight_bits_lose_less(plain, planted, migrated):
    """With inputs in int8 too; keys chosen by all, so that an error is no other choice of them."""
    dense_attention = dataclasses.replace(EXACT, attention="dense")
    expected = logits(plain, dense_attention)

    def relative_error(model):
        quantised = quantize_model(model, uniform(model, "int8"))
        error = logits(quantised, dataclasses.replace(dense_attention, act_quant=True)) - expected
        return np.sqrt(np.square(error).mean()) / expected.std()

    before, after = relative_error(planted), relative_error(migrated[0])
    assert after < 0.4 * before, (after, before)


def test_a_migrated_checkpoint(in_fp8, statistics, tmp_path):
    """What no scheme is asked for gets the one that it had."""
    convert.export_model(in_fp8, tmp_path / "source")
    model, migrated_statistics = migrate(in_fp8, statistics)
    schemes = {path: "int8" for path in uniform(model, "int8") if ".attn." in path}
    weights = named_parameters(model)
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", schemes, statistics=migrated_statistics, weights=weights)
    expected = quantize_model(model, uniform(model, "fp8_block") | schemes, migrated_statistics)
    assert equal_models(convert.load_hf(tmp_path / "out"), expected)


def test_refused_migrations(planted, statistics):
    with pytest.raises(UserError, match=r"strength: 1\.5; must be from 0 to 1"):
        migrate(planted, statistics, 1.5)
    without = {path: of for path, of in statistics.items() if path != "layers.1.ffn.shared.down"}
    with pytest.raises(UserError, match=r"layers\.1\.ffn\.shared\.down: no statistics"):
        migrate(planted, without)
