"""The kernels of `moe_dispatch`: in the interpreter, and lowered for a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.backend import BackendError
from pallas_kernels.moe_dispatch import RoutingPlan, combine, gather_rows, gather_rows_fp8, make_plan, mosaic_gpu, route
from pallas_kernels.moe_dispatch.config import CONFIGS, PlanConfig
from tests.kernels.cases import moe_dispatch as cases


@pytest.mark.parametrize("case", cases.tiny_routings() + cases.real_routings()[4:9], ids=lambda case: case.name)
def test_reference_routes_as_float64_does(case):
    cases.check_routing(case, *case.run("reference"))


@pytest.mark.interpret
@pytest.mark.parametrize("case", cases.tiny_routings(), ids=lambda case: case.name)
def test_routing_in_the_interpreter(case, capfd):
    cases.check_routing(case, *case.run("interpret"))
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.interpret
@pytest.mark.parametrize("case", cases.tiny_plans(), ids=lambda case: case.name)
def test_plan_in_the_interpreter(case, capfd):
    cases.check_plan(case, case.run("interpret"))
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.interpret
def test_plan_by_a_cluster_in_the_interpreter(capfd):
    case = cases.plan(9, 2, 8, tile=2)
    config = PlanConfig(warpgroups=1, cluster=2)
    how = {"num_experts": 8, "tile": 2, "config": config, "interpret": mosaic.interpreter()}
    arrays = mosaic_gpu.make_plan(jnp.asarray(case.experts), jnp.asarray(case.valid), **how)
    cases.check_plan(case, RoutingPlan(*arrays, 2))
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.interpret
def test_rows_in_the_interpreter(capfd):
    case = cases.rows(cases.plan(3, 2, 8, tile=2, valid=0.7), 640)
    cases.check_bytes(case.gathered("interpret"), case.gathered("reference"))
    for scale_fmt, by_group in (("ue8m0", True), (None, False)):
        got, wanted = (case.gathered_fp8(backend, scale_fmt, by_group) for backend in ("interpret", "reference"))
        for x, y in zip(got, wanted, strict=True):
            cases.check_bytes(x, y)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_combine_in_the_interpreter(dtype, capfd):
    case = cases.rows(cases.plan(3, 2, 8, tile=2, valid=0.7), 384, dtype=dtype)
    np.testing.assert_allclose(np.asarray(case.combined("interpret")), case.expected_sum(), rtol=1e-6, atol=1e-6)
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_reference_combines_as_float32_does():
    case = cases.rows(cases.plan(9, 4, 16), 256)
    np.testing.assert_allclose(np.asarray(case.combined("reference")), case.expected_sum(), rtol=1e-6, atol=1e-6)


# ---- lowering ------------------------------------------------------------------------------------------------------


def lowered(function, *arguments, **options) -> str:
    """The program for a GPU."""
    traced = jax.jit(lambda *arrays: function(*arrays, backend="mosaic_gpu", **options)).trace(*arguments)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def array(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(("experts", "groups"), [(256, 8), (8, 2), (64, 32), (32, 1)])
def test_routing_lowers(experts, groups):
    how = {"num_groups": groups, "groups_kept": 1, "experts_per_token": 4, "normalize": True, "scaling_factor": 2.5}
    assert "mosaic_gpu" in lowered(route, array((70, experts)), array((experts,)), **how)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_plan_lowers(config):
    plan = jax.jit(lambda experts, valid: mosaic_gpu.make_plan(experts, valid, num_experts=256, tile=64, config=config))
    text = plan.trace(array((300, 8), jnp.int32), array((300,), bool)).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def test_rows_lower():
    plan = jax.eval_shape(lambda e, v: make_plan(e, v, 16), array((70, 8), jnp.int32), array((70,), bool))
    x, back, weights = array((70, 7168), jnp.bfloat16), array((plan.row_token.shape[0], 7168)), array((70, 8))
    assert "mosaic_gpu" in lowered(gather_rows, x, plan)
    assert "mosaic_gpu" in lowered(gather_rows_fp8, x, plan, scales_by_group=True)
    assert "mosaic_gpu" in lowered(combine, back, weights, plan)


# ---- errors --------------------------------------------------------------------------------------------------------


def test_what_the_kernels_do_not_take():
    how = {"num_groups": 2, "groups_kept": 1, "experts_per_token": 2, "normalize": True, "scaling_factor": 1.0}
    with pytest.raises(BackendError, match=r"logits of shape .*; it takes .* a power of two"):
        route(jnp.zeros((2, 24)), jnp.zeros(24), **how, backend="interpret")
    with pytest.raises(BackendError, match="3 of 2 groups"):
        route(jnp.zeros((2, 16)), jnp.zeros(16), **{**how, "groups_kept": 3}, backend="interpret")
    with pytest.raises(BackendError, match="300 experts; it takes at most 256"):
        make_plan(jnp.zeros((2, 2), jnp.int32), jnp.ones(2, bool), 300, backend="interpret")
    case = cases.rows(cases.plan(3, 2, 8), 128)
    plan = case.plan.run("reference")
    with pytest.raises(BackendError, match="x of dtype float32; it takes bfloat16"):
        gather_rows(jnp.zeros((3, 128)), plan, backend="interpret")
    with pytest.raises(ValueError, match="multiple of 128, not 100"):
        gather_rows_fp8(jnp.zeros((3, 100)), plan)
    with pytest.raises(ValueError, match="scale_fmt 'e5m2'"):
        gather_rows_fp8(jnp.zeros((3, 128)), plan, "e5m2")
    with pytest.raises(ValueError, match="1 to 8 warpgroups, not 9"):
        PlanConfig(warpgroups=9)
    with pytest.raises(ValueError, match="1, 2, 4 or 8 CTAs, not 3"):
        PlanConfig(warpgroups=1, cluster=3)


def test_kernels_say_that_they_have_no_gradient():
    case = cases.rows(cases.plan(3, 2, 8), 128)
    plan = case.plan.run("reference")
    with pytest.raises(NotImplementedError, match="combine has no gradient"):
        jax.grad(lambda rows: combine(rows, jnp.asarray(case.weights), plan, backend="interpret").sum())(
            jnp.asarray(case.rows)
        )
