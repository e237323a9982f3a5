"""The products with int8 and four-bit weights, dense and grouped by expert."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic
from pallas_kernels.arguments import FLOATS, INT32, check, check_axes
from pallas_kernels.backend import KERNEL, gradient_of_reference, launched, resolve
from pallas_kernels.chunking import map_tiles
from pallas_kernels.quant_matmul import few_rows, few_rows_int4, few_rows_int8, int4, int8, many_rows
from pallas_kernels.quant_matmul.int4 import GROUP
from pallas_kernels.quantize import quantize_int8
from pallas_kernels.quantize.mosaic_gpu import int8_unsupported as quantize_unsupported


def check_operands(x: jax.Array, expected: dict[str, tuple[jax.Array, Any, tuple[int, ...]]]) -> None:
    """Raises ValueError if an operand has another dtype or shape than expected: (operand, dtype, shape) by name."""
    for name, (operand, dtype, shape) in expected.items():
        if operand.dtype != dtype or operand.shape != shape:
            raise ValueError(
                f"x {x.shape} needs {name} of {jnp.dtype(dtype)} {shape}, not of {operand.dtype} {operand.shape}"
            )


def check_int8(x: jax.Array, values: jax.Array, scales: jax.Array) -> None:
    """Raises ValueError if x [M, K], values [..., N, K] and scales [..., N] do not fit."""
    rows = values.shape[:-1]
    check_operands(x, {"values": (values, jnp.int8, (*rows, x.shape[-1])), "scales": (scales, jnp.float32, rows)})


def check_int4(x: jax.Array, packed: jax.Array, words: jax.Array) -> None:
    """Raises ValueError if x [M, K], packed [..., N, K / 2] and words [..., K / 128, N] do not fit."""
    *experts, rows, _ = packed.shape
    groups, rest = divmod(x.shape[-1], GROUP)
    if rest:
        raise ValueError(f"four-bit weights are in groups of {GROUP} along K; x has K = {x.shape[-1]}")
    values = (packed, jnp.uint8, (*experts, rows, groups * GROUP // 2))
    check_operands(x, {"packed": values, "words": (words, jnp.uint32, (*experts, groups, rows))})


def check_plan(rows: jax.Array, weights: jax.Array, tile_expert: jax.Array) -> int:
    """The rows of a tile; raises ValueError if rows [P, K] are no whole tiles, or weights do not have three axes."""
    tiles = tile_expert.shape[0]
    if weights.ndim != 3 or tiles == 0 or rows.shape[0] % tiles:
        raise ValueError(
            f"rows {rows.shape}, weights {weights.shape} and tile_expert {tile_expert.shape} do not fit: weights must "
            f"have three axes, and there must be as many rows in each tile"
        )
    return rows.shape[0] // tiles


def check_rows(op: str, rows, tile_expert, used_tiles, dtypes: tuple[str, ...] = FLOATS) -> None:
    """Raises ValueError for rows, or what a plan says of their tiles, of another dtype or rank; None is no plan."""
    check(op, rows=(rows, dtypes, "P K"))
    for name, array, axes in (("tile_expert", tile_expert, "tiles"), ("used_tiles", used_tiles, "")):
        if array is not None:
            check(op, **{name: (array, INT32, axes)})


def takes_many(x: jax.Array, values: jax.Array, tile: int | None) -> bool:
    """Whether the int8 kernel of many rows is the one to take, of both; `tile` as for `unsupported_int8`."""
    few = few_rows_int8.unsupported(x, values, tile) is None
    many = many_rows.unsupported(x, values, jnp.int8, tile=tile) is None
    return many and (not few or (tile is not None and tile >= few_rows.TILES[-1]))


def unsupported_int8(x: jax.Array, values: jax.Array, tile: int | None = None) -> str | None:
    """What neither kernel, of few rows nor of many, takes of these arguments; None if one takes all.

    Args:
      x: [M, K], before it is quantised.
      values: int8 [..., N, K].
      tile: rows of a tile of the grouped product; None for the dense one.
    """
    few = few_rows_int8.unsupported(x, values, tile)
    if few is None or x.dtype not in (jnp.bfloat16, jnp.float32) or (tile is not None and tile % 64):
        return few
    return many_rows.unsupported(x, values, jnp.int8, tile=tile)


def quantised_rows(x: jax.Array, backend: str) -> tuple[jax.Array, jax.Array]:
    """`quantize_int8` of many rows, by its kernel if that takes them."""
    return quantize_int8(x, backend="reference" if quantize_unsupported(x) else backend)


def int8_matmul(x: jax.Array, values: jax.Array, scales: jax.Array, *, backend: str = "auto") -> jax.Array:
    """x W^T with an int8 weight and x quantised to int8 by row (`quantize_int8`): W8A8.

    Args:
      x: float [M, K].
      values: int8 [N, K].
      scales: float32 [N], see `quantize_weight_int8`.
      backend: "auto", "mosaic_gpu", "interpret" or "reference". The kernels take N in multiples of 64; up to 128 rows
        in bfloat16 or float32 with K in multiples of 512, and any number in bfloat16 with K in multiples of 128. The
        reference is an int8 product of XLA's and, behind it, the scales. All give the same bits. The gradient passes
        straight through the quantisation.

    Returns:
      [M, N] in x's dtype: exact sums of whole numbers, times the product of both scales in float32, rounded once.

    Raises:
      ValueError: shapes or dtypes do not fit.
      BackendError: the kernel was asked for and does not take these arguments.
    """
    check("int8_matmul", x=(x, FLOATS, "M K"))
    check_axes("int8_matmul", values=(values, "N K"))
    check_int8(x, values, scales)
    chosen = resolve(backend, "int8_matmul", KERNEL, unsupported_int8(x, values))
    if chosen == "reference":
        return int8.matmul(x, values, scales)

    def kernel(x, values, scales):
        interpret = mosaic.interpret_on(chosen)
        if takes_many(x, values, None):
            return many_rows.many_rows_matmul(*quantised_rows(x, chosen), values, scales, interpret=interpret)
        return few_rows_int8.matmul(*quantize_int8(x), values, scales, dtype=x.dtype, interpret=interpret)

    return gradient_of_reference(launched(kernel, "int8_matmul", chosen), int8.matmul)(x, values, scales)


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
      backend: as for `int8_matmul`; the kernels take tiles of 8, 16, 32, or a multiple of 64 rows (of float32 rows up
        to 128), and read the weights in use.

    Returns:
      [P, N] in the rows' dtype.

    Raises:
      ValueError: shapes or dtypes do not fit.
      BackendError: the kernel was asked for and does not take these arguments.
    """
    check_rows("grouped_int8_matmul", rows, tile_expert, used_tiles)
    tile = check_plan(rows, values, tile_expert)
    check_int8(rows, values, scales)
    chosen = resolve(backend, "grouped_int8_matmul", KERNEL, unsupported_int8(rows, values, tile))

    def plain(rows, values, scales, tile_expert, used_tiles):
        del used_tiles
        return map_tiles(lambda x, weight: int8.matmul(x, *weight), rows, tile_expert, (values, scales))

    def kernel(rows, values, scales, tile_expert, used_tiles):
        interpret, weight = mosaic.interpret_on(chosen), (values, scales, tile_expert, used_tiles)
        if takes_many(rows, values, tile):
            return many_rows.many_rows_matmul(*quantised_rows(rows, chosen), *weight, interpret=interpret)
        return few_rows_int8.grouped_matmul(*quantize_int8(rows), *weight, dtype=rows.dtype, interpret=interpret)

    op = (
        plain
        if chosen == "reference"
        else gradient_of_reference(launched(kernel, "grouped_int8_matmul", chosen), plain)
    )
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
    check("int4_matmul", x=(x, FLOATS, "M K"))
    check_axes("int4_matmul", packed=(packed, "N K/2"))
    check_int4(x, packed, words)
    if backend == "auto" and x.shape[0] > few_rows_int4.MOST_ROWS:
        backend = "reference"  # meant for them
    chosen = resolve(backend, "int4_matmul", KERNEL, few_rows_int4.unsupported(x, packed))
    if chosen == "reference":
        return int4.matmul(x, packed, words)

    def kernel(x, packed, words):
        return few_rows_int4.matmul(x, packed, words, dtype=x.dtype, interpret=mosaic.interpret_on(chosen))

    return gradient_of_reference(launched(kernel, "int4_matmul", chosen), int4.matmul)(x, packed, words)


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
    check_rows("grouped_int4_matmul", rows, tile_expert, used_tiles)
    tile = check_plan(rows, packed, tile_expert)
    check_int4(rows, packed, words)
    chosen = resolve(backend, "grouped_int4_matmul", KERNEL, few_rows_int4.unsupported(rows, packed, tile))

    def plain(rows, packed, words, tile_expert, used_tiles):
        del used_tiles
        return map_tiles(lambda x, weight: int4.matmul(x, *weight), rows, tile_expert, (packed, words))

    def kernel(rows, packed, words, tile_expert, used_tiles):
        how = {"dtype": rows.dtype, "interpret": mosaic.interpret_on(chosen)}
        return few_rows_int4.grouped_matmul(rows, packed, words, tile_expert, used_tiles, **how)

    op = (
        plain
        if chosen == "reference"
        else gradient_of_reference(launched(kernel, "grouped_int4_matmul", chosen), plain)
    )
    return op(rows, packed, words, tile_expert, used_tiles)
