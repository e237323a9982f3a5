"""Grouped products on Hopper: the kernels of `quant_matmul`, told the expert of each tile of rows."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quant_matmul import few_rows, many_rows

MANY = 128
"""Rows of a tile from which on the kernel of many rows is taken. Shorter ones are bound by reading the weights."""


def tile_rows(rows: jax.Array, tile_expert: jax.Array) -> int:
    """Rows of a tile; 0 if there are no tiles."""
    return rows.shape[0] // max(1, tile_expert.shape[0])


def takes_few(rows: jax.Array, values: jax.Array, tile_expert: jax.Array) -> bool:
    """Whether the kernel of few rows is the one to take."""
    tile = tile_rows(rows, tile_expert)
    return tile < MANY and few_rows.unsupported(rows, values, tile) is None


def unsupported_fp8(rows: jax.Array, values: jax.Array, tile_expert: jax.Array, quantize_input: bool) -> str | None:
    """What neither kernel takes of these arguments, and what one takes; None if one takes all."""
    if not quantize_input:
        return "an input that stays as it is; it takes quantize_input=True"
    if rows.dtype != jnp.bfloat16:
        return f"rows of {rows.dtype}; it takes bfloat16"
    tile = tile_rows(rows, tile_expert)
    if takes_few(rows, values, tile_expert):
        return None
    return few_rows.unsupported(rows, values, tile) if tile % 64 else unsupported_bf16(rows, values, tile_expert, True)


def unsupported_bf16(rows: jax.Array, weights: jax.Array, tile_expert: jax.Array, fp8: bool = False) -> str | None:
    """What the kernel of many rows does not take of these arguments, and what it takes; None if it takes all."""
    return many_rows.unsupported(rows, weights, fp8=fp8, tile=tile_rows(rows, tile_expert))


def grouped_quant_matmul(
    rows: jax.Array,
    row_scales: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    tile_expert: jax.Array,
    used_tiles: jax.Array | None,
    *,
    interpret: Any = None,
) -> jax.Array:
    """See the op, for what is not `unsupported_fp8`; rows float8_e4m3fn [P, K], row_scales float32 [P, K / 128]."""
    if takes_few(rows, values, tile_expert):
        used = tile_expert.shape[0] if used_tiles is None else used_tiles
        return few_rows.grouped_matmul(
            rows, row_scales, values, scales, tile_expert, used, dtype=jnp.bfloat16, interpret=interpret
        )
    return many_rows.many_rows_matmul(rows, row_scales.T, values, scales, tile_expert, used_tiles, interpret=interpret)


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
