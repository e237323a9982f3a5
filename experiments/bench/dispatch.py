"""Quantisation, routing and the moves of rows, as the other modules' `build` and `build_reference`."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from dsv32_jax.experiments.bench.cases import Case, Program, compile_, made, normal
from dsv32_jax.experiments.bench.matmuls import scales_by_group
from dsv32_jax.experiments.bench.shapes import MoELayer
from pallas_kernels.moe_dispatch import RoutingPlan, combine, gather_rows_fp8, make_plan, route
from pallas_kernels.moe_dispatch.config import choose_config
from pallas_kernels.moe_dispatch.reference import tile_rows, tiles_of_plan
from pallas_kernels.moe_dispatch.shapes import MoEDispatch
from pallas_kernels.quantize import GROUP, quantize, quantize_int8
from pallas_kernels.quantize.shapes import Quantize

SCALING_FACTOR = 2.5
"""Of the chosen experts' weights, in the model's config."""


def build(shape: Quantize | MoEDispatch, backend: str) -> Case:
    """The op."""
    if isinstance(shape, Quantize):
        return build_quantize(shape, backend)
    return {"plan": build_plan, "gather": build_gather, "combine": build_combine}[shape.step](shape, backend)


def build_reference(shape: Quantize | MoEDispatch) -> Case:
    """The specification in plain `jax.numpy`, compiled by XLA as one program."""
    return build(shape, "reference")


def config(shape: Quantize | MoEDispatch) -> dict[str, Any]:
    """The sizes that the routing plan's kernel takes at this shape; the other kernels have none to choose."""
    if isinstance(shape, MoEDispatch) and shape.step == "plan":
        return dataclasses.asdict(choose_config(shape.tokens * shape.chosen))
    return {}


def case(
    program: Program, arguments: tuple[Any, ...], shape: Quantize | MoEDispatch, bytes_: int, dtype: str = "bfloat16"
) -> Case:
    """A call without products."""
    return Case(
        run=lambda: program.call(*arguments),
        work={},
        bytes=bytes_,
        dtype=dtype,
        backend=program.backend,
        memory=program.memory,
        tokens=shape.tokens,
    )


def build_quantize(shape: Quantize, backend: str) -> Case:
    arguments = made(lambda key: (normal(next(key), (shape.tokens, shape.width)),))
    ops: dict[str, Callable[[Any], Any]] = {
        "ue8m0": lambda x: quantize(x, "ue8m0", backend=backend),
        "exact": lambda x: quantize(x, None, backend=backend),
        "int8": lambda x: quantize_int8(x, backend=backend),
    }
    scales = 1 if shape.form == "int8" else shape.width // GROUP
    bytes_ = shape.tokens * (3 * shape.width + 4 * scales)
    return case(compile_(ops[shape.form], *arguments), arguments, shape, bytes_)


# ---- routing ---------------------------------------------------------------------------------------------------


def routed(
    shape: MoEDispatch | MoELayer, logits: jax.Array, bias: jax.Array, backend: str
) -> tuple[jax.Array, jax.Array, RoutingPlan]:
    """Experts, weights and plan for router logits float32 [T, E]."""
    experts, weights = route(
        logits,
        bias,
        num_groups=shape.groups,
        groups_kept=shape.groups_kept,
        experts_per_token=shape.chosen,
        normalize=True,
        scaling_factor=SCALING_FACTOR,
        backend=backend,
    )
    valid = jnp.ones(logits.shape[0], bool)
    return experts, weights, make_plan(experts, valid, shape.experts, backend=backend)


def router_inputs(shape: MoEDispatch, key: Iterator[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Logits and bias that lead tokens to all experts."""
    logits = normal(next(key), (shape.tokens, shape.experts), jnp.float32)
    return logits, normal(next(key), (shape.experts,), jnp.float32) / 8


def plan_rows(shape: MoEDispatch) -> int:
    """Rows of the plan, padding too."""
    tile = tile_rows(shape.tokens * shape.chosen, shape.experts)
    return tile * tiles_of_plan(shape.tokens * shape.chosen, shape.experts, tile)


def build_plan(shape: MoEDispatch, backend: str) -> Case:
    arguments = made(lambda key: router_inputs(shape, key))

    def op(logits, bias):
        return routed(shape, logits, bias, backend)[1:]

    rows, choices = plan_rows(shape), shape.tokens * shape.chosen
    tiles = rows // tile_rows(choices, shape.experts)
    bytes_ = 4 * (shape.experts * (shape.tokens + 1) + rows + tiles + 2 * choices)
    return case(compile_(op, *arguments), arguments, shape, bytes_, "float32")


# ---- rows ------------------------------------------------------------------------------------------------------


def weights_and_plan(shape: MoEDispatch, key: Iterator[jax.Array]) -> tuple[jax.Array, RoutingPlan]:
    """Made by the reference before the clock starts."""
    return routed(shape, *router_inputs(shape, key), "reference")[1:]


def build_gather(shape: MoEDispatch, backend: str) -> Case:
    """To quantised rows, padding too."""
    arguments = made(lambda key: (normal(next(key), (shape.tokens, shape.width)), weights_and_plan(shape, key)[1]))

    def op(x, plan):
        return gather_rows_fp8(x, plan, scales_by_group=scales_by_group(plan), backend=backend)

    a_row = shape.width + 4 * (shape.width // GROUP)
    bytes_ = shape.tokens * (2 * shape.width + 4 * shape.chosen) + plan_rows(shape) * (a_row + 4)
    return case(compile_(op, *arguments), arguments, shape, bytes_)


def build_combine(shape: MoEDispatch, backend: str) -> Case:
    arguments = made(lambda key: (normal(next(key), (plan_rows(shape), shape.width)), *weights_and_plan(shape, key)))

    def op(rows, weights, plan):
        return combine(rows, weights, plan, backend=backend)

    bytes_ = shape.tokens * (shape.chosen * (2 * shape.width + 8) + 4 * shape.width)
    return case(compile_(op, *arguments), arguments, shape, bytes_)
