"""Mixture-of-experts dispatch on a GPU: the kernels against float64 and the references, exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.moe_dispatch import combine, make_plan
from tests.kernels.cases import moe_dispatch as cases

PLANS = [
    cases.plan(1, 8, 256),
    cases.plan(130, 8, 256),
    cases.plan(1030, 8, 64, used=20),
    cases.plan(33, 3, 10, tile=3, valid=0.5),
]
WIDTHS = [7168, 640]


def twice(call):
    """Its results, that of a second call being the same bits."""
    first, second = jax.block_until_ready((call(), call()))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
    return first


@pytest.mark.parametrize("case", cases.real_routings(), ids=lambda case: case.name)
def test_routing(case):
    cases.check_routing(case, *twice(functools.partial(case.run, "mosaic_gpu")))


@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0, 100.0])
def test_routing_of_any_logits_is_a_choice_by_nearly_the_same_scores(spread):
    """Without the cases' care for clear choices: what is chosen is as good as float64's choice but for 1e-6."""
    rng = np.random.default_rng(0)
    logits = (spread * rng.standard_normal((2000, 256))).astype(np.float32)
    case = cases.Routing("", logits, (0.1 * rng.standard_normal(256)).astype(np.float32), 8, 4, 8)
    experts, weights = map(np.asarray, case.run("mosaic_gpu"))
    scores, biased, sums = cases.scores_of(case.logits, case.bias, 8)
    worst_kept = np.sort(sums, -1)[:, -4, None]
    assert (np.take_along_axis(sums, experts // 32, -1) >= worst_kept - 1e-6).all()
    ordered = np.take_along_axis(biased, experts, -1)
    assert (np.diff(ordered, axis=-1) <= 1e-6).all()
    assert (np.diff(np.sort(experts, -1), axis=-1) > 0).all()
    chosen = np.take_along_axis(scores, experts, -1)
    np.testing.assert_allclose(weights, chosen / chosen.sum(-1, keepdims=True) * cases.FACTOR, rtol=1e-5, atol=1e-30)
    assert (experts == case.expected()[0]).all(-1).mean() >= 0.99


@pytest.mark.parametrize("case", cases.real_plans(), ids=lambda case: case.name)
def test_plan(case):
    cases.check_plan(case, twice(functools.partial(case.run, "mosaic_gpu")))


@pytest.mark.parametrize("plan", PLANS, ids=lambda case: case.name)
@pytest.mark.parametrize("width", WIDTHS)
def test_gather(plan, width):
    case = cases.rows(plan, width)
    cases.check_bytes(twice(functools.partial(case.gathered, "mosaic_gpu")), case.gathered("reference"))


@pytest.mark.parametrize("plan", PLANS, ids=lambda case: case.name)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scale_fmt", ["ue8m0", None])
@pytest.mark.parametrize("by_group", [False, True])
def test_gather_with_quantisation(plan, width, scale_fmt, by_group):
    case = cases.rows(plan, width)
    got = twice(functools.partial(case.gathered_fp8, "mosaic_gpu", scale_fmt, by_group))
    with jax.default_device(jax.devices("cpu")[0]):  # XLA's division on a GPU may differ in the last bit
        wanted = case.gathered_fp8("reference", scale_fmt, by_group)
    for a, b in zip(got, wanted, strict=True):
        cases.check_bytes(a, b)


@pytest.mark.parametrize("plan", PLANS, ids=lambda case: case.name)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_combine(plan, width, dtype):
    case = cases.rows(plan, width, dtype=dtype)
    got = np.asarray(twice(functools.partial(case.combined, "mosaic_gpu")))
    np.testing.assert_array_equal(got, case.expected_sum())


def test_there_and_back():
    """Each token's rows weighted by one half and one quarter, all in one program."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((500, 1024)), jnp.bfloat16)
    experts = jnp.asarray(np.argsort(rng.random((500, 64)), -1)[:, :2], jnp.int32)

    @jax.jit
    def both(x, experts):
        plan = make_plan(experts, jnp.ones(500, bool), 64, backend="mosaic_gpu")
        rows = cases.gather_rows(x, plan, backend="mosaic_gpu")
        return combine(rows, jnp.tile(jnp.asarray([[0.5, 0.25]], jnp.float32), (500, 1)), plan, backend="mosaic_gpu")

    np.testing.assert_array_equal(np.asarray(both(x, experts)), 0.75 * np.asarray(x, np.float32))


def test_auto_takes_the_kernel():
    case = cases.real_routings()[0]
    assert "mosaic_gpu" in jax.jit(functools.partial(case.run, "auto")).lower(jnp.asarray(case.logits)).as_text()
