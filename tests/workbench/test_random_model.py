"""Random weights as large runs make them."""

import jax
import numpy as np
import pytest

from dsv32_jax.config import ModelConfig
from dsv32_jax.experiments.workbench.random_model import layers_that_fit, random_model
from dsv32_jax.model.model import abstract_model


def test_leaves_are_those_of_the_model_and_of_its_size():
    config = ModelConfig.tiny()
    lm = random_model(config)
    of_model, expected = (jax.tree.leaves(model) for model in (lm.model, abstract_model(config)))
    assert [(x.shape, x.dtype) for x in of_model] == [(x.shape, x.dtype) for x in expected]
    weight = np.asarray(lm.model.layers[1].ffn.experts.gate.dequantize())
    assert abs(weight.std() / config.initializer_range - 1) < 0.05
    assert not np.array_equal(weight[0], weight[1])
    logits = lm.logits([[1, 2, 3]])
    assert np.isfinite(logits).all() and logits.std() > 0


@pytest.mark.parametrize(("free", "layers"), [(2 * 25 - 1, 4), (2 * 25, 5), (2 * 28 - 1, 5), (1, 4), (1e9, 61)])
def test_as_many_layers_as_fit(monkeypatch, free, layers):
    """Of 10 bytes and 3 a layer, in half of the free memory."""
    module = "dsv32_jax.experiments.workbench.random_model"
    monkeypatch.setattr(f"{module}.stored_bytes", lambda config: 10 + 3 * config.num_hidden_layers)
    monkeypatch.setattr(f"{module}.available_bytes", lambda: (free, "here"))
    assert layers_that_fit(0.5) == layers
