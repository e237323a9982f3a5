"""Products with quantised weights, dense and grouped by expert, as the other modules' `build` and `build_reference`.

FP8 rows are quantised before the clock starts, as they are for the published kernels; int8 products quantise theirs
themselves. The routing plan is made before.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.experiments.bench.cases import Case, Program, compile_, made, normal
from pallas_kernels.matmul import (
    BLOCK,
    FP8_BLOCK,
    PLAIN,
    SCHEMES,
    Product,
    QTensor,
    Scheme,
    Weight,
    choose,
    grouped_matmul,
    matmul,
    quantize_weight,
)
from pallas_kernels.matmul.shapes import GroupedMatmul, Matmul
from pallas_kernels.moe_dispatch import RoutingPlan, make_plan
from pallas_kernels.moe_dispatch.reference import tile_rows, tiles_of_plan
from pallas_kernels.quantize import GROUP

MASKED_ROWS = 2**19
"""Rows times experts of a `ragged_dot`: XLA multiplies each row by every expert's weight, and may store it as often."""
Fp8 = tuple[jax.Array, jax.Array]
"""Rows as values float8_e4m3fn [P, K] and scales float32 [P, K / 128]."""


def build(shape: GroupedMatmul | Matmul, backend: str) -> Case:
    """The product by our kernel."""
    if isinstance(shape, GroupedMatmul):
        return build_grouped(shape, backend)
    return build_dense(shape, backend)


def build_reference(shape: GroupedMatmul | Matmul) -> Case:
    """What stock JAX has, in bfloat16."""
    return ragged_dot(shape) if isinstance(shape, GroupedMatmul) else bfloat16_matmul(shape)


def scheme_of(shape: GroupedMatmul | Matmul) -> Scheme:
    """The scheme of a shape's weight."""
    return SCHEMES.get(shape.scheme, PLAIN)


def config(shape: GroupedMatmul | Matmul) -> dict[str, Any]:
    """The tile sizes that the kernels take at this shape."""
    product = Product(rows=shape.tokens, columns=shape.columns, depth=shape.depth, scheme=scheme_of(shape))
    if isinstance(shape, GroupedMatmul):
        tile = tile_rows(shape.rows, shape.experts)
        tiles = tiles_of_plan(shape.rows, shape.experts, tile)
        product = dataclasses.replace(product, rows=tile * tiles, tiles=tiles)
    return config_of(product) if shape.kernel else {}


def config_of(product: Product) -> dict[str, Any]:
    """The tile sizes of a product's kernel; empty where it has none."""
    chosen = choose(product).config
    return {} if chosen is None else dataclasses.asdict(chosen)


# ---- inputs ----------------------------------------------------------------------------------------------------


def fp8_rows(key: jax.Array, rows: int, depth: int) -> Fp8:
    """Quantised rows."""
    key, scale_key = jax.random.split(key)
    scales = jax.random.uniform(scale_key, (rows, depth // GROUP), minval=0.5, maxval=1.5)
    return normal(key, (rows, depth), jnp.float8_e4m3fn), scales


def fp8_weight(key: jax.Array, *dims: int) -> QTensor:
    """An FP8 weight [N, K], or one for each expert [E, N, K], with which products keep the size of the rows."""
    key, scale_key = jax.random.split(key)
    *experts, columns, depth = dims
    scales = jax.random.uniform(scale_key, (*experts, -(-columns // BLOCK), -(-depth // BLOCK)), minval=0.5, maxval=1.5)
    return QTensor(weights(key, dims, jnp.float8_e4m3fn), scales * depth**-0.5, FP8_BLOCK)


def weights(key: jax.Array, dims: tuple[int, ...], dtype: Any, size: float = 1.0) -> jax.Array:
    """Normal; of experts one after another, since random numbers of all would need several times the room."""
    if len(dims) == 2:
        return normal(key, dims, dtype)

    def one(key):
        values = normal(key, dims[1:], dtype)
        return values if size == 1 else values * jnp.asarray(size, dtype)

    return jax.lax.map(one, jax.random.split(key, dims[0]))


def integer_weight(key: jax.Array, scheme: str, *dims: int) -> QTensor:
    """The same in another scheme."""
    *experts, columns, depth = dims

    def one(key):
        return quantize_weight(normal(key, (columns, depth)) * jnp.bfloat16(depth**-0.5), scheme)

    return jax.lax.map(one, jax.random.split(key, experts[0])) if experts else one(key)


def plan_of(shape: GroupedMatmul) -> RoutingPlan:
    """The plan of rows of random experts, as many for each."""
    experts = np.sort(np.random.default_rng(0).permutation(shape.experts)[: shape.used])
    choices = jnp.asarray(np.repeat(experts, shape.rows // shape.used)[:, None], jnp.int32)
    valid = jnp.ones(shape.rows, bool)
    return make_plan(choices, valid, shape.experts, backend="reference")


def scales_by_group(plan: RoutingPlan) -> bool:
    """Whether the products with this plan's rows read their scales by group of K, as [K / 128, P]."""
    return plan.tile % BLOCK == 0


def written_rows(shape: GroupedMatmul) -> int:
    """The first rows of the product, which are defined: those of the tiles in use."""
    tile = tile_rows(shape.rows, shape.experts)
    return shape.used * -(-shape.rows // shape.used // tile) * tile


# ---- cases -----------------------------------------------------------------------------------------------------


def grouped_inputs(shape: GroupedMatmul, key: Iterator[jax.Array]) -> tuple[Any, ...]:
    """Rows, weights, and where: tiles' experts, and how many of them are in use."""
    plan, dims = plan_of(shape), (shape.experts, shape.columns, shape.depth)
    x, weight = inputs(shape, key, plan.row_token.shape[0], dims)
    return x, weight, plan.tile_expert, plan.used_tiles


def inputs(
    shape: GroupedMatmul | Matmul, key: Iterator[jax.Array], rows: int, dims: tuple[int, ...]
) -> tuple[Any, Weight]:
    """Rows, and weights of `dims`."""
    scheme = scheme_of(shape)
    if scheme == FP8_BLOCK:
        return fp8_rows(next(key), rows, shape.depth), fp8_weight(next(key), *dims)
    x = normal(next(key), (rows, shape.depth))
    if scheme == PLAIN:
        return x, weights(next(key), dims, jnp.bfloat16)
    return x, integer_weight(next(key), shape.scheme, *dims)


def with_scales(rows: Any) -> tuple[jax.Array, jax.Array | None]:
    """Rows and, if they are quantised already, their scales."""
    return rows if isinstance(rows, tuple) else (rows, None)


def build_grouped(shape: GroupedMatmul, backend: str) -> Case:
    arguments = made(lambda key: grouped_inputs(shape, key))

    def op(rows, weight, tile_expert, used):
        x, row_scales = with_scales(rows)
        return grouped_matmul(x, weight, tile_expert, used_tiles=used, row_scales=row_scales, backend=backend)

    return case(compile_(op, *arguments), arguments, shape, shape.used)


def build_dense(shape: Matmul, backend: str) -> Case:
    arguments = made(lambda key: inputs(shape, key, shape.tokens, (shape.columns, shape.depth)))

    def op(rows, weight):
        x, row_scales = with_scales(rows)
        return matmul(x, weight, row_scales=row_scales, backend=backend)

    return case(compile_(op, *arguments), arguments, shape, 1)


def case(program: Program, arguments: tuple[Any, ...], shape: GroupedMatmul | Matmul, used: int) -> Case:
    """A product that reads `used` weights."""
    row_blocks, blocks = -(-shape.columns // BLOCK), -(-shape.depth // BLOCK)
    weight = shape.columns * shape.depth
    # Of a row's elements and of a weight: bytes, scales and all.
    element, weight_bytes, dtype = {
        "fp8_block": (1 + 4 / BLOCK, weight + 4 * row_blocks * blocks, "float8_e4m3fn, rows quantised before"),
        "bf16": (2, 2 * weight, "bfloat16"),
        "int8": (2, weight + 4 * shape.columns, "int8, bfloat16 rows quantised within"),
        "int4": (2, weight // 2 + 4 * shape.columns * blocks, "int4, bfloat16 rows"),
    }[shape.scheme]
    return Case(
        run=lambda: program.call(*arguments),
        work={"fp8" if shape.scheme in ("fp8_block", "int8") else "bf16": 2 * shape.tokens * weight},
        bytes=int(used * weight_bytes + shape.tokens * (element * shape.depth + 2 * shape.columns)),
        dtype=dtype,
        backend=program.backend,
        memory=program.memory,
        tokens=shape.tokens,
    )


# ---- what stands beside them -----------------------------------------------------------------------------------


def fewer(rows: int, experts: int, each: int = 1) -> int:
    """Rows, in multiples of `each`, that a `ragged_dot` of so many experts has room for."""
    return max(each, min(rows, MASKED_ROWS // experts) // each * each)


def ragged_dot(shape: GroupedMatmul) -> Case:
    """The same rows' product in bfloat16, of fewer rows where all would take too much time and room."""
    rows = fewer(shape.rows, shape.experts, shape.used)
    experts = np.random.default_rng(0).permutation(shape.experts)[: shape.used]
    dims = (shape.experts, shape.depth, shape.columns)
    arguments = made(
        lambda key: (
            normal(next(key), (rows, shape.depth)),
            weights(next(key), dims, jnp.bfloat16),
            jnp.zeros(shape.experts, jnp.int32).at[experts].set(rows // shape.used),
        )
    )
    program = compile_(lambda *arrays: jax.lax.ragged_dot(*arrays), *arguments)
    return Case(
        run=lambda: program.call(*arguments),
        work={"bf16": 2 * rows * shape.columns * shape.depth},
        bytes=2 * (shape.used * shape.columns * shape.depth + rows * (shape.columns + shape.depth)),
        dtype="bfloat16",
        backend="reference",
        memory=program.memory,
        tokens=rows,
        name="lax.ragged_dot in bfloat16",
    )


def bfloat16_matmul(shape: Matmul) -> Case:
    """The product of XLA."""
    dims = (shape.tokens, shape.depth), (shape.columns, shape.depth)
    x, weight = made(lambda key: [normal(next(key), d) for d in dims])
    program = compile_(lambda x, weight: x @ weight.T, x, weight)
    return Case(
        run=lambda: program.call(x, weight),
        work={"bf16": 2 * shape.tokens * shape.columns * shape.depth},
        bytes=2 * (shape.depth * (shape.columns + shape.tokens) + shape.tokens * shape.columns),
        dtype="bfloat16",
        backend="reference",
        memory=program.memory,
        tokens=shape.tokens,
        name="XLA's product in bfloat16",
    )
