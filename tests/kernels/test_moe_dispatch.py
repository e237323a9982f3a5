"""Routing and the routing plan."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.matmul import grouped_matmul
from pallas_kernels.moe_dispatch import combine, gather_rows, make_plan, route

TOKENS, EXPERTS, GROUPS, KEPT, CHOSEN, FACTOR = 9, 16, 4, 2, 3, 2.5


@jax.jit
def jitted_route(logits, bias):
    return route(
        logits,
        bias,
        num_groups=GROUPS,
        groups_kept=KEPT,
        experts_per_token=CHOSEN,
        normalize=True,
        scaling_factor=FACTOR,
    )


def routed(logits, bias):
    experts, weights = jitted_route(np.asarray(logits, np.float32), np.asarray(bias, np.float32))
    return np.asarray(experts), np.asarray(weights)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), spread=st.sampled_from([0.0, 0.1, 5.0]), shift=st.sampled_from([-3.0, 0.0, 1.0]))
def test_routing_invariants(seed, spread, shift):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((TOKENS, EXPERTS)).astype(np.float32)
    bias = (rng.standard_normal(EXPERTS) * spread + shift).astype(np.float32)
    experts, weights = routed(logits, bias)
    np.testing.assert_allclose(weights.sum(-1), FACTOR, rtol=1e-5)
    assert (weights > 0).all()
    score = 1 / (1 + np.exp(-logits.astype(np.float64)))
    biased = (score + bias).reshape(TOKENS, GROUPS, -1)
    group_score = np.sort(biased, -1)[..., -2:].sum(-1)
    for t in range(TOKENS):
        assert len(set(experts[t].tolist())) == CHOSEN
        kept = set(np.argsort(-group_score[t], kind="stable")[:KEPT].tolist())
        assert {e // (EXPERTS // GROUPS) for e in experts[t].tolist()} <= kept
        # The weights come from the unbiased scores, in the order of the experts.
        chosen = score[t, experts[t]]
        np.testing.assert_allclose(weights[t], chosen / chosen.sum() * FACTOR, rtol=1e-5)
        left = [biased[t].flat[e] for g in kept for e in range(g * 4, g * 4 + 4) if e not in experts[t]]
        assert min(biased[t].flat[e] for e in experts[t]) >= max(left) - 1e-6


def test_ties_go_to_the_lowest_index():
    experts, weights = routed(np.zeros((2, EXPERTS)), np.zeros(EXPERTS))
    np.testing.assert_array_equal(np.sort(experts), [[0, 1, 2]] * 2)
    np.testing.assert_allclose(weights, FACTOR / CHOSEN, rtol=1e-6)


def test_negative_biased_scores_never_lose_to_a_masked_group():
    """With every biased score negative, a mask of 0 in place of -inf would choose from the dropped groups."""
    bias = np.full(EXPERTS, -5.0)
    bias[4:8] = -4.0
    bias[12:] = -4.0
    experts, _ = routed(np.random.default_rng(0).standard_normal((TOKENS, EXPERTS)), bias)
    assert set((experts // 4).ravel().tolist()) <= {1, 3}


def test_groups_are_ranked_by_their_two_best_not_by_the_best():
    logits = np.full((1, EXPERTS), -4.0)
    logits[0, 0] = 4.0  # one high expert: group 0 wins by maximum
    logits[0, [4, 5, 8, 9]] = 1.0  # two good ones each: groups 1 and 2 win by the sum of two
    experts, _ = routed(logits, np.zeros(EXPERTS))
    assert set((experts // 4).ravel().tolist()) == {1, 2}


jitted_plan = jax.jit(make_plan, static_argnums=(2, 3))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 12),
    tile=st.sampled_from([None, 1, 3, 8]),
    skew=st.booleans(),
)
def test_plan_sends_every_choice_to_its_expert_and_back(seed, tokens, tile, skew):
    rng = np.random.default_rng(seed)
    experts = np.stack([rng.permutation(3 if skew else EXPERTS)[:CHOSEN] for _ in range(tokens)]).astype(np.int32)
    valid = rng.random(tokens) < 0.8
    plan = jitted_plan(experts, valid, EXPERTS, tile)
    row_token, token_row = np.asarray(plan.row_token), np.asarray(plan.token_row)
    row_expert = np.repeat(np.asarray(plan.tile_expert), plan.tile)
    assert (token_row[~valid] == -1).all()
    used = token_row[valid]
    assert len(np.unique(used)) == used.size == (row_token >= 0).sum()  # one row for each choice, and no other
    np.testing.assert_array_equal(row_token[used], np.nonzero(valid)[0][:, None].repeat(CHOSEN, 1))
    np.testing.assert_array_equal(row_expert[used], experts[valid])


def test_a_choice_of_another_devices_expert_takes_no_row():
    """Its id is the number of experts; the tokens of all devices' plans together are those of one plan for all."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((TOKENS, 5)).astype(np.float32)
    valid = np.arange(TOKENS) != 4
    experts, weights = routed(rng.standard_normal((TOKENS, EXPERTS)), rng.standard_normal(EXPERTS))
    half = EXPERTS // 2
    sums = 0
    for first in (0, half):
        on_device = (experts >= first) & (experts < first + half)
        plan = jitted_plan(np.where(on_device, experts - first, half), valid, half, 2)
        np.testing.assert_array_equal(np.asarray(plan.token_row) >= 0, on_device & valid[:, None])
        assert (np.asarray(plan.row_token) >= 0).sum() == (on_device & valid[:, None]).sum()
        row_expert = np.repeat(np.asarray(plan.tile_expert), plan.tile)
        sums += combine(gather_rows(x, plan) * (1 + first + row_expert)[:, None], weights, plan)
    expected = np.where(valid, (weights * (1 + experts)).sum(1), 0)[:, None] * x
    np.testing.assert_allclose(np.asarray(sums), expected, rtol=2e-5, atol=1e-5)


def test_dispatched_products_equal_a_loop_over_experts():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((TOKENS, 5)).astype(np.float32)
    x[3] = np.nan  # a padding token: it must reach nobody
    valid = np.arange(TOKENS) != 3
    kernels = rng.standard_normal((EXPERTS, 7, 5)).astype(np.float32)
    experts, weights = routed(rng.standard_normal((TOKENS, EXPERTS)), rng.standard_normal(EXPERTS))

    @jax.jit
    def dispatched(x, kernels, experts, valid, weights):
        plan = make_plan(experts, valid, EXPERTS)
        products = grouped_matmul(gather_rows(x, plan), kernels, plan.tile_expert)
        return combine(products, weights, plan)

    out = np.asarray(dispatched(x, kernels, experts, valid, weights))
    for t in np.nonzero(valid)[0]:
        expected = sum(w * kernels[e].astype(np.float64) @ x[t] for e, w in zip(experts[t], weights[t], strict=True))
        np.testing.assert_allclose(out[t], expected, rtol=2e-5, atol=2e-5)
    assert (out[3] == 0).all()
