"""Keeping a routing plan: what is measured, on a small model."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv32_jax.config import ModelConfig
from dsv32_jax.experiments.studies.plan_reuse import agreement, measure, reusing
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.model.model import DeepseekV32
from pallas_kernels.moe_dispatch import route


@functools.cache
def small() -> LanguageModel:
    config = ModelConfig.tiny(quantization_config=None)
    return LanguageModel(DeepseekV32(config, nnx.Rngs(0)), config)


def test_a_plan_of_one_step_changes_nothing_and_a_longer_one_does():
    windows = np.random.default_rng(0).integers(0, small().config.vocab_size, (2, 24), np.int32)
    result = measure(small(), windows, (1, 4))
    once, four = result["reuse"]
    assert once["kl"] == pytest.approx(0, abs=1e-9) and once["top1_agreement"] == 1
    assert once["relative_perplexity"] == pytest.approx(0, abs=1e-6)
    assert four["kl"] > 1e-6


def test_tokens_take_the_choice_of_the_first_of_their_period():
    config = small().config
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.standard_normal((10, config.n_routed_experts)), jnp.float32)
    arrays = (logits, jnp.zeros(config.n_routed_experts))
    choice = {"num_groups": 4, "groups_kept": 2, "experts_per_token": 3, "normalize": True, "scaling_factor": 2.5}
    fresh, weights = route(*arrays, **choice)
    experts, reused = reusing(4)(*arrays, **choice)
    first = jnp.array([0, 4, 8])
    np.testing.assert_array_equal(experts, fresh[jnp.array([0, 0, 0, 0, 4, 4, 4, 4, 8, 8])])
    np.testing.assert_allclose(reused[first], weights[first], rtol=1e-5)


def test_the_same_period_is_the_same_part():
    assert small().with_parts(route=reusing(2)).options == small().with_parts(route=reusing(2)).options
    assert small().with_parts(route=reusing(2)).options != small().with_parts(route=reusing(4)).options


def test_agreement_is_a_share_of_each_choice():
    experts = np.array([[[0, 1], [1, 2], [3, 4]]])
    assert agreement(experts, 1, 5) == [0.25]
    assert agreement(experts, 2, 5) == [0.0]
