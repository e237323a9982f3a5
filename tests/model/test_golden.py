"""Parity with recorded outputs of the Hugging Face implementation, and of the official FP8 arithmetic.

The checks are functions of what the model computed: test_planted_bugs.py runs the same ones on broken models.
"""

import functools
from types import SimpleNamespace

import numpy as np
import pytest

from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.model import Options
from tests.harness import EXACT, Piece, as_sets, flat_batch, forward, layer_record, load_golden, load_oracle, tables_of

NAMES = ["tiny", "tiny128_bf16", "tiny128_fp8", pytest.param("kernel_widths", marks=pytest.mark.slow)]


def compute(name: str, options: Options = EXACT) -> list[SimpleNamespace]:
    """The prompts and their recorded continuations in one forward, float32 without activation quantisation."""
    oracle = load_oracle(name)
    rows = [
        np.concatenate([ids[:length], gen[:-1]])
        for ids, length, gen in zip(oracle.ids, oracle.lengths, oracle.gen, strict=True)
    ]
    return forward(load_golden(name), rows, options)


@functools.cache
def computed(name: str) -> list[SimpleNamespace]:
    return compute(name)


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_logits(results: list[SimpleNamespace], name: str) -> None:
    """Largest error at most 1e-3 of the logits' standard deviation, at prompt positions and along the continuation."""
    oracle = load_oracle(name)
    for b, (result, length) in enumerate(zip(results, oracle.lengths, strict=True)):
        expected = np.concatenate([oracle.logits[b, :length], oracle.gen_logits[b, 1:]])
        error = np.abs(result.logits - expected).max()
        assert error <= 1e-3 * expected.std(), f"row {b}: logits are off by {error:.2e}"


def check_greedy(results: list[SimpleNamespace], name: str) -> None:
    """The best token at every step of the recorded continuation is the recorded one."""
    oracle = load_oracle(name)
    for b, (result, length) in enumerate(zip(results, oracle.lengths, strict=True)):
        np.testing.assert_array_equal(result.logits[length - 1 :].argmax(-1), oracle.gen[b], err_msg=f"row {b}")


def check_hidden(results: list[SimpleNamespace], name: str) -> None:
    """The residual stream after the embedding and after each layer."""
    oracle = load_oracle(name)
    for b, (result, length) in enumerate(zip(results, oracle.lengths, strict=True)):
        for layer, (got, expected) in enumerate(zip(result.hidden, oracle.hidden[b], strict=True)):
            error = np.abs(got[:length] - expected[:length]).max()
            assert error <= 1e-3 * expected[:length].std(), f"row {b}: after {layer} layers off by {error:.2e}"


def check_topk(results: list[SimpleNamespace], name: str) -> None:
    """The indexer's chosen sets in every layer."""
    oracle = load_oracle(name)
    for b, (result, length) in enumerate(zip(results, oracle.lengths, strict=True)):
        for layer, record in enumerate(result.layers):
            expected = as_sets(oracle.topk[b, layer, :length])
            assert as_sets(record["topk"][:length]) == expected, f"row {b}, layer {layer}"


def check_index_scores(results: list[SimpleNamespace], name: str) -> None:
    """The indexer's scores of the first row, -inf where the key lies after the query."""
    oracle = load_oracle(name)
    length = oracle.lengths[0]
    for layer, (record, expected) in enumerate(zip(results[0].layers, oracle.index_scores, strict=True)):
        got, expected = record["index_scores"][:length, :length], expected[:length, :length]
        np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected), err_msg=f"layer {layer}")
        seen = np.isfinite(expected)
        error = np.abs(got[seen] - expected[seen]).max()
        assert error <= 1e-4 * np.abs(expected[seen]).max(), f"layer {layer}: index scores are off by {error:.2e}"


def check_experts(results: list[SimpleNamespace], name: str) -> None:
    """Chosen experts, and their weights in the same order."""
    oracle, config = load_oracle(name), load_golden(name).config
    for b, (result, length) in enumerate(zip(results, oracle.lengths, strict=True)):
        for at, record in enumerate(result.layers[config.first_k_dense_replace :]):
            order = np.argsort(record["experts"][:length], -1)
            experts = np.take_along_axis(record["experts"][:length], order, -1)
            weights = np.take_along_axis(record["expert_weights"][:length], order, -1)
            np.testing.assert_array_equal(experts, oracle.experts[b, at, :length], err_msg=f"row {b}, MoE layer {at}")
            np.testing.assert_allclose(weights, oracle.expert_weights[b, at, :length], atol=1e-4)


# ---- float32 against the Hugging Face implementation -----------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_logits(name):
    check_logits(computed(name), name)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens(name):
    check_greedy(computed(name), name)


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states(name):
    check_hidden(computed(name), name)


@pytest.mark.parametrize("name", NAMES)
def test_chosen_keys(name):
    check_topk(computed(name), name)


@pytest.mark.parametrize("name", NAMES)
def test_index_scores(name):
    check_index_scores(computed(name), name)


@pytest.mark.parametrize("name", NAMES)
def test_chosen_experts(name):
    check_experts(computed(name), name)


@pytest.mark.parametrize("name", NAMES)
def test_generate_gives_the_recorded_tokens(name):
    """Through the public facade: cached decoding, rows of different lengths."""
    oracle, model = load_oracle(name), load_golden(name)
    prompts = [ids[:length].tolist() for ids, length in zip(oracle.ids, oracle.lengths, strict=True)]
    generated = LanguageModel(model, model.config, None, EXACT).generate(
        prompts, max_new_tokens=oracle.gen.shape[1], temperature=0.0, ignore_eos=True
    )
    np.testing.assert_array_equal(generated.tokens, oracle.gen)


# ---- the official FP8 arithmetic, layer by layer ---------------------------------------------------------------------


def compute_official(options: Options) -> list[list[SimpleNamespace]]:
    """[layer][row]: each layer fed with the recorded stream; `update` is what it adds, and its record."""
    oracle, model = load_oracle("tiny128_fp8", "oracle_w8a8.npz"), load_golden("tiny128_fp8")
    rows = [ids[:length] for ids, length in zip(oracle.ids, oracle.lengths, strict=True)]
    batch = flat_batch([Piece(row, 0, n) for n, row in enumerate(rows)], tables_of(len(rows), 1))
    ends = np.cumsum([len(row) for row in rows])
    layers = []
    for layer in range(model.config.num_hidden_layers):
        hidden = np.concatenate([oracle.hidden[b, layer, : len(row)] for b, row in enumerate(rows)])
        cache = KVCache.create(model.config, len(rows), options)
        record = layer_record(model, layer, hidden, batch, cache, options)
        update = record["hidden"] - hidden
        layers.append([])
        for end, row in zip(ends, rows, strict=True):
            own = slice(end - len(row), end)
            layers[-1].append(
                SimpleNamespace(update=update[own], record={key: value[own] for key, value in record.items()})
            )
    return layers


def same_sets(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """bool [T]: whether row t holds the same indices in both."""
    return np.array([a == b for a, b in zip(as_sets(got), as_sets(expected), strict=True)])


def check_official(layers: list[list[SimpleNamespace]], tolerance: float = 0.01) -> None:
    """Relative rms of what a layer adds, where its choices agree; choices equal where the recorded gaps are clear."""
    oracle, config = load_oracle("tiny128_fp8", "oracle_w8a8.npz"), load_golden("tiny128_fp8").config
    for layer, rows in enumerate(layers):
        moe = layer - config.first_k_dense_replace
        errors, expected_updates = [], []
        for b, got in enumerate(rows):
            length = oracle.lengths[b]
            expected = oracle.hidden[b, layer + 1, :length] - oracle.hidden[b, layer, :length]
            agree = same_sets(got.record["topk"], oracle.topk[b, layer, :length])
            assert agree[oracle.index_gap[b, layer, :length] > 1e-3].all(), f"keys of layer {layer}, row {b}"
            if moe >= 0:
                experts = same_sets(got.record["experts"], oracle.experts[b, moe, :length])
                assert experts[oracle.route_gap[b, moe, :length] > 1e-3].all(), f"experts of layer {layer}, row {b}"
                agree &= experts
            assert agree.mean() > 0.9
            errors.append((got.update - expected)[agree])
            expected_updates.append(expected[agree])
        error, scale = (np.sqrt(np.mean(np.concatenate(x) ** 2)) for x in (errors, expected_updates))
        assert error <= tolerance * scale, f"layer {layer}: relative rms {error / scale:.2e}"


@pytest.mark.parametrize("absorb", [True, False])
def test_official_fp8_arithmetic(absorb):
    check_official(compute_official(Options(compute_dtype="float32", act_quant=True, absorb=absorb)))


def test_official_fp8_arithmetic_with_the_fp8_cache():
    """The record holds the same FP8 latents; only the rope keys are rounded further, to bfloat16, hence 2 %."""
    options = Options(compute_dtype="float32", act_quant=True, cache_dtype="fp8")
    check_official(compute_official(options), tolerance=0.02)


def test_the_official_check_would_notice_missing_quantisation():
    with pytest.raises(AssertionError):
        check_official(compute_official(Options(compute_dtype="float32", act_quant=False)))
