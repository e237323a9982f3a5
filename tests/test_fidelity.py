"""Traces of runs, and what the comparison of two of them says."""

import dataclasses

import jax
import numpy as np
import pytest

from dsv32_jax import fidelity
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.model.model import Options
from tests.harness import EXACT, load_golden, load_oracle


def trace(options: Options) -> fidelity.Trace:
    model, oracle = load_golden("tiny"), load_oracle("tiny")
    return LanguageModel(model, model.config, None, options).trace(oracle.ids[0, : oracle.lengths[0]])


@pytest.fixture(scope="module")
def reference() -> fidelity.Trace:
    return trace(EXACT)


def test_trace_holds_the_recorded_choices(reference):
    oracle = load_oracle("tiny")
    length = int(oracle.lengths[0])
    np.testing.assert_array_equal(reference.topk, oracle.topk[0, :, :length])
    np.testing.assert_array_equal(reference.experts, oracle.experts[0, :, :length])
    np.testing.assert_allclose(reference.expert_weights, oracle.expert_weights[0, :, :length], atol=1e-4)
    np.testing.assert_allclose(reference.hidden, oracle.hidden[0, :, :length], atol=1e-3)
    np.testing.assert_allclose(reference.attention.sum(-1), 1, atol=1e-5)
    assert not np.triu(reference.attention, 1).any()


def test_a_run_against_itself(reference):
    result = fidelity.compare(reference, reference)
    assert result["kl"] == 0 and result["top1_agreement"] == 1 and result["logits_relative_rms"] == 0
    for layer in result["layers"]:
        assert layer["topk_recall"] == layer["topk_sets_equal"] == layer.get("expert_recall", 1) == 1
        assert layer["attention_mass"] == layer["attention_mass_reference"]
        assert 0 < layer["attention_mass"] < 1  # 8 of up to 38 keys


def test_fewer_keys_keep_less(reference):
    """With half the keys the first layer's sets are subsets: recall and mass can be computed by hand."""
    result = fidelity.compare(reference, trace(dataclasses.replace(EXACT, index_topk=4)))
    seen = np.minimum(np.arange(len(reference.logits)) + 1, 8)
    np.testing.assert_allclose(result["layers"][0]["topk_recall"], (np.minimum(seen, 4) / seen).mean())
    assert result["layers"][0]["attention_mass"] < result["layers"][0]["attention_mass_reference"]
    assert result["kl"] > 1e-3 and result["top1_agreement"] < 1


def test_dense_attention_is_another_model(reference):
    result = fidelity.compare(reference, trace(dataclasses.replace(EXACT, attention="dense")))
    assert result["layers"][0]["topk_recall"] == 1  # the first layer's indexer sees the same input
    assert result["layers"][0]["hidden_relative_rms"] > 1e-3 and result["kl"] > 1e-3


def test_recall_and_kl_by_hand():
    reference, chosen = np.array([[0, 2, -1], [1, -1, -1], [-1, -1, -1]]), np.array([[2, 3], [0, -1], [0, 1]])
    np.testing.assert_allclose(fidelity.recall(reference, chosen, 4), [0.5, 0, 1])
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    expected = 0.5 * np.log(2) - 0.25 * np.log(2)
    np.testing.assert_allclose(fidelity.kl_divergence(np.log(p)[None], np.log(q)[None] + 7), [expected])


def test_runs_of_different_tokens_are_refused(reference):
    shorter = jax.tree.map(lambda x: x, dataclasses.replace(reference, logits=reference.logits[:-1]))
    with pytest.raises(ValueError, match="runs differ in shape"):
        fidelity.compare(reference, shorter)


def test_one_layer_alone(reference):
    """Each layer on the recorded stream gives the recorded stream after it."""
    model = load_golden("tiny")
    m = LanguageModel(model, model.config, None, EXACT)
    for layer in range(model.config.num_hidden_layers):
        alone = m.run_layer(layer, reference.hidden[layer])
        np.testing.assert_allclose(alone["hidden"], reference.hidden[layer + 1], atol=1e-5)
        assert [set(row) for row in alone["topk"].tolist()] == [set(row) for row in reference.topk[layer].tolist()]
    with pytest.raises(ValueError, match=r"layer: 4; must be in 0\.\.3"):
        m.run_layer(4, reference.hidden[0])
