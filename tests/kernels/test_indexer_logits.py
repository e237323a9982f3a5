"""Indexer scores over a paged context, and the selection made from them."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cache_write import cache_write, index_block_bytes
from pallas_kernels.index_select import index_select
from pallas_kernels.indexer_logits import indexer_logits
from pallas_kernels.quantize import quantize
from tests import numpy_model

TOKENS, HEADS, DIM, BLOCKS = 6, 3, 128, 5
TABLES = np.array([[4, 1], [2, -1]], np.int32)
SEQUENCE = np.array([0, 1, 0, 1, 0, 0], np.int32)
POSITIONS = np.array([0, 63, 70, 5, 127, -1], np.int32)


def case(form: str):
    """Arguments of the ops, and the scores of float64 NumPy."""
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((TOKENS, HEADS, DIM)).astype(np.float32)
    weights = rng.standard_normal((TOKENS, HEADS)).astype(np.float32)
    keys = rng.standard_normal((BLOCKS * 64, DIM)).astype(np.float32)
    fp8 = form == "fp8"
    index = jnp.zeros((1, BLOCKS, index_block_bytes(DIM)), jnp.uint8) if fp8 else jnp.zeros((1, BLOCKS, 64, DIM))
    _, index = cache_write(
        jnp.zeros((1, BLOCKS, 64, 9)), index, 0, jnp.arange(len(keys)), keys[:, :8], keys[:, :1], keys
    )
    key_scale = np.ones(len(keys))
    q = queries
    if fp8:
        keys, scale = numpy_model.quantise_rows(keys, "ue8m0")
        key_scale = scale[:, 0]
        q, _ = quantize(jnp.asarray(queries), "ue8m0")
        queries = np.asarray(q, np.float64)
    expected = np.full((TOKENS, TABLES.shape[1] * 64), -np.inf)
    for t in range(TOKENS):
        for s in range(POSITIONS[t] + 1):
            slot = TABLES[SEQUENCE[t], s // 64] * 64 + s % 64
            dots = np.maximum(queries[t].astype(np.float64) @ keys[slot], 0)
            expected[t, s] = dots @ weights[t] * key_scale[slot]
    arguments = (jnp.asarray(q), jnp.asarray(weights), index, 0, *map(jnp.asarray, (TABLES, SEQUENCE, POSITIONS)))
    return arguments, expected


@pytest.mark.parametrize("form", ["float32", "fp8"])
@pytest.mark.parametrize("chunk_bytes", [1, 2**26])
def test_scores_match_numpy(form, chunk_bytes):
    arguments, expected = case(form)
    scores = np.asarray(indexer_logits(*arguments, chunk_bytes=chunk_bytes))
    visible = np.arange(expected.shape[1]) <= POSITIONS[:, None]
    assert (scores[~visible] == -np.inf).all()
    np.testing.assert_allclose(scores[visible], expected[visible], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("k", [4, 64, 200])
@pytest.mark.parametrize("chunk_bytes", [1, 2**26])
def test_selection_is_the_best_visible(k, chunk_bytes):
    arguments, expected = case("float32")
    chosen = np.asarray(index_select(*arguments, k=k, chunk_bytes=chunk_bytes))
    assert chosen.shape == (TOKENS, k)
    for t in range(TOKENS):
        want = set(numpy_model.top_positions(expected[t], k).tolist())
        assert {p for p in chosen[t].tolist() if p >= 0} == want
        assert (chosen[t] >= 0).sum() == len(want)
