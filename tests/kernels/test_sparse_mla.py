"""Attention over chosen slots against float64 NumPy, and its edge cases."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cache_write import cache_write, record_bytes
from pallas_kernels.sparse_mla import dense_mla, sparse_mla
from tests import numpy_model

TOKENS, HEADS, LATENT, ROPE, BLOCKS, CHOSEN, SCALE = 5, 3, 128, 16, 3, 10, 0.11


def case(seed: int = 0):
    rng = np.random.default_rng(seed)
    queries = rng.standard_normal((TOKENS, HEADS, LATENT + ROPE)).astype(np.float32)
    kv = rng.standard_normal((2, BLOCKS, 64, LATENT + ROPE)).astype(np.float32)
    slots = np.stack([rng.permutation(BLOCKS * 64)[:CHOSEN] for _ in range(TOKENS)]).astype(np.int32)
    return queries, kv, slots


def attend(queries, kv, slots, **options):
    out, lse = sparse_mla(
        jnp.asarray(queries), jnp.asarray(kv), 1, jnp.asarray(slots), scale=SCALE, rope_dim=ROPE, **options
    )
    return np.asarray(out), np.asarray(lse)


def expected(queries, kv, slots):
    rows = kv[1].reshape(-1, kv.shape[-1]).astype(np.float64)
    out, lse = np.zeros((TOKENS, HEADS, LATENT)), np.full((TOKENS, HEADS), -np.inf)
    for t in range(TOKENS):
        keys = rows[slots[t][slots[t] >= 0]]
        if len(keys):
            scores = SCALE * queries[t].astype(np.float64) @ keys.T
            weights = np.exp(scores)
            lse[t] = np.log(weights.sum(-1))
            out[t] = weights @ keys[:, :LATENT] / weights.sum(-1, keepdims=True)
    return out, lse


def assert_same(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=2e-5, atol=2e-6)


def test_matches_numpy_with_absent_slots():
    queries, kv, slots = case()
    slots[1, 3:] = -1
    slots[2, ::2] = -1
    slots[3] = -1
    assert_same(attend(queries, kv, slots), expected(queries, kv, slots))


def test_a_row_without_slots_gives_zeros_and_minus_infinity():
    queries, kv, slots = case()
    slots[0] = -1
    out, lse = attend(queries, kv, slots)
    assert (out[0] == 0).all() and (lse[0] == -np.inf).all()
    assert np.isfinite(out).all() and np.isfinite(lse[1:]).all()


def test_a_duplicate_counts_twice():
    queries, kv, slots = case()
    slots[0, 1] = slots[0, 0]
    got = attend(queries, kv, slots)
    assert_same(got, expected(queries, kv, slots))
    once = slots.copy()
    once[0, 1] = -1
    assert (attend(queries, kv, once)[1][0] < got[1][0]).all()


def test_order_of_the_slots_does_not_matter():
    queries, kv, slots = case()
    slots[2, 4:] = -1
    shuffled = np.random.default_rng(9).permuted(slots, axis=1)
    assert_same(attend(queries, kv, shuffled), attend(queries, kv, slots))


def test_rows_that_nobody_chose_may_hold_anything():
    queries, kv, slots = case()
    slots[1, 5:] = -1
    poisoned = np.full_like(kv, np.nan)
    flat, chosen = poisoned.reshape(2, -1, kv.shape[-1]), np.unique(slots[slots >= 0])
    flat[1, chosen] = kv.reshape(2, -1, kv.shape[-1])[1, chosen]
    assert_same(attend(queries, poisoned, slots), attend(queries, kv, slots))


def test_large_scores_do_not_overflow():
    queries, kv, slots = case()
    out, lse = attend(queries * 1e4, kv, slots)
    assert np.isfinite(out).all() and np.isfinite(lse).all()


def test_chunks_of_tokens_change_nothing():
    queries, kv, slots = case()
    whole = attend(queries, kv, slots)
    for part, same in zip(attend(queries, kv, slots, chunk_bytes=1), whole, strict=True):
        np.testing.assert_allclose(part, same, rtol=1e-6, atol=1e-6)


def test_fp8_records_equal_their_dequantised_rows():
    queries, _, slots = case()
    rng = np.random.default_rng(3)
    latent, rope_key, key = (rng.standard_normal((BLOCKS * 64, n)).astype(np.float32) for n in (LATENT, ROPE, 8))
    rope_key = np.asarray(jnp.asarray(rope_key, jnp.bfloat16), np.float32)
    packed = jnp.zeros((2, BLOCKS, 64, record_bytes(LATENT, ROPE)), jnp.uint8)
    packed, _ = cache_write(packed, jnp.zeros((2, BLOCKS, 64, 8)), 1, jnp.arange(BLOCKS * 64), latent, rope_key, key)
    rows = np.concatenate([numpy_model.fake_quantise(latent, "ue8m0"), rope_key], -1)
    plain = np.stack([np.zeros_like(rows), rows]).reshape(2, BLOCKS, 64, -1).astype(np.float32)
    assert_same(attend(queries, packed, slots), expected(queries, plain, slots))


@pytest.mark.parametrize("chunk_bytes", [1, 2**26])
def test_dense_equals_sparse_over_all_visible_keys(chunk_bytes):
    queries, kv, _ = case()
    positions = np.array([0, 7, 100, 191, -1], np.int32)
    slots = np.where(np.arange(BLOCKS * 64) <= positions[:, None], np.arange(BLOCKS * 64), -1).astype(np.int32)
    context = jnp.asarray(kv[1].reshape(1, BLOCKS * 64, -1))
    dense = dense_mla(
        jnp.asarray(queries),
        context,
        jnp.zeros(TOKENS, jnp.int32),
        jnp.asarray(positions),
        scale=SCALE,
        rope_dim=ROPE,
        chunk_bytes=chunk_bytes,
    )
    np.testing.assert_allclose(dense, attend(queries, kv, slots)[0], rtol=2e-5, atol=2e-6)
