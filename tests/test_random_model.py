"""Random weights as large runs make them."""

import jax
import numpy as np

from dsv32_jax.config import ModelConfig
from dsv32_jax.model import abstract_model
from experiments.random_model import layers_that_fit, random_model, stored_bytes


def test_leaves_are_those_of_the_model_and_of_its_size():
    config = ModelConfig.tiny()
    lm = random_model(config)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract_model(config))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), lm.model) == shapes
    weight = np.asarray(lm.model.layers[1].ffn.experts.gate.dequantize())
    assert abs(weight.std() / config.initializer_range - 1) < 0.05
    assert not np.array_equal(weight[0], weight[1])
    logits = lm.logits([[1, 2, 3]])
    assert np.isfinite(logits).all() and logits.std() > 0


def test_as_many_layers_as_fit(monkeypatch):
    sizes = [stored_bytes(ModelConfig.full_width(n)) for n in (5, 6)]
    monkeypatch.setattr("experiments.random_model.available_bytes", lambda: (2 * (sizes[1] - 1), "here"))
    assert layers_that_fit(0.5) == 5
    monkeypatch.setattr("experiments.random_model.available_bytes", lambda: (2 * sizes[1], "here"))
    assert layers_that_fit(0.5) == 6
