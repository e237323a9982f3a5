"""The layer with experts on a GPU, weights in each scheme and plain: kernels against references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.config import ModelConfig
from dsv32_jax.experiments.studies.quantization_speed import FORMS, layer_in, numerics_of
from dsv32_jax.experiments.workbench.random_model import random_parameters


@pytest.mark.parametrize("tokens", [5, 300])
@pytest.mark.parametrize("form", FORMS)
def test_experts_by_kernels_equal_references(form, tokens):
    config = ModelConfig.tiny(hidden_size=512, moe_intermediate_size=512)
    moe = random_parameters(layer_in(config, FORMS[form]), 0.05)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((tokens, config.hidden_size)), jnp.bfloat16)
    valid = jnp.arange(tokens) % 5 != 3
    by = {}
    for backend in ("auto", "reference"):
        layer = jax.jit(lambda moe, backend=backend: moe(x, valid, config, numerics_of(backend)))
        poison = jax.block_until_ready([jnp.full((4096, 512), jnp.nan, jnp.bfloat16) for _ in range(3)])
        del poison
        by[backend] = np.asarray(layer(moe), np.float64)
    error = by["auto"] - by["reference"]
    assert np.isfinite(error).all()
    assert np.sqrt((error**2).mean()) <= 1e-2 * np.sqrt((by["reference"] ** 2).mean())
