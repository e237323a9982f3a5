"""A whole mixture-of-experts layer at full width in FP8, and what stock JAX has for it in bfloat16.

Ours: routing, plan, gather of quantised rows, the experts' products, weighted sum, and the shared expert; from bfloat16
rows of the residual stream to bfloat16 rows that are added to it.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.experiments.bench.cases import Case, Program, compile_, made, normal, once, only_shapes
from dsv32_jax.experiments.bench.dispatch import routed
from dsv32_jax.experiments.bench.matmuls import Fp8, config_of, fewer, fp8_weight, scales_by_group, weights
from dsv32_jax.experiments.bench.shapes import MoELayer
from pallas_kernels.backend import on_hopper
from pallas_kernels.matmul import (
    BLOCK,
    FP8_BLOCK,
    Product,
    QTensor,
    grouped_matmul,
    grouped_swiglu,
    matmul,
    silu_product,
    swiglu,
)
from pallas_kernels.moe_dispatch import RoutingPlan, combine, gather_rows_fp8
from pallas_kernels.moe_dispatch.config import choose_config as plan_config
from pallas_kernels.moe_dispatch.reference import tile_rows, tiles_of_plan
from pallas_kernels.quantize import quantize


class Layer(NamedTuple):
    """Weights of a layer.

    Attributes:
      router: bfloat16 [E, D].
      bias: float32 [E].
      gate: of the experts, [E, W, D], in FP8; in bfloat16 transposed, as `ragged_dot` wants them.
      up: likewise.
      down: likewise, [E, D, W].
      shared_gate: of the shared expert, [W, D].
      shared_up: likewise.
      shared_down: [D, W].
    """

    router: jax.Array
    bias: jax.Array
    gate: Any
    up: Any
    down: Any
    shared_gate: Any
    shared_up: Any
    shared_down: Any


def layer_inputs(shape: MoELayer, key: Iterator[jax.Array], fp8: bool, tokens: int) -> tuple[jax.Array, Layer]:
    """Rows [T, D] and random weights that keep the size of what goes through them."""
    experts, hidden, width = shape.experts, shape.hidden, shape.width
    x = normal(next(key), (tokens, hidden))
    router = normal(next(key), (experts, hidden)) * jnp.bfloat16(hidden**-0.5)
    bias = normal(next(key), (experts,), jnp.float32) / 8

    def weight(*dims: int) -> Any:
        if fp8:
            return fp8_weight(next(key), *dims)
        *stacked, columns, depth = dims
        if not stacked:
            return normal(next(key), dims) * jnp.bfloat16(depth**-0.5)
        return weights(next(key), (*stacked, depth, columns), jnp.bfloat16, depth**-0.5)

    sides = (width, hidden), (width, hidden), (hidden, width)
    return x, Layer(router, bias, *(weight(experts, *s) for s in sides), *(weight(*s) for s in sides))


# ---- ours ------------------------------------------------------------------------------------------------------


def logits_of(x: jax.Array, router: jax.Array) -> jax.Array:
    """Router logits float32 [T, E]."""
    return jnp.matmul(x, router.T, preferred_element_type=jnp.float32)


FORMS = {
    "fused": "the kernels as the model has them",
    "apart": "the same kernels, gate, up, SwiGLU and quantisation apart",
}
"""Of the layer; all but the first stand beside it."""


def moe_layer(shape: MoELayer, x: jax.Array, layer: Layer, backend: str, form: str = "fused") -> jax.Array:
    """x [T, D] -> [T, D], in one of `FORMS`."""
    _, weight, plan = routed(shape, logits_of(x, layer.router), layer.bias, backend)
    by_group = scales_by_group(plan)
    x_fp8, x_scales = gather_rows_fp8(x, plan, scales_by_group=by_group, backend=backend)
    used_tiles = plan.used_tiles
    if form == "apart":
        hidden, hidden_scales = activations_apart((x_fp8, x_scales), layer, plan, used_tiles, backend)
    else:
        hidden, hidden_scales = grouped_swiglu(
            x_fp8,
            layer.gate,
            layer.up,
            plan.tile_expert,
            used_tiles=used_tiles,
            row_scales=x_scales,
            scales_by_group=by_group,
            quantize_result=True,
            backend=backend,
        )
    out = grouped_matmul(
        hidden,
        layer.down,
        plan.tile_expert,
        used_tiles=used_tiles,
        row_scales=hidden_scales,
        scales_by_group=by_group,
        backend=backend,
    )
    shared = of_shared_expert(x, layer, backend)
    return (combine(out, weight, plan, backend=backend) + shared.astype(jnp.float32)).astype(x.dtype)


def of_shared_expert(x: jax.Array, layer: Layer, backend: str) -> jax.Array:
    """x [T, D] -> [T, D]."""
    x_fp8, x_scales = quantize(x, backend=backend)
    gate_and_up = (layer.shared_gate, layer.shared_up)
    hidden, scales = swiglu(x_fp8, *gate_and_up, row_scales=x_scales, quantize_result=True, backend=backend)
    return matmul(hidden, layer.shared_down, row_scales=scales, backend=backend)


def activations_apart(rows: Fp8, layer: Layer, plan: RoutingPlan, used_tiles: jax.Array, backend: str) -> Fp8:
    """Quantised silu(gate) * up of quantised rows, by two products, SwiGLU in XLA, and quantisation."""
    x, row_scales = rows
    by_group = scales_by_group(plan)

    def product(weight: QTensor) -> jax.Array:
        return grouped_matmul(
            x,
            weight,
            plan.tile_expert,
            used_tiles=used_tiles,
            row_scales=row_scales,
            scales_by_group=by_group,
            backend=backend,
        )

    values, scales = quantize(silu_product(product(layer.gate), product(layer.up)), backend=backend)
    return values, scales.T if by_group else scales


@once
def layer_program(shape: MoELayer, avals: Any, backend: str, form: str) -> Program:
    """The layer compiled; the same for all that it stands beside."""

    def op(x, layer):
        return moe_layer(shape, x, layer, backend, form)

    return compile_(op, *jax.tree.unflatten(avals[0], avals[1]))


def build(shape: MoELayer, backend: str, form: str = "fused") -> Case:
    """The layer in FP8. Its bytes count the experts that its tokens chose, and no others."""
    arguments = made(lambda key: layer_inputs(shape, key, True, shape.tokens))
    leaves, structure = jax.tree.flatten(arguments)
    avals = structure, tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
    bare = dataclasses.replace(shape, name="", beside="")
    program = layer_program(bare, avals, backend, form)
    return Case(
        run=lambda: program.call(*arguments),
        work={
            "fp8": 2 * shape.tokens * (shape.chosen + 1) * 3 * shape.hidden * shape.width,
            "bf16": 2 * shape.tokens * shape.hidden * shape.experts,
        },
        bytes=layer_bytes(shape, experts_used(shape, *arguments)),
        dtype="bfloat16 rows, FP8 weights",
        backend=program.backend,
        memory=program.memory,
        tokens=shape.tokens,
        name=FORMS[form],
    )


def experts_used(shape: MoELayer, x: jax.Array, layer: Layer) -> int:
    """How many experts some token chose; all of them where only shapes are known."""
    if only_shapes():
        return shape.experts
    find = jax.jit(lambda x, router, bias: routed(shape, logits_of(x, router), bias, "reference")[0])
    return np.unique(np.asarray(find(x, layer.router, layer.bias))).size


def layer_bytes(shape: MoELayer, used: int) -> int:
    """Weights and scales of these experts and the shared one, the router, and the rows in and out."""
    blocks = 3 * -(-shape.width // BLOCK) * -(-shape.hidden // BLOCK)
    expert = 3 * shape.hidden * shape.width + 4 * blocks
    router = (2 * shape.hidden + 4) * shape.experts
    return (used + 1) * expert + router + 4 * shape.tokens * shape.hidden


def config(shape: MoELayer) -> dict[str, Any]:
    """The tile sizes that the layer's kernels take."""
    choices = shape.tokens * shape.chosen
    tile = tile_rows(choices, shape.experts)
    tiles = tiles_of_plan(choices, shape.experts, tile)
    gate_and_up = Product(
        rows=tile * tiles, columns=shape.width, depth=shape.hidden, scheme=FP8_BLOCK, tiles=tiles, swiglu=True
    )
    down = dataclasses.replace(gate_and_up, columns=shape.hidden, depth=shape.width, swiglu=False)

    def shared(product: Product) -> Product:
        return dataclasses.replace(product, rows=shape.tokens, tiles=None)

    return {
        "plan": dataclasses.asdict(plan_config(choices)),
        "gate and up": config_of(gate_and_up),
        "down": config_of(down),
        "shared gate and up": config_of(shared(gate_and_up)),
        "shared down": config_of(shared(down)),
    }


# ---- what stands beside it -------------------------------------------------------------------------------------


def build_reference(shape: MoELayer) -> Case:
    """What the shape names; `ragged_dot` of fewer tokens where all would take too much time and room."""
    if shape.beside in FORMS:
        return build(shape, "mosaic_gpu" if on_hopper() else "reference", shape.beside)
    ragged = shape.beside == "ragged_dot"
    tokens = fewer(shape.tokens * shape.chosen, shape.experts, shape.chosen) // shape.chosen if ragged else shape.tokens
    arguments = made(lambda key: layer_inputs(shape, key, False, tokens))
    program = compile_(lambda x, layer: in_bfloat16(shape, x, layer), *arguments)
    return Case(
        run=lambda: program.call(*arguments),
        work={"bf16": 2 * tokens * (shape.chosen + 1) * 3 * shape.hidden * shape.width},
        bytes=2 * 3 * shape.hidden * shape.width * (shape.experts + 1),
        dtype="bfloat16",
        backend="reference",
        memory=program.memory,
        tokens=tokens,
        name="lax.ragged_dot in bfloat16" if ragged else "loop of masked products over the experts in bfloat16",
    )


def in_bfloat16(shape: MoELayer, x: jax.Array, layer: Layer) -> jax.Array:
    """x [T, D] -> [T, D], by the form that `shape.beside` names."""
    experts = by_ragged_dot if shape.beside == "ragged_dot" else by_loop
    shared = silu_product(x @ layer.shared_gate.T, x @ layer.shared_up.T) @ layer.shared_down.T
    return (experts(shape, x, layer) + shared.astype(jnp.float32)).astype(x.dtype)


def by_ragged_dot(shape: MoELayer, x: jax.Array, layer: Layer) -> jax.Array:
    """Rows sorted by expert, without padding."""
    experts, weight, _ = routed(shape, logits_of(x, layer.router), layer.bias, "reference")
    order = jnp.argsort(experts.reshape(-1), stable=True)
    sizes = jnp.zeros(shape.experts, jnp.int32).at[experts.reshape(-1)].add(1)
    rows = x[order // shape.chosen]
    hidden = silu_product(*(jax.lax.ragged_dot(rows, weight, sizes) for weight in (layer.gate, layer.up)))
    rows = jax.lax.ragged_dot(hidden, layer.down, sizes).astype(jnp.float32)
    rows = jnp.zeros_like(rows).at[order].set(rows).reshape(*experts.shape, -1)
    return (weight[..., None] * rows).sum(1)


def by_loop(shape: MoELayer, x: jax.Array, layer: Layer) -> jax.Array:
    """Every expert with all tokens."""
    experts, weight, _ = routed(shape, logits_of(x, layer.router), layer.bias, "reference")
    tokens = jnp.arange(x.shape[0])[:, None]
    by_expert = jnp.zeros((x.shape[0], shape.experts)).at[tokens, experts].set(weight).T

    def add(total, expert):
        gate, up, down, share = expert
        return total + share[:, None] * (silu_product(x @ gate, x @ up) @ down).astype(jnp.float32), None

    return jax.lax.scan(add, jnp.zeros(x.shape), (layer.gate, layer.up, layer.down, by_expert))[0]
