"""Weights times rows: one weight, or stacked ones of experts; plain, or quantised in one of the `SCHEMES`.

    weight = pk.matmul.quantize_weight(array, "int8")
    y = pk.matmul(x, weight)

A weight is an array [N, K], or a `QTensor` that stands for one; with a leading axis of experts in the grouped products.
`schemes.py` says what each scheme is, `choice.py` which kernel a product gets.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic
from pallas_kernels.arguments import E4M3, FLOAT32, FLOATS, INT32, check
from pallas_kernels.backend import BACKENDS, KERNEL, gradient_of_reference, launched, resolve
from pallas_kernels.chunking import map_tiles
from pallas_kernels.matmul import choice, few_rows, few_rows_swiglu, many_rows, many_rows_swiglu
from pallas_kernels.matmul.choice import Choice, Product, choose
from pallas_kernels.matmul.fp8_block import BLOCK
from pallas_kernels.matmul.int4 import pack_int4, unpack_int4
from pallas_kernels.matmul.qtensor import (
    QTensor,
    Weight,
    abstract_weight,
    concatenated,
    dense,
    is_qtensor,
    parts_of,
    quantize_weight,
    scheme_name,
    scheme_of,
)
from pallas_kernels.matmul.reference import rounded_silu_product, silu_product
from pallas_kernels.matmul.schemes import FP8_BLOCK, INT4, INT8, PLAIN, SCHEMES, Arithmetic, Scheme, scheme_named
from pallas_kernels.matmul.swiglu import Result
from pallas_kernels.operators import callable_package
from pallas_kernels.quantize import SCALE_FORMATS, quantize

__all__ = [
    "BLOCK",
    "FP8_BLOCK",
    "INT4",
    "INT8",
    "PLAIN",
    "SCHEMES",
    "Choice",
    "Product",
    "QTensor",
    "Scheme",
    "Weight",
    "abstract_weight",
    "choose",
    "concatenated",
    "dense",
    "grouped_matmul",
    "grouped_swiglu",
    "is_qtensor",
    "matmul",
    "pack_int4",
    "quantize_weight",
    "scheme_name",
    "scheme_named",
    "scheme_of",
    "silu_product",
    "swiglu",
    "tile_rows",
    "unpack_int4",
]

callable_package(__name__)


def matmul(
    x: jax.Array,
    weight: Weight,
    *,
    quantize_input: bool = True,
    scale_fmt: str | None = "ue8m0",
    row_scales: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """x W^T.

    Args:
      x: float [M, K]; or float8_e4m3fn with `row_scales`, for an FP8 weight.
      weight: [N, K], an array or a `QTensor`.
      quantize_input: quantise x first as the scheme does it: for "fp8_block" to FP8 in groups of 128, as the official
        code does, for "int8" by row. Else only the weight is quantised. "int4" and arrays leave x as it is.
      scale_fmt: of the scales of FP8 rows, see `quantize`.
      row_scales: float32 [M, K / 128], of rows that are quantised already. None: they are not.
      backend: "auto", "mosaic_gpu", "interpret" or "reference". The kernels take N in multiples of 64; of "fp8_block"
        and "int8" up to 128 quantised rows in bfloat16 or float32 with K in multiples of 512, and any number in
        bfloat16 with K in multiples of 128; of "int4" 1 to 128 rows in bfloat16 with K in multiples of 512. For more
        rows of "int4", for an array, and for "int8" with rows that stay as they are, there is XLA's product alone.
        The gradient is the reference's: none for an FP8 weight, nor for an x that is quantised to FP8; for INT8 it
        passes straight through the quantisation.

    Returns:
      [M, N] in x's dtype (bfloat16 of FP8 rows), accumulated in float32; of "int8" exact sums of whole numbers, times
      the product of both scales in float32, rounded once.

    Raises:
      ValueError: other dtypes or ranks than these, shapes that do not fit, or an unknown `scale_fmt`.
      BackendError: the kernel was asked for and does not take these arguments, or there is no such GPU.
    """
    rows = Rows(x, row_scales)
    return _multiply("matmul", rows, weight, quantize_input, scale_fmt, backend)


def grouped_matmul(
    rows: jax.Array,
    weight: Weight,
    tile_expert: jax.Array,
    *,
    used_tiles: jax.Array | None = None,
    quantize_input: bool = True,
    scale_fmt: str | None = "ue8m0",
    row_scales: jax.Array | None = None,
    scales_by_group: bool = False,
    backend: str = "auto",
) -> jax.Array:
    """Each tile of rows times the transpose of its expert's weight: `matmul` of each, without reading other weights.

    Args:
      rows: float [P, K], in the order of a `RoutingPlan`; or float8_e4m3fn with `row_scales`, for an FP8 weight.
      weight: [E, N, K], an array or a `QTensor`.
      tile_expert: int32 [tiles], the expert of each tile of P / tiles rows.
      used_tiles: int32 [], how many tiles hold a row at all: the first ones. The results of the others are undefined.
      quantize_input, scale_fmt: as for `matmul`.
      row_scales: float32 [P, K / 128], of rows that are quantised already. None: they are not.
      scales_by_group: `row_scales` is [K / 128, P], as the kernel for tiles of 128 rows takes it.
      backend: as for `matmul`; the kernels take tiles of 8, 16 or 32 rows as it takes few rows, and multiples of 64 as
        it takes many; four-bit weights with tiles of a multiple of 32, an array with tiles of a multiple of 64 and K in
        multiples of 64. Rows are bfloat16; with "int8" and tiles of up to 128 rows also float32.

    Returns:
      [P, N] in the rows' dtype (bfloat16 of FP8 rows).

    Raises:
      ValueError: other dtypes or ranks than these, shapes that do not fit, or an unknown `scale_fmt`.
      BackendError: the kernel was asked for and does not take these arguments, or there is no such GPU.
    """
    sorted_rows = Rows(rows, row_scales, scales_by_group, tile_expert, used_tiles)
    return _multiply("grouped_matmul", sorted_rows, weight, quantize_input, scale_fmt, backend)


def swiglu(
    x: jax.Array,
    gate: Weight,
    up: Weight,
    *,
    quantize_input: bool = True,
    scale_fmt: str | None = "ue8m0",
    row_scales: jax.Array | None = None,
    quantize_result: bool = False,
    scales_by_group: bool = False,
    backend: str = "auto",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """silu(x gate^T) * (x up^T) of x [M, K] and weights [W, K]: `grouped_swiglu` of a single expert.

    It is one kernel for FP8 weights and rows, which takes any number of rows; else `matmul` of each and `silu_product`.
    """
    rows, result = Rows(x, row_scales, scales_by_group), Result(quantize_result, scale_fmt, scales_by_group)
    return _swiglu("swiglu", rows, (gate, up), quantize_input, result, backend)


def grouped_swiglu(
    rows: jax.Array,
    gate: Weight,
    up: Weight,
    tile_expert: jax.Array,
    *,
    used_tiles: jax.Array | None = None,
    quantize_input: bool = True,
    scale_fmt: str | None = "ue8m0",
    row_scales: jax.Array | None = None,
    quantize_result: bool = False,
    scales_by_group: bool = False,
    backend: str = "auto",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """silu(rows gate^T) * (rows up^T), each tile of rows with the weights of its expert: what the product down takes.

    Both products are rounded to the rows' dtype, SwiGLU is computed in float32 and rounded to that dtype again and then
    quantised if asked for, as separate operations would do it. For two arrays, and for FP8 weights with quantised rows,
    a kernel does all of it at the end of one product; others are two of `grouped_matmul` and `silu_product`.

    Args:
      rows: float [P, K]; or float8_e4m3fn with `row_scales`; then bfloat16 is what is rounded to.
      gate, up: [E, W, K], arrays or `QTensor`s.
      tile_expert, used_tiles, quantize_input, row_scales: as for `grouped_matmul`.
      scale_fmt: of the scales of rows and of the result, see `quantize`.
      quantize_result: return FP8 values and scales, bit for bit what `quantize` makes of the other result.
      scales_by_group: those scales are [groups, P], as the kernel for tiles of 128 rows takes them, instead of
        [P, groups], as those for fewer do.
      backend: "auto", "mosaic_gpu", "interpret" or "reference". The one kernel takes bfloat16 and FP8 in tiles of 64
        rows or a multiple, W in multiples of 128 and K of 128 (arrays: 64); FP8 also in tiles of 8, 16 or 32, with K in
        multiples of 512. A value may be the neighbour of the reference's in bfloat16. Its gradient is the reference's;
        in FP8 there is none.

    Returns:
      [P, W] in the rows' dtype, or values float8_e4m3fn [P, W] and scales float32 [P, W / 128] ([W / 128, P]).

    Raises:
      ValueError: other dtypes than these, shapes do not fit, `scale_fmt` is unknown, or a result to quantise has W that
        is no multiple of 128.
      BackendError: the kernel was asked for and does not take these arguments, or there is no such GPU.
    """
    sorted_rows = Rows(rows, row_scales, scales_by_group, tile_expert, used_tiles)
    result = Result(quantize_result, scale_fmt, scales_by_group)
    return _swiglu("grouped_swiglu", sorted_rows, (gate, up), quantize_input, result, backend)


def tile_rows(*weights: Weight) -> int:
    """Returns the rows of the smallest tiles that the kernels take for each of these weights [E, N, K]."""
    return max(choice.tile_rows(scheme_of(weight), *weight.shape[-2:]) for weight in weights)


# ---- what all four share -----------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Rows of a product: [P, K], their scales if they are quantised, and what a plan says of their tiles."""

    values: jax.Array
    scales: jax.Array | None
    by_group: bool = False
    tile_expert: jax.Array | None = None
    used_tiles: jax.Array | None = None

    @property
    def tiles(self) -> int | None:
        return None if self.tile_expert is None else self.tile_expert.shape[0]

    @property
    def dtype(self) -> Any:
        """Of the rows before they were quantised, and of the result."""
        return jnp.bfloat16 if self.values.dtype == jnp.float8_e4m3fn else self.values.dtype

    @property
    def arrays(self) -> tuple[jax.Array, jax.Array | None, jax.Array | None, jax.Array | None]:
        return self.values, self.scales, self.tile_expert, self.used_tiles


def _check(op: str, rows: Rows, weights: dict[str, Weight], scale_fmt: str | None) -> None:
    """Raises ValueError for rows, weights by their names, or tiles of another dtype or shape than they must have."""
    grouped = op.startswith("grouped")
    fp8 = all(scheme_of(weight) == FP8_BLOCK for weight in weights.values())
    dtypes = (*FLOATS, *E4M3) if fp8 else FLOATS
    check(op, **({"rows": (rows.values, dtypes, "P K")} if grouped else {"x": (rows.values, dtypes, "M K")}))
    if grouped:
        check(op, tile_expert=(rows.tile_expert, INT32, "tiles"))
    if rows.used_tiles is not None:
        check(op, used_tiles=(rows.used_tiles, INT32, ""))
    if scale_fmt not in SCALE_FORMATS:
        raise ValueError(f"scale_fmt {scale_fmt!r} is unknown; it is one of {SCALE_FORMATS}")
    for name, weight in weights.items():
        scheme_of(weight).check(op, name, grouped, *parts_of(weight))
        if rows.values.shape[1] != weight.shape[-1]:
            raise ValueError(
                f"{op}: rows {rows.values.shape} and {name} {tuple(weight.shape)} do not fit: the last axes must agree"
            )
    if rows.tiles is not None and (rows.tiles == 0 or rows.values.shape[0] % rows.tiles):
        raise ValueError(
            f"{op}: rows {rows.values.shape} and tile_expert ({rows.tiles},) do not fit: there must be as many rows in "
            "each tile"
        )
    _check_row_scales(op, rows)


def _check_row_scales(op: str, rows: Rows) -> None:
    """Raises ValueError unless rows [P, K] are FP8 with scales [P, K / 128] ([K / 128, P]), or float without."""
    values, scales = rows.values, rows.scales
    if (values.dtype == jnp.float8_e4m3fn) != (scales is not None):
        raise ValueError(f"{op}: float8_e4m3fn rows come with row_scales, others without; these are {values.dtype}")
    if scales is None:
        return
    check(op, row_scales=(scales, FLOAT32, "P K/128"))
    grid = (values.shape[0], -(-values.shape[1] // BLOCK))
    grid = grid[::-1] if rows.by_group else grid
    if scales.shape != grid:
        raise ValueError(f"{op}: row_scales of rows {values.shape} must be {grid}, not {scales.shape}")


def _product_of(rows: Rows, weights: tuple[Weight, ...], quantize_input: bool) -> Product:
    """Returns what the choice of a kernel depends on."""
    scheme, (count, depth) = scheme_of(weights[0]), rows.values.shape
    stored = " and ".join(sorted({str(parts_of(weight)[0].dtype) for weight in weights}))
    return Product(
        rows=count,
        columns=weights[0].shape[-2],
        depth=depth,
        scheme=scheme,
        tiles=rows.tiles,
        row_dtype=str(jnp.dtype(rows.dtype)),
        weight_dtype=stored,
        quantize_input=quantize_input,
        swiglu=len(weights) == 2,
    )


def _backend_of(op: str, chosen: Choice, backend: str) -> str:
    """Returns what a product runs on; see `backend.resolve`."""
    if backend in BACKENDS and chosen.kernel is None:
        if chosen.unsupported is None or (chosen.by_intent and backend == "auto"):
            return "reference"
    return resolve(backend, op, KERNEL, chosen.unsupported)


def _as_the_kernel_takes_them(
    scheme: Scheme, rows: jax.Array, row_scales: Any, by_group: bool, scale_fmt: str | None, many: bool, backend: str
) -> tuple[jax.Array, Any]:
    """Returns rows and their scales, quantised if they are not: of FP8, by group for many rows, else by row."""
    by_group = by_group and row_scales is not None
    if row_scales is None:
        rows, row_scales = scheme.quantize_rows(rows, scale_fmt, many, backend)
    if row_scales is not None and row_scales.ndim == 2 and by_group != many:
        row_scales = row_scales.T
    return rows, row_scales


def _multiply(
    op: str, rows: Rows, weight: Weight, quantize_input: bool, scale_fmt: str | None, backend: str
) -> jax.Array:
    """`matmul` and `grouped_matmul`."""
    _check(op, rows, {"weight": weight}, scale_fmt)
    scheme, (values, scales) = scheme_of(weight), parts_of(weight)
    chosen = choose(_product_of(rows, (weight,), quantize_input))
    backend = _backend_of(op, chosen, backend)
    values = scheme.without_gradient(values)
    arithmetic, dtype = Arithmetic(quantize_input, scale_fmt, rows.dtype), rows.dtype

    def plain(x, row_scales, tile_expert, used_tiles, values, scales):
        del used_tiles
        by_row = row_scales.T if rows.by_group and row_scales is not None else row_scales

        def product(rows, weight):
            (x, x_scales), (values, scales) = rows, weight
            return scheme.product(x, x_scales, values, scales, arithmetic)

        if tile_expert is None:
            return product((x, by_row), (values, scales))
        return map_tiles(product, (x, by_row), tile_expert, (values, scales))

    def kernel(x, row_scales, tile_expert, used_tiles, values, scales):
        x, row_scales = _as_the_kernel_takes_them(scheme, x, row_scales, rows.by_group, scale_fmt, chosen.many, backend)
        arrays = x, row_scales, values, scales, tile_expert, used_tiles
        config, interpret = chosen.config, mosaic.interpret_on(backend)
        if chosen.many:
            return many_rows.matmul(*arrays, stage=scheme.many_rows, config=config, interpret=interpret)
        return few_rows.matmul(*arrays, stage=scheme.few_rows, dtype=dtype, config=config, interpret=interpret)

    function = plain if backend == "reference" else gradient_of_reference(launched(kernel, op, backend), plain)
    return function(*rows.arrays, values, scales)


def _swiglu(
    op: str, rows: Rows, weights: tuple[Weight, Weight], quantize_input: bool, result: Result, backend: str
) -> Any:
    """`swiglu` and `grouped_swiglu`."""
    gate, up = weights
    _check(op, rows, {"gate": gate, "up": up}, result.scale_fmt)
    if gate.shape != up.shape:
        raise ValueError(f"{op}: gate {tuple(gate.shape)} and up {tuple(up.shape)} must have one shape")
    if result.quantized and gate.shape[-2] % BLOCK:
        raise ValueError(f"{op}: a result of {gate.shape[-2]} columns is no whole groups of {BLOCK} to quantise")
    scheme = scheme_of(gate)
    if scheme == scheme_of(up) and scheme.fuses_swiglu(quantize_input, rows.tiles is not None):
        return _fused_swiglu(op, rows, weights, result, backend)
    product = "grouped_matmul" if rows.tiles is not None else "matmul"
    hidden = silu_product(
        *(_multiply(product, rows, weight, quantize_input, result.scale_fmt, backend) for weight in weights)
    )
    if not result.quantized:
        return hidden
    values, scales = quantize(hidden, result.scale_fmt, backend="reference" if backend == "reference" else "auto")
    return values, scales.T if result.scales_by_group else scales


def _fused_swiglu(op: str, rows: Rows, weights: tuple[Weight, Weight], result: Result, backend: str) -> Any:
    """`_swiglu` as one product of gate and up."""
    scheme, pairs = scheme_of(weights[0]), tuple(map(parts_of, weights))
    chosen = choose(_product_of(rows, weights, quantize_input=True))
    backend = _backend_of(op, chosen, backend)
    values = tuple(scheme.without_gradient(values) for values, _ in pairs)
    scales = tuple(scales for _, scales in pairs if scales is not None)
    arithmetic = Arithmetic(True, result.scale_fmt, rows.dtype)

    def plain(x, row_scales, tile_expert, used_tiles, values, scales):
        del used_tiles
        row_scales = row_scales.T if rows.by_group and row_scales is not None else row_scales
        if row_scales is None:
            x, row_scales = scheme.quantize_rows(x, result.scale_fmt, False, "reference")

        def hidden_of(rows, weights):
            (x, x_scales), pairs = rows, zip(weights[0], weights[1] or (None, None), strict=True)
            gate, up = (scheme.product(x, x_scales, values, scales, arithmetic) for values, scales in pairs)
            return rounded_silu_product(gate, up)

        weights = values, scales
        if tile_expert is None:
            hidden = hidden_of((x, row_scales), weights)
        else:
            hidden = map_tiles(hidden_of, (x, row_scales), tile_expert, weights)
        if not result.quantized:
            return (hidden,)
        values, scales = quantize(hidden, result.scale_fmt, backend="reference")
        return values, scales.T if result.scales_by_group else scales

    def kernel(x, row_scales, tile_expert, used_tiles, values, scales):
        x, row_scales = _as_the_kernel_takes_them(
            scheme, x, row_scales, rows.by_group, result.scale_fmt, chosen.many, backend
        )
        module, stage = (many_rows_swiglu, scheme.many_rows) if chosen.many else (few_rows_swiglu, scheme.few_rows)
        return module.swiglu(
            x,
            row_scales,
            values,
            scales,
            tile_expert,
            used_tiles,
            stage=stage,
            config=chosen.config,
            result=result,
            interpret=mosaic.interpret_on(backend),
        )

    function = plain if backend == "reference" else gradient_of_reference(launched(kernel, op, backend), plain)
    hidden = function(*rows.arrays, values, scales)
    return hidden if result.quantized else hidden[0]
