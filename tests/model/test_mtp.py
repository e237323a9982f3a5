"""The multi-token-prediction layer against the float64 NumPy formulation."""

import jax
import numpy as np

from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.model import StepContext
from tests import numpy_model
from tests.harness import EXACT, Piece, flat_batch, load_golden, numpy_golden, tables_of


def test_mtp_forward():
    """Embedding half first, its own layer and norms, logits of token t + 2."""
    model, reference = load_golden("tiny128_fp8"), numpy_golden("tiny128_fp8")
    config, tokens = model.config, 30
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((tokens, config.hidden_size)).astype(np.float32)
    next_ids = rng.integers(0, config.vocab_size, tokens).astype(np.int32)
    batch = flat_batch([Piece(np.zeros(tokens, int))], tables_of(1, 1))
    cache = KVCache.create(config, 1, EXACT, layers=config.num_hidden_layers + 1)

    @jax.jit
    def forward(hidden, next_ids, batch, cache):
        return model.mtp(hidden, next_ids, cache, StepContext(config, EXACT, batch, EXACT.seams()))

    logits, cache = forward(hidden, next_ids, batch, cache)

    weights, last = reference.weights, config.num_hidden_layers
    prefix = f"model.layers.{last}."
    embedded = numpy_model.rms_norm(weights[prefix + "embed_tokens.weight"][next_ids], weights[prefix + "enorm.weight"])
    state = numpy_model.rms_norm(hidden.astype(float), weights[prefix + "hnorm.weight"])
    joined = np.concatenate([embedded, state], -1) @ weights[prefix + "eh_proj.weight"].T
    out, _ = reference.decoder_layer(joined, np.arange(tokens), last)
    normed = numpy_model.rms_norm(out, weights[prefix + "shared_head.norm.weight"])
    expected = normed @ weights[prefix + "shared_head.head.weight"].T
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3 * expected.std())
    assert np.asarray(cache.kv[last]).any() and not np.asarray(cache.kv[:last]).any()
