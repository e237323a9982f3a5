"""The schemes: how a weight is stored, what it stands for, and what multiplies it. One object a scheme, here alone.

`FP8_BLOCK` is the checkpoint's own, `INT8` and `INT4` are made of any weight, `PLAIN` is an array that is not
quantised. Users name them by the keys of `SCHEMES`. How a scheme lies in files is `convert`'s business.
"""

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.arguments import FLOATS, check
from pallas_kernels.backend import NO_GRADIENT_OF_WEIGHT, refuse_gradient
from pallas_kernels.matmul import (
    config,
    few_rows_fp8,
    few_rows_int4,
    few_rows_int8,
    many_rows_fp8,
    many_rows_whole,
    reference,
)
from pallas_kernels.matmul.fp8_block import BLOCK, dequantize_blocks, grid_of, quantize_weight_fp8
from pallas_kernels.matmul.int4 import GROUP, dequantize_int4, quantize_weight_int4
from pallas_kernels.matmul.int8 import dequantize_int8, quantize_weight_int8
from pallas_kernels.quantize import quantize, quantize_int8
from pallas_kernels.quantize.mosaic_gpu import int8_unsupported as int8_rows_unsupported

Shape = tuple[int, ...]


class Arithmetic(NamedTuple):
    """How a product is computed.

    Attributes:
      quantize_input: rows are quantised first, as the scheme does it.
      scale_fmt: of the scales of FP8 rows, see `quantize`.
      dtype: of the result.
    """

    quantize_input: bool
    scale_fmt: str | None
    dtype: Any


@dataclasses.dataclass(frozen=True, repr=False)
class Scheme(abc.ABC):
    """How a weight [..., N, K] is stored and multiplied. Static, hashable data: two of one class are equal.

    Attributes:
      name: what users and files call it.
      dtypes: of the stored values and of the scales.
      axes: those of one weight's values and scales, for messages.
      row_dtypes: of the rows that the kernels of one weight take, before they are quantised.
      grouped_row_dtypes: the same of the kernels of several experts' weights.
      few_rows: the stage of the kernel of few rows, and `few_depth` what divides its K; None: there is no such kernel.
      few_tiles: rows that its tiles can have; `few_most`: rows of a dense product, at most.
      many_rows: the stage of the kernel of many rows, and `many_depth` what divides its K.
      by_rows: its tall tiles are divided by rows.
    """

    name: ClassVar[str]
    dtypes: ClassVar[tuple[str, str]]
    axes: ClassVar[tuple[str, str]]
    row_dtypes: ClassVar[tuple[str, ...]] = ("bfloat16", "float32")
    grouped_row_dtypes: ClassVar[tuple[str, ...]] = ("bfloat16", "float32")
    few_rows: ClassVar[Any] = None
    few_depth: ClassVar[int] = 512
    few_tiles: ClassVar[tuple[int, ...]] = config.TILES
    few_most: ClassVar[int] = 128
    many_rows: ClassVar[Any] = None
    many_depth: ClassVar[int] = 128
    by_rows: ClassVar[bool] = False

    def __repr__(self) -> str:
        return self.name

    @abc.abstractmethod
    def stored_shapes(self, shape: Shape) -> tuple[Shape, Shape]:
        """Returns the shapes of the values and of the scales of a weight [..., N, K]."""

    def shape_of(self, values: Any) -> Shape:
        """Returns the shape of the weight whose stored values these are."""
        return values.shape

    @abc.abstractmethod
    def quantize(self, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns values and scales of the nearest weight; `weight` is float [..., N, K]."""

    @abc.abstractmethod
    def dequantize(self, values: jax.Array, scales: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Returns the weight [..., N, K] as an array of `dtype`."""

    def concatenate(self, values: list[jax.Array], scales: list[jax.Array]) -> tuple[jax.Array, jax.Array] | None:
        """Returns weights [N, K] one below the other; None where that is no weight of the scheme."""
        return jnp.concatenate(values), jnp.concatenate(scales)

    def multipliers(self, scales: np.ndarray) -> np.ndarray:
        """Returns what values are multiplied by, of stored scales."""
        return scales

    # ---- products ----

    def check(self, op: str, name: str, grouped: bool, values: Any, scales: Any) -> None:
        """Raises ValueError unless these are a weight of the scheme, [N, K], or [E, N, K] of a grouped product.

        name: what the message calls the weight.
        """
        lead = "E " if grouped else ""
        prefix = "" if name == "weight" else f"{name}_"
        arrays = dict(zip((f"{prefix}values", f"{prefix}scales"), (values, scales), strict=True))
        for (part, array), dtype, axes in zip(arrays.items(), self.dtypes, self.axes, strict=True):
            check(op, **{part: (array, (dtype,), lead + axes)})
        shape = self.shape_of(values)
        for (part, array), expected in zip(arrays.items(), self.stored_shapes(shape), strict=True):
            if array.shape != expected:
                raise ValueError(
                    f"{op}: {name} {shape} in {self} needs {part} of {array.dtype} {expected}, not of {array.shape}"
                )

    def without_gradient(self, values: jax.Array) -> jax.Array:
        """Returns stored values that say so when they are differentiated, if they could be."""
        return values

    def left_to_xla(self, quantize_input: bool, grouped: bool) -> bool:
        """Returns whether there is no kernel by intent, so that XLA multiplies on every backend."""
        return False

    def fuses_swiglu(self, quantize_input: bool, grouped: bool) -> bool:
        """Returns whether SwiGLU behind two products is one operation."""
        return False

    def unquantized(self, quantize_input: bool) -> str | None:
        """Returns what the kernels do not take of the rows' quantisation; None if they take it."""
        return None

    def quantize_rows(self, x: jax.Array, scale_fmt: str | None, many: bool, backend: str) -> tuple[jax.Array, Any]:
        """Returns rows as the kernel takes them, of many rows or of few, and their scales by row, or None."""
        return x, None

    def few_rows_config(self, tile: int, rows: int, tiles: int, columns: int) -> Any:
        """Returns the tiles of its kernel of few rows; see `config.few_rows`."""
        return config.few_rows(tile, rows, tiles, columns)

    @abc.abstractmethod
    def product(self, x: jax.Array, x_scales: Any, values: Any, scales: Any, arithmetic: Arithmetic) -> jax.Array:
        """Returns x W^T of one weight [N, K], in plain jax.numpy: the specification.

        `x_scales` float32 [M, K / 128] of rows that are quantised already, else None.
        """


@dataclasses.dataclass(frozen=True, repr=False)
class Fp8Block(Scheme):
    """The checkpoint's own: float8_e4m3fn [..., N, K], and float32 multipliers of blocks of 128 x 128.

    Rows are quantised in groups of 128, as the official code does.
    """

    name = "fp8_block"
    dtypes = ("float8_e4m3fn", "float32")
    axes = ("N K", "N/128 K/128")
    grouped_row_dtypes = ("bfloat16",)
    few_rows = few_rows_fp8.Fp8Stage
    many_rows = many_rows_fp8.Fp8Stage

    def stored_shapes(self, shape: Shape) -> tuple[Shape, Shape]:
        return shape, grid_of(shape)

    def quantize(self, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        return quantize_weight_fp8(weight)

    def dequantize(self, values: jax.Array, scales: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        return dequantize_blocks(values, scales, dtype)

    def concatenate(self, values: list[jax.Array], scales: list[jax.Array]) -> tuple[jax.Array, jax.Array] | None:
        if any(each.shape[0] % BLOCK for each in values[:-1]):  # a block would have rows of two weights
            return None
        return super().concatenate(values, scales)

    def without_gradient(self, values: jax.Array) -> jax.Array:
        return refuse_gradient(values, NO_GRADIENT_OF_WEIGHT)

    def fuses_swiglu(self, quantize_input: bool, grouped: bool) -> bool:
        return quantize_input

    def unquantized(self, quantize_input: bool) -> str | None:
        return None if quantize_input else "an input that stays as it is; it takes quantize_input=True"

    def quantize_rows(self, x: jax.Array, scale_fmt: str | None, many: bool, backend: str) -> tuple[jax.Array, Any]:
        return quantize(x, scale_fmt, backend="reference" if backend == "reference" else "auto")

    def product(self, x: jax.Array, x_scales: Any, values: Any, scales: Any, arithmetic: Arithmetic) -> jax.Array:
        if x_scales is None:
            return reference.fp8_matmul(x, values, scales, arithmetic.quantize_input, arithmetic.scale_fmt)
        return reference.scaled_matmul(x, x_scales, values, scales, arithmetic.dtype)


@dataclasses.dataclass(frozen=True, repr=False)
class Int8(Scheme):
    """Symmetric: int8 [..., N, K], and float32 multipliers of rows [..., N]. Rows are quantised by row."""

    name = "int8"
    dtypes = ("int8", "float32")
    axes = ("N K", "N")
    few_rows = few_rows_int8.Int8Stage
    many_rows = many_rows_whole.Int8Stage
    by_rows = True

    def stored_shapes(self, shape: Shape) -> tuple[Shape, Shape]:
        return shape, shape[:-1]

    def quantize(self, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        return quantize_weight_int8(weight)

    def dequantize(self, values: jax.Array, scales: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        return dequantize_int8(values, scales, dtype)

    def left_to_xla(self, quantize_input: bool, grouped: bool) -> bool:
        return not quantize_input

    def quantize_rows(self, x: jax.Array, scale_fmt: str | None, many: bool, backend: str) -> tuple[jax.Array, Any]:
        if not many:
            return quantize_int8(x)
        return quantize_int8(x, backend="reference" if int8_rows_unsupported(x) else backend)

    def product(self, x: jax.Array, x_scales: Any, values: Any, scales: Any, arithmetic: Arithmetic) -> jax.Array:
        if arithmetic.quantize_input:
            return reference.int8_matmul(x, values, scales)
        return reference.plain_matmul(x, self.dequantize(values, scales, x.dtype))


@dataclasses.dataclass(frozen=True, repr=False)
class Int4(Scheme):
    """Asymmetric in groups of 128 along K: uint8 [..., N, K / 2] and uint32 [..., K / 128, N]; see `pack_int4`.

    Rows stay as they are. For more of them than the kernel takes, a weight is better turned into their dtype once.
    """

    name = "int4"
    dtypes = ("uint8", "uint32")
    axes = ("N K/2", "K/128 N")
    row_dtypes = ("bfloat16",)
    grouped_row_dtypes = ("bfloat16",)
    few_rows = few_rows_int4.Int4Stage
    few_tiles = (8, 16, 32)

    def stored_shapes(self, shape: Shape) -> tuple[Shape, Shape]:
        *lead, rows, depth = shape
        return (*lead, rows, depth // 2), (*lead, depth // GROUP, rows)

    def shape_of(self, values: Any) -> Shape:
        return (*values.shape[:-1], 2 * values.shape[-1])

    def quantize(self, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        if weight.shape[-1] % GROUP:
            raise ValueError(
                f"int4 is in groups of {GROUP} along the last axis; a weight {list(weight.shape)} has no whole ones"
            )
        return quantize_weight_int4(weight)

    def dequantize(self, values: jax.Array, scales: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        return dequantize_int4(values, scales, dtype)

    def concatenate(self, values: list[jax.Array], scales: list[jax.Array]) -> tuple[jax.Array, jax.Array] | None:
        return jnp.concatenate(values), jnp.concatenate(scales, 1)

    def multipliers(self, scales: np.ndarray) -> np.ndarray:
        return (scales >> 16).astype(np.uint16).view(jnp.bfloat16).swapaxes(-1, -2)

    def few_rows_config(self, tile: int, rows: int, tiles: int, columns: int) -> Any:
        return config.few_rows_int4(tile, rows, tiles, columns)

    def product(self, x: jax.Array, x_scales: Any, values: Any, scales: Any, arithmetic: Arithmetic) -> jax.Array:
        return reference.int4_matmul(x, values, scales)


@dataclasses.dataclass(frozen=True, repr=False)
class Plain(Scheme):
    """An array that is not quantised, computed with in the rows' dtype. One weight is left to XLA."""

    name = "bf16"
    dtypes = ("bfloat16", "")
    axes = ("N K", "")
    row_dtypes = ("bfloat16",)
    grouped_row_dtypes = ("bfloat16",)
    many_rows = many_rows_whole.Bf16Stage
    many_depth = 64

    def stored_shapes(self, shape: Shape) -> tuple[Shape, Shape]:
        return shape, ()

    def quantize(self, weight: jax.Array) -> tuple[jax.Array, Any]:
        return weight, None

    def dequantize(self, values: jax.Array, scales: Any, dtype: jax.typing.DTypeLike) -> jax.Array:
        return values.astype(dtype)

    def concatenate(self, values: list[jax.Array], scales: list[Any]) -> tuple[jax.Array, Any]:
        return jnp.concatenate(values), None

    def check(self, op: str, name: str, grouped: bool, values: Any, scales: Any) -> None:
        check(op, **{name: (values, FLOATS, "E N K" if grouped else "N K")})

    def left_to_xla(self, quantize_input: bool, grouped: bool) -> bool:
        return not grouped

    def fuses_swiglu(self, quantize_input: bool, grouped: bool) -> bool:
        return grouped

    def product(self, x: jax.Array, x_scales: Any, values: Any, scales: Any, arithmetic: Arithmetic) -> jax.Array:
        return reference.plain_matmul(x, values)


FP8_BLOCK, INT8, INT4, PLAIN = Fp8Block(), Int8(), Int4(), Plain()
SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in (FP8_BLOCK, INT8, INT4)}
"""By name: those that a weight can be quantised to."""


def scheme_named(name: str) -> Scheme:
    """Returns the scheme of a name; raises ValueError for an unknown one."""
    if name not in SCHEMES:
        raise ValueError(f"scheme {name!r} is unknown; it is one of {', '.join(SCHEMES)}")
    return SCHEMES[name]
