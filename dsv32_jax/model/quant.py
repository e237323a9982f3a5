"""Quantised weights."""

import dataclasses
from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp

from pallas_kernels.quant_matmul import (
    BLOCK,
    dequantize_blocks,
    dequantize_int4,
    dequantize_int8,
    quantize_weight_fp8,
    quantize_weight_int4,
    quantize_weight_int8,
)


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["scheme"])
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantised weight [..., N, K]: a pytree of its values and scales, with the scheme as static data.

    Attributes:
      values, scales: what the scheme makes of it.
      scheme: one of `SCHEMES`.
        "fp8_block", the checkpoint's own: float8_e4m3fn [..., N, K], and float32 [..., ceil(N / 128), ceil(K / 128)],
        multipliers of blocks.
        "int8", symmetric: int8 [..., N, K], and float32 [..., N], multipliers of rows.
        "int4", asymmetric, groups of 128 along K: uint8 [..., N, K / 2] and uint32 [..., K / 128, N]; see `pack_int4`.
    """

    values: jax.Array
    scales: jax.Array
    scheme: str = "fp8_block"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor it stands for."""
        *lead, columns = self.values.shape
        return (*lead, 2 * columns if self.scheme == "int4" else columns)

    @property
    def dtype(self):
        """The dtype of the stored values."""
        return self.values.dtype

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """The tensor itself; FP8 is exact in bfloat16 where scales are powers of two."""
        return DEQUANTIZE[self.scheme](self.values, self.scales, dtype)


DEQUANTIZE: dict[str, Callable[..., jax.Array]] = {
    "fp8_block": dequantize_blocks,
    "int8": dequantize_int8,
    "int4": dequantize_int4,
}
SCHEMES = tuple(DEQUANTIZE)

Weight = jax.Array | QTensor


def is_qtensor(leaf: object) -> bool:
    """For `jax.tree` functions: stop at a QTensor."""
    return isinstance(leaf, QTensor)


def dense(weight: Weight, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A weight as a plain array of `dtype`."""
    return weight.dequantize(dtype) if isinstance(weight, QTensor) else weight.astype(dtype)


def scheme_of(weight: Weight) -> str | None:
    """The scheme of a QTensor; None of a plain array."""
    return weight.scheme if isinstance(weight, QTensor) else None


def concatenated(*weights: Weight) -> Weight | None:
    """Weights of the same inputs, each [N, K], one below the other; None where that is no weight of one scheme."""
    schemes = {scheme_of(weight) for weight in weights}
    if len(schemes) > 1:
        return None
    if schemes == {None}:
        return jnp.concatenate(weights)
    if schemes == {"fp8_block"} and any(weight.shape[0] % BLOCK for weight in weights[:-1]):
        return None
    axis = 1 if schemes == {"int4"} else 0
    values, scales = ([getattr(weight, part) for weight in weights] for part in ("values", "scales"))
    return QTensor(jnp.concatenate(values), jnp.concatenate(scales, axis), schemes.pop())


def quantize_weight(weight: jax.Array, scheme: str = "fp8_block") -> QTensor:
    """The nearest weight of a scheme, by its largest values alone.

    Args:
      weight: float [..., N, K].
      scheme: one of `SCHEMES`. "fp8_block" takes the least powers of two that keep each block within 448; "int8" and
        "int4" are those of `quantize_weight_int8` and `quantize_weight_int4`, the latter for K a multiple of 128.

    Raises:
      ValueError: unknown scheme, or K does not fit it.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme {scheme!r} is unknown; it is one of {', '.join(SCHEMES)}")
    if scheme == "int4" and weight.shape[-1] % BLOCK:
        raise ValueError(
            f"int4 is in groups of {BLOCK} along the last axis; a weight {list(weight.shape)} has no whole ones"
        )
    if scheme == "int8":
        return QTensor(*quantize_weight_int8(weight), scheme)
    if scheme == "int4":
        return QTensor(*quantize_weight_int4(weight), scheme)
    return QTensor(*quantize_weight_fp8(weight))


@cache
def abstract_weight(shape: tuple[int, ...], scheme: str) -> QTensor:
    """A weight of a scheme, of `jax.ShapeDtypeStruct`s; raises what `quantize_weight` does."""
    return jax.eval_shape(partial(quantize_weight, scheme=scheme), jax.ShapeDtypeStruct(shape, jnp.float32))
