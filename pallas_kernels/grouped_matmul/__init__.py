"""Products of rows sorted by expert with stacked expert weights."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic
from pallas_kernels.arguments import E4M3, FLOAT32, FLOATS, INT32, check
from pallas_kernels.backend import (
    KERNEL,
    NO_GRADIENT_OF_WEIGHT,
    gradient_of_reference,
    launched,
    refuse_gradient,
    resolve,
)
from pallas_kernels.chunking import map_tiles
from pallas_kernels.grouped_matmul import mosaic_gpu, reference
from pallas_kernels.grouped_matmul.mosaic_gpu import fewest_tile_rows
from pallas_kernels.grouped_matmul.swiglu import Result
from pallas_kernels.operators import callable_package
from pallas_kernels.quant_matmul import BLOCK
from pallas_kernels.quant_matmul.integer import check_rows
from pallas_kernels.quant_matmul.reference import quant_matmul, scaled_matmul
from pallas_kernels.quantize import SCALE_FORMATS, quantize

__all__ = ["fewest_tile_rows", "grouped_dense_matmul", "grouped_matmul", "grouped_quant_matmul", "grouped_swiglu"]

callable_package(__name__)

ROWS = (*FLOATS, *E4M3)
"""Rows, quantised already or not."""


def grouped_matmul(
    rows: jax.Array,
    weights: object,
    tile_expert: jax.Array,
    product: Callable[[jax.Array, object], jax.Array],
    *,
    backend: str = "auto",
) -> jax.Array:
    """Each tile of rows times the weight of its expert, without a branch or a shape that depends on the routing.

    Any `product` is possible, so there is no kernel for it; `grouped_quant_matmul` and `grouped_dense_matmul` have one.

    Args:
      rows: float [P, K], in the order of a `RoutingPlan`.
      weights: pytree of arrays [E, ...]: the experts' weights, quantised or not.
      tile_expert: int32 [tiles], the expert of each tile of P / tiles rows.
      product: `product(x [M, K], weight) -> [M, N]` of one tile, weight being `weights` without the leading axis.
      backend: "auto" or "reference".

    Returns:
      [P, N].

    Raises:
      ValueError: rows or tile_expert have another dtype or rank, or the rows are no whole tiles.
      BackendError: a kernel was asked for.
    """
    check("grouped_matmul", rows=(rows, ROWS, "P K"), tile_expert=(tile_expert, INT32, "tiles"))
    if rows.shape[0] % max(1, tile_expert.shape[0]):
        raise ValueError(
            f"grouped_matmul: rows {rows.shape} are no whole tiles, of which there are {tile_expert.shape}"
        )
    resolve(backend, "grouped_matmul")
    return map_tiles(product, rows, tile_expert, weights)


def check_dtypes(op: str, rows, tile_expert, used_tiles, row_scales=None) -> None:
    """Raises ValueError for what the grouped products share, if it has another dtype or rank; None is left out."""
    check_rows(op, rows, tile_expert, used_tiles, ROWS)
    if row_scales is not None:
        check(op, row_scales=(row_scales, FLOAT32, "P K/128"))


def check_scale_fmt(scale_fmt: str | None) -> None:
    """Raises ValueError for a format that does not exist."""
    if scale_fmt not in SCALE_FORMATS:
        raise ValueError(f"scale_fmt {scale_fmt!r} is unknown; it is one of {SCALE_FORMATS}")


def check_tiles(rows: jax.Array, weights: jax.Array, tile_expert: jax.Array) -> None:
    """Raises ValueError if rows [P, K], weights [E, N, K] and tile_expert [tiles] do not fit together."""
    ranks = rows.ndim, weights.ndim, tile_expert.ndim
    if ranks != (2, 3, 1) or rows.shape[1] != weights.shape[2] or rows.shape[0] % max(1, tile_expert.shape[0]):
        raise ValueError(
            f"rows {rows.shape}, weights {weights.shape} and tile_expert {tile_expert.shape} do not fit: they must be "
            f"[P, K], [E, N, K] and [tiles], with P a multiple of tiles"
        )


def check_scales(values: jax.Array, scales: jax.Array) -> None:
    """Raises ValueError if values [..., N, K] and the scales of their blocks do not fit together."""
    grid = (*values.shape[:-2], *(-(-side // BLOCK) for side in values.shape[-2:]))
    if scales.shape != grid:
        raise ValueError(f"scales of values {values.shape} must be {grid}, not {scales.shape}")


def check_row_scales(rows: jax.Array, scales: jax.Array | None, by_group: bool) -> None:
    """Raises ValueError unless rows [P, K] are FP8 with scales [P, K / 128] ([K / 128, P]), or float without."""
    if (rows.dtype == jnp.float8_e4m3fn) != (scales is not None):
        raise ValueError(f"float8_e4m3fn rows come with row_scales, others without; these are {rows.dtype}")
    if scales is None:
        return
    grid = (rows.shape[0], -(-rows.shape[1] // BLOCK))
    grid = grid[::-1] if by_group else grid
    if scales.shape != grid:
        raise ValueError(f"row_scales of rows {rows.shape} must be {grid}, not {scales.shape}")


def grouped_quant_matmul(
    rows: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    tile_expert: jax.Array,
    *,
    quantize_input: bool,
    scale_fmt: str | None = "ue8m0",
    row_scales: jax.Array | None = None,
    scales_by_group: bool = False,
    used_tiles: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """`quant_matmul` of each tile of rows with the weight of its expert.

    Args:
      rows: float [P, K], in the order of a `RoutingPlan`; or float8_e4m3fn, with their scales.
      values: float8_e4m3fn [E, N, K].
      scales: float32 [E, ceil(N / 128), ceil(K / 128)], multipliers.
      tile_expert: int32 [tiles], the expert of each tile of P / tiles rows.
      quantize_input: quantise rows to FP8 in groups of 128 first, as the official code does.
      scale_fmt: of the rows' scales, see `quantize`.
      row_scales: float32 [P, K / 128], of rows that are quantised already. None: they are not.
      scales_by_group: `row_scales` is [K / 128, P], as the kernel for tiles of 128 rows takes it.
      used_tiles: int32 [], how many tiles hold a row at all: the first ones. The results of the others are undefined.
      backend: "auto", "mosaic_gpu", "interpret" or "reference". The kernels take quantised bfloat16 rows, N in
        multiples of 64, and K in multiples of 128 in tiles of 64 rows or a multiple, of 512 in tiles of 8, 16 or 32.
        Their gradient is the reference's: none for `values`, nor for rows that are quantised.

    Returns:
      [P, N] in the rows' dtype (bfloat16 of quantised rows), accumulated in float32.

    Raises:
      ValueError: other dtypes than these, unknown `scale_fmt`, or shapes do not fit.
      BackendError: the kernel was asked for and does not take these arguments, or there is no such GPU.
    """
    check_dtypes("grouped_quant_matmul", rows, tile_expert, used_tiles, row_scales)
    check("grouped_quant_matmul", values=(values, E4M3, "E N K"), scales=(scales, FLOAT32, "E N/128 K/128"))
    check_scale_fmt(scale_fmt)
    check_tiles(rows, values, tile_expert)
    check_scales(values, scales)
    check_row_scales(rows, row_scales, scales_by_group)
    reason = mosaic_gpu.unsupported_fp8(rows, values, tile_expert, quantize_input)
    chosen = resolve(backend, "grouped_quant_matmul", KERNEL, reason)
    values = refuse_gradient(values, NO_GRADIENT_OF_WEIGHT)

    def plain(rows, row_scales, values, scales, tile_expert, used_tiles):
        del used_tiles

        def product(x, weight):
            x, x_scales = x
            if x_scales is None:
                return quant_matmul(x, *weight, quantize_input, scale_fmt)
            return scaled_matmul(x, x_scales, *weight, jnp.bfloat16)

        by_row = row_scales.T if scales_by_group and row_scales is not None else row_scales
        return map_tiles(product, (rows, by_row), tile_expert, (values, scales))

    def kernel(rows, row_scales, *others):
        interpret = mosaic.interpret_on(chosen)
        by_group = scales_by_group and row_scales is not None
        if row_scales is None:
            rows, row_scales = quantize(rows, scale_fmt)
        return mosaic_gpu.grouped_quant_matmul(rows, row_scales, *others, scales_by_group=by_group, interpret=interpret)

    op = (
        plain
        if chosen == "reference"
        else gradient_of_reference(launched(kernel, "grouped_quant_matmul", chosen), plain)
    )
    return op(rows, row_scales, values, scales, tile_expert, used_tiles)


def grouped_dense_matmul(
    rows: jax.Array,
    weights: jax.Array,
    tile_expert: jax.Array,
    *,
    used_tiles: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """Each tile of rows times the transpose of its expert's weight, which is not quantised.

    Args:
      rows: float [P, K], in the order of a `RoutingPlan`.
      weights: float [E, N, K]; computed with in the rows' dtype.
      tile_expert: int32 [tiles], the expert of each tile of P / tiles rows.
      used_tiles: int32 [], how many tiles hold a row at all: the first ones. The results of the others are undefined.
      backend: "auto", "mosaic_gpu", "interpret" or "reference". The kernel takes bfloat16, N and K in multiples of
        64, and tiles of 64 rows or a multiple. Its gradient is the reference's.

    Returns:
      [P, N] in the rows' dtype, accumulated in float32.

    Raises:
      ValueError: other dtypes than these, or shapes do not fit.
      BackendError: the kernel was asked for and does not take these arguments, or there is no such GPU.
    """
    check_dtypes("grouped_dense_matmul", rows, tile_expert, used_tiles)
    check("grouped_dense_matmul", rows=(rows, FLOATS, "P K"), weights=(weights, FLOATS, "E N K"))
    check_tiles(rows, weights, tile_expert)
    reason = mosaic_gpu.unsupported_bf16(rows, weights, tile_expert)
    chosen = resolve(backend, "grouped_dense_matmul", KERNEL, reason)

    def plain(rows, weights, tile_expert, used_tiles):
        del used_tiles

        def product(x, weight):
            return jnp.matmul(x, weight.astype(x.dtype).T, precision="highest")

        return map_tiles(product, rows, tile_expert, weights)

    def kernel(*arrays):
        interpret = mosaic.interpret_on(chosen)
        return mosaic_gpu.grouped_dense_matmul(*arrays, interpret=interpret)

    op = (
        plain
        if chosen == "reference"
        else gradient_of_reference(launched(kernel, "grouped_dense_matmul", chosen), plain)
    )
    return op(rows, weights, tile_expert, used_tiles)


def grouped_swiglu(
    rows: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    tile_expert: jax.Array | None,
    *,
    row_scales: jax.Array | None = None,
    gate_scales: jax.Array | None = None,
    up_scales: jax.Array | None = None,
    used_tiles: jax.Array | None = None,
    quantize_result: bool = False,
    scale_fmt: str | None = "ue8m0",
    scales_by_group: bool = False,
    backend: str = "auto",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """silu(rows gate^T) * (rows up^T), each tile of rows with the weights of its expert: what the product down takes.

    Both products are rounded to the rows' dtype, SwiGLU is computed in float32 and rounded to that dtype again and then
    quantised if asked for, as separate operations would do it. The kernels do all of it at the end of one product.

    Args:
      rows: float [P, K], in the order of a `RoutingPlan`; for weights in FP8 they are quantised first. Or float8_e4m3fn
        with `row_scales`; then bfloat16 is what is rounded to.
      gate: float8_e4m3fn [E, W, K] with scales, or float, computed with in the rows' dtype.
      up: the same.
      tile_expert: int32 [tiles], the expert of each tile of P / tiles rows. None: one expert, and weights [W, K].
      row_scales: float32 [P, K / 128], of rows in FP8.
      gate_scales: float32 [E, ceil(W / 128), K / 128], multipliers of blocks of 128 x 128.
      up_scales: the same.
      used_tiles: int32 [], how many tiles hold a row at all: the first ones. The results of the others are undefined.
      quantize_result: return FP8 values and scales, bit for bit what `quantize` makes of the other result.
      scale_fmt: of the scales of rows and of the result, see `quantize`.
      scales_by_group: those scales are [groups, P], as the kernel for tiles of 128 rows takes them, instead of
        [P, groups], as those for fewer do.
      backend: "auto", "mosaic_gpu", "interpret" or "reference". The kernels take bfloat16 and
        FP8 in tiles of 64 rows or a multiple, W in multiples of 128 and K of 128 (bfloat16: 64); FP8 also in tiles of
        8, 16 or 32, with K in multiples of 512. Without experts they take any number of rows. A value may be the
        neighbour of the reference's in bfloat16. Their gradient is the reference's; in FP8 there is none.

    Returns:
      [P, W] in the rows' dtype, or values float8_e4m3fn [P, W] and scales float32 [P, W / 128] ([W / 128, P]).

    Raises:
      ValueError: other dtypes than these, shapes do not fit, `scale_fmt` is unknown, or a result to quantise has W that
        is no multiple of 128.
      BackendError: the kernel was asked for and does not take these arguments, or there is no such GPU.
    """
    fp8 = gate_scales is not None
    check_dtypes("grouped_swiglu", rows, tile_expert, used_tiles, row_scales)
    axes = "E W K" if tile_expert is not None else "W K"
    check("grouped_swiglu", gate=(gate, ROWS, axes), up=(up, ROWS, axes))
    check_swiglu(rows, gate, up, tile_expert, gate_scales, up_scales)
    check_row_scales(rows, row_scales, scales_by_group)
    check_scale_fmt(scale_fmt)
    if quantize_result and gate.shape[-2] % BLOCK:
        raise ValueError(f"a result of {gate.shape[-2]} columns is no whole groups of {BLOCK} to quantise")
    reason = mosaic_gpu.unsupported_swiglu(rows, gate, up, tile_expert, fp8)
    chosen = resolve(backend, "grouped_swiglu", KERNEL, reason)
    if fp8:
        gate, up = refuse_gradient(gate, NO_GRADIENT_OF_WEIGHT), refuse_gradient(up, NO_GRADIENT_OF_WEIGHT)
    result = Result(quantize_result, scale_fmt, scales_by_group)

    def plain(rows, row_scales, weights, weight_scales, tile_expert, used_tiles):
        del used_tiles
        hidden = reference.grouped_swiglu(rows, row_scales, weights, weight_scales, tile_expert, result)
        if not quantize_result:
            return (hidden,)
        values, scales = quantize(hidden, scale_fmt, backend="reference")
        return values, scales.T if scales_by_group else scales

    def kernel(rows, row_scales, *others):
        if fp8 and row_scales is None:
            rows, row_scales = quantize(rows, scale_fmt)
            row_scales = row_scales.T if scales_by_group else row_scales
        interpret = mosaic.interpret_on(chosen)
        return mosaic_gpu.grouped_swiglu(rows, row_scales, *others, result=result, interpret=interpret)

    op = plain if chosen == "reference" else gradient_of_reference(launched(kernel, "grouped_swiglu", chosen), plain)
    weight_scales = (gate_scales, up_scales) if fp8 else ()
    found = op(rows, row_scales, (gate, up), weight_scales, tile_expert, used_tiles)
    return found if quantize_result else found[0]


def check_swiglu(
    rows: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    tile_expert: jax.Array | None,
    gate_scales: jax.Array | None,
    up_scales: jax.Array | None,
) -> None:
    """Raises ValueError if these do not fit together."""
    if gate.shape != up.shape or (gate_scales is None) != (up_scales is None):
        raise ValueError(f"gate {gate.shape} and up {up.shape} must have one shape, and both have scales or neither")
    if tile_expert is not None:
        check_tiles(rows, gate, tile_expert)
    elif (rows.ndim, gate.ndim) != (2, 2) or rows.shape[1] != gate.shape[1]:
        raise ValueError(f"without tile_expert, rows {rows.shape} and gate {gate.shape} must be [P, K] and [W, K]")
    if gate_scales is None:
        if rows.dtype == jnp.float8_e4m3fn or gate.dtype == jnp.float8_e4m3fn:
            raise ValueError("rows or weights in FP8 need weights with scales")
        return
    if gate.dtype != jnp.float8_e4m3fn or up.dtype != jnp.float8_e4m3fn or gate.shape[-1] % BLOCK:
        raise ValueError(f"weights with scales are float8_e4m3fn with K a multiple of {BLOCK}, not {gate.dtype}")
    grid = "E W/128 K/128" if gate.ndim == 3 else "W/128 K/128"
    check("grouped_swiglu", gate_scales=(gate_scales, FLOAT32, grid), up_scales=(up_scales, FLOAT32, grid))
    check_scales(gate, gate_scales)
    check_scales(up, up_scales)
