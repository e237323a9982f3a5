"""The products with int8 and four-bit weights, dense and grouped by expert."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic
from pallas_kernels.backend import UNMEASURED_KERNEL, gradient_of_reference, resolve
from pallas_kernels.chunking import map_tiles
from pallas_kernels.quant_matmul import few_rows_int4, few_rows_int8, int4, int8
from pallas_kernels.quant_matmul.int4 import GROUP
from pallas_kernels.quantize import quantize_int8


def check(x: jax.Array, expected: dict[str, tuple[jax.Array, Any, tuple[int, ...]]]) -> None:
    """Raises ValueError if an operand has another dtype or shape than expected: (operand, dtype, shape) by name."""
    for name, (operand, dtype, shape) in expected.items():
        if operand.dtype != dtype or operand.shape != shape:
            raise ValueError(
                f"x {x.shape} needs {name} of {jnp.dtype(dtype)} {shape}, not of {operand.dtype} {operand.shape}"
            )


def check_int8(x: jax.Array, values: jax.Array, scales: jax.Array) -> None:
    """Raises ValueError if x [M, K], values [..., N, K] and scales [..., N] do not fit."""
    rows = values.shape[:-1]
    check(x, {"values": (values, jnp.int8, (*rows, x.shape[-1])), "scales": (scales, jnp.float32, rows)})


def check_int4(x: jax.Array, packed: jax.Array, words: jax.Array) -> None:
    """Raises ValueError if x [M, K], packed [..., N, K / 2] and words [..., K / 128, N] do not fit."""
    *experts, rows, _ = packed.shape
    groups, rest = divmod(x.shape[-1], GROUP)
    if rest:
        raise ValueError(f"four-bit weights are in groups of {GROUP} along K; x has K = {x.shape[-1]}")
    values = (packed, jnp.uint8, (*experts, rows, groups * GROUP // 2))
    check(x, {"packed": values, "words": (words, jnp.uint32, (*experts, groups, rows))})


def check_plan(rows: jax.Array, weights: jax.Array, tile_expert: jax.Array) -> int:
    """The rows of a tile; raises ValueError if rows [P, K] are no whole tiles, or weights do not have three axes."""
    tiles = tile_expert.shape[0]
    if weights.ndim != 3 or tiles == 0 or rows.shape[0] % tiles:
        raise ValueError(
            f"rows {rows.shape}, weights {weights.shape} and tile_expert {tile_expert.shape} do not fit: weights must "
            f"have three axes, and there must be as many rows in each tile"
        )
    return rows.shape[0] // tiles


def int8_matmul(x: jax.Array, values: jax.Array, scales: jax.Array, *, backend: str = "auto") -> jax.Array:
    """x W^T with an int8 weight and x quantised to int8 by row (`quantize_int8`): W8A8.

    Args:
      x: float [M, K].
      values: int8 [N, K].
      scales: float32 [N], see `quantize_weight_int8`.
      backend: "auto", "mosaic_gpu", "interpret" or "reference". The kernel takes 1 to 128 rows in bfloat16 or float32,
        N in multiples of 64 and K in multiples of 512. The reference is an int8 product of XLA's and, behind it, the
        scales: where the product is bound by arithmetic, it uses the matrix units' int8 rate, and there is no kernel of
        ours for it. Both give the same bits. The gradient passes straight through the quantisation.

    Returns:
      [M, N] in x's dtype: exact sums of whole numbers, times the product of both scales in float32, rounded once.

    Raises:
      ValueError: shapes or dtypes do not fit.
      BackendError: the kernel was asked for and does not take these arguments.
    """
    check_int8(x, values, scales)
    chosen = resolve(backend, "int8_matmul", UNMEASURED_KERNEL, few_rows_int8.unsupported(x, values))
    if chosen == "reference":
        return int8.matmul(x, values, scales)

    def kernel(x, values, scales):
        rows, row_scales = quantize_int8(x)
        return few_rows_int8.matmul(
            rows, row_scales, values, scales, dtype=x.dtype, interpret=mosaic.interpret_on(chosen)
        )

    return gradient_of_reference(kernel, int8.matmul)(x, values, scales)


def grouped_int8_matmul(
    rows: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    tile_expert: jax.Array,
    *,
    used_tiles: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """`int8_matmul` of each tile of rows with the weight of its expert.

    Args:
      rows: float [P, K], in the order of a `RoutingPlan`.
      values: int8 [E, N, K].
      scales: float32 [E, N].
      tile_expert: int32 [tiles], the expert of each tile of P / tiles rows.
      used_tiles: int32 [], how many tiles hold a row at all: the first ones. The results of the others are undefined.
      backend: as for `int8_matmul`; the kernel takes tiles of 8, 16, 32, 64 or 128 rows and reads the weights in use.

    Returns:
      [P, N] in the rows' dtype.

    Raises:
      ValueError: shapes or dtypes do not fit.
      BackendError: the kernel was asked for and does not take these arguments.
    """
    tile = check_plan(rows, values, tile_expert)
    check_int8(rows, values, scales)
    chosen = resolve(backend, "grouped_int8_matmul", UNMEASURED_KERNEL, few_rows_int8.unsupported(rows, values, tile))

    def plain(rows, values, scales, tile_expert, used_tiles):
        del used_tiles
        return map_tiles(lambda x, weight: int8.matmul(x, *weight), rows, tile_expert, (values, scales))

    def kernel(rows, values, scales, tile_expert, used_tiles):
        return few_rows_int8.grouped_matmul(
            *quantize_int8(rows),
            values,
            scales,
            tile_expert,
            used_tiles,
            dtype=rows.dtype,
            interpret=mosaic.interpret_on(chosen),
        )

    op = plain if chosen == "reference" else gradient_of_reference(kernel, plain)
    return op(rows, values, scales, tile_expert, used_tiles)


def int4_matmul(x: jax.Array, packed: jax.Array, words: jax.Array, *, backend: str = "auto") -> jax.Array:
    """x W^T with a four-bit weight, (value - zero) * scale, x as it is: W4A16.

    Args:
      x: float [M, K].
      packed: uint8 [N, K / 2], see `pack_int4` and `quantize_weight_int4`.
      words: uint32 [K / 128, N], scales and zeros, see the same. Both are stored so; nothing is rearranged at a call.
      backend: "auto", "mosaic_gpu", "interpret" or "reference". The kernel takes 1 to 128 rows in bfloat16, N in
        multiples of 64 and K in multiples of 512, and multiplies the exact weights. The reference makes a weight in x's
        dtype, rounding to it, and multiplies with that in XLA: for more rows there is nothing else. The gradient is the
        reference's.

    Returns:
      [M, N] in x's dtype, accumulated in float32.

    Raises:
      ValueError: shapes or dtypes do not fit.
      BackendError: the kernel was asked for and does not take these arguments.
    """
    check_int4(x, packed, words)
    chosen = resolve(backend, "int4_matmul", UNMEASURED_KERNEL, few_rows_int4.unsupported(x, packed))
    if chosen == "reference":
        return int4.matmul(x, packed, words)

    def kernel(x, packed, words):
        return few_rows_int4.matmul(x, packed, words, dtype=x.dtype, interpret=mosaic.interpret_on(chosen))

    return gradient_of_reference(kernel, int4.matmul)(x, packed, words)


def grouped_int4_matmul(
    rows: jax.Array,
    packed: jax.Array,
    words: jax.Array,
    tile_expert: jax.Array,
    *,
    used_tiles: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """`int4_matmul` of each tile of rows with the weight of its expert.

    Args:
      rows: float [P, K], in the order of a `RoutingPlan`.
      packed: uint8 [E, N, K / 2].
      words: uint32 [E, K / 128, N].
      tile_expert: int32 [tiles], the expert of each tile of P / tiles rows.
      used_tiles: int32 [], how many tiles hold a row at all: the first ones. The results of the others are undefined.
      backend: as for `int4_matmul`; the kernel takes tiles of 8, 16, 32 or a multiple of 32 rows and reads the weights
        in use, once for each 32 rows.

    Returns:
      [P, N] in the rows' dtype.

    Raises:
      ValueError: shapes or dtypes do not fit.
      BackendError: the kernel was asked for and does not take these arguments.
    """
    tile = check_plan(rows, packed, tile_expert)
    check_int4(rows, packed, words)
    chosen = resolve(backend, "grouped_int4_matmul", UNMEASURED_KERNEL, few_rows_int4.unsupported(rows, packed, tile))

    def plain(rows, packed, words, tile_expert, used_tiles):
        del used_tiles
        return map_tiles(lambda x, weight: int4.matmul(x, *weight), rows, tile_expert, (packed, words))

    def kernel(rows, packed, words, tile_expert, used_tiles):
        how = {"dtype": rows.dtype, "interpret": mosaic.interpret_on(chosen)}
        return few_rows_int4.grouped_matmul(rows, packed, words, tile_expert, used_tiles, **how)

    op = plain if chosen == "reference" else gradient_of_reference(kernel, plain)
    return op(rows, packed, words, tile_expert, used_tiles)
