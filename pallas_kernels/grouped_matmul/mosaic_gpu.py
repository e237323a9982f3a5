"""Grouped products on Hopper: the kernels of `quant_matmul`, told the expert of each tile of rows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import swiglu_few
from pallas_kernels.grouped_matmul.swiglu import Result
from pallas_kernels.grouped_matmul.swiglu_few import swiglu_few_rows
from pallas_kernels.grouped_matmul.swiglu_many import swiglu_many_rows
from pallas_kernels.quant_matmul import few_rows, few_rows_int4, few_rows_int8, many_rows

MANY = 128
"""Rows of a tile from which on the kernel of many rows is taken. Shorter ones are bound by reading the weights."""
FEW = {
    jnp.dtype(jnp.float8_e4m3fn): few_rows.unsupported,
    jnp.dtype(jnp.int8): few_rows_int8.unsupported,
    jnp.dtype(jnp.uint8): few_rows_int4.unsupported,
}
"""By the dtype of stored weights, what their kernel of few rows does not take."""


def tile_rows(rows: jax.Array, tile_expert: jax.Array) -> int:
    """Rows of a tile; 0 if there are no tiles."""
    return rows.shape[0] // max(1, tile_expert.shape[0])


def fewest_tile_rows(values: jax.Array) -> int:
    """Rows of the smallest tiles that a kernel takes for weights [E, N, K] as they are stored."""
    smallest = few_rows.TILES[0]
    rows = jax.ShapeDtypeStruct((smallest, values.shape[-1]), jnp.bfloat16)
    few = FEW.get(values.dtype)
    return smallest if few is not None and few(rows, values, smallest) is None else 64


def takes_few(rows: jax.Array, values: jax.Array, tile_expert: jax.Array) -> bool:
    """Whether the kernel of few rows is the one to take."""
    tile = tile_rows(rows, tile_expert)
    return tile < MANY and few_rows.unsupported(rows, values, tile) is None


def weights_dtype(fp8: bool) -> Any:
    """Of the weights that the kernel of many rows takes."""
    return jnp.float8_e4m3fn if fp8 else jnp.bfloat16


def before_quantisation(rows: jax.Array) -> Any:
    """The shape and dtype of rows that may be quantised already, before that."""
    return jax.ShapeDtypeStruct(rows.shape, jnp.bfloat16) if rows.dtype == jnp.float8_e4m3fn else rows


def unsupported_fp8(rows: jax.Array, values: jax.Array, tile_expert: jax.Array, quantize_input: bool) -> str | None:
    """What neither kernel takes of these arguments, and what one takes; None if one takes all."""
    if not quantize_input:
        return "an input that stays as it is; it takes quantize_input=True"
    rows = before_quantisation(rows)
    if rows.dtype != jnp.bfloat16:
        return f"rows of {rows.dtype}; it takes bfloat16"
    tile = tile_rows(rows, tile_expert)
    if takes_few(rows, values, tile_expert):
        return None
    return few_rows.unsupported(rows, values, tile) if tile % 64 else unsupported_bf16(rows, values, tile_expert, True)


def unsupported_bf16(rows: jax.Array, weights: jax.Array, tile_expert: jax.Array, fp8: bool = False) -> str | None:
    """What the kernel of many rows does not take of these arguments, and what it takes; None if it takes all."""
    return many_rows.unsupported(rows, weights, weights_dtype(fp8), tile=tile_rows(rows, tile_expert))


def grouped_quant_matmul(
    rows: jax.Array,
    row_scales: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    tile_expert: jax.Array,
    used_tiles: jax.Array | None,
    *,
    scales_by_group: bool = False,
    interpret: Any = None,
) -> jax.Array:
    """See the op, for what is not `unsupported_fp8`; rows are float8_e4m3fn."""
    few = takes_few(rows, values, tile_expert)
    if few == scales_by_group:
        row_scales = row_scales.T
    if few:
        return few_rows.grouped_matmul(
            rows, row_scales, values, scales, tile_expert, used_tiles, dtype=jnp.bfloat16, interpret=interpret
        )
    return many_rows.many_rows_matmul(rows, row_scales, values, scales, tile_expert, used_tiles, interpret=interpret)


def grouped_dense_matmul(
    rows: jax.Array,
    weights: jax.Array,
    tile_expert: jax.Array,
    used_tiles: jax.Array | None,
    *,
    interpret: Any = None,
) -> jax.Array:
    """See the op, for what is not `unsupported_bf16`."""
    return many_rows.many_rows_matmul(rows, None, weights, None, tile_expert, used_tiles, interpret=interpret)


def swiglu_takes_few(rows: jax.Array, gate: jax.Array, tile_expert: jax.Array | None) -> bool:
    """Whether the kernel of few rows is the one to take; of weights in FP8."""
    if few_rows.unsupported(rows, gate, None if tile_expert is None else tile_rows(rows, tile_expert)) is not None:
        return False
    if tile_expert is None:
        return rows.shape[0] <= swiglu_few.TILES[-1]
    return tile_rows(rows, tile_expert) in swiglu_few.TILES


def unsupported_swiglu(
    rows: jax.Array, gate: jax.Array, up: jax.Array, tile_expert: jax.Array | None, fp8: bool
) -> str | None:
    """What neither kernel takes of these arguments, and what one takes; None if one takes all."""
    if rows.shape[0] == 0:
        return f"rows {rows.shape}; it takes one or more"
    rows = before_quantisation(rows)
    if rows.dtype != jnp.bfloat16:
        return f"rows of {rows.dtype}; it takes bfloat16"
    if gate.dtype != up.dtype:
        return f"weights of {gate.dtype} and {up.dtype}; it takes two of one dtype"
    if gate.shape[-2] % 128:
        return f"weights {gate.shape}; it takes [..., W, K] with W a multiple of 128"
    if fp8 and swiglu_takes_few(rows, gate, tile_expert):
        return None
    tile = None if tile_expert is None else tile_rows(rows, tile_expert)
    if fp8 and tile is not None and tile % 64:
        return few_rows.unsupported(rows, gate, tile)
    return many_rows.unsupported(rows, gate, weights_dtype(fp8), tile=tile)


@functools.partial(jax.jit, static_argnames=("result", "config", "interpret"))
def grouped_swiglu(
    rows: jax.Array,
    row_scales: jax.Array | None,
    weights: tuple[jax.Array, jax.Array],
    weight_scales: tuple[jax.Array, ...],
    tile_expert: jax.Array | None,
    used_tiles: jax.Array | None,
    *,
    result: Result,
    config: Any = None,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """See the op, for what is not `unsupported_swiglu`.

    Args:
      rows: float8_e4m3fn [P, K], or bfloat16 for weights of it.
      row_scales: None for bfloat16; as `result.scales_by_group` says.
      weights: gate and up.
      weight_scales: theirs; empty for bfloat16.
      tile_expert, used_tiles: see the op.
      result: what becomes of it.
      config: None: as tuned.

    Returns:
      values, and scales if quantised.
    """
    how = {"config": config, "interpret": interpret}
    if row_scales is None or not swiglu_takes_few(rows, weights[0], tile_expert):
        if row_scales is not None and not result.scales_by_group:
            row_scales = row_scales.T
        return swiglu_many_rows(rows, row_scales, weights, weight_scales, tile_expert, used_tiles, result, **how)
    if result.scales_by_group:
        row_scales = row_scales.T
    return swiglu_few_rows(rows, row_scales, weights, weight_scales, tile_expert, used_tiles, result, **how)
