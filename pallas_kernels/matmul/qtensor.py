"""Weights, quantised or not: what they are made of, and what they stand for."""

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.matmul.schemes import FP8_BLOCK, PLAIN, Scheme, scheme_named


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["scheme"])
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantised weight [..., N, K]: a pytree of its values and scales, with the scheme as static data.

    Attributes:
      values, scales: what the scheme makes of it.
      scheme: `FP8_BLOCK`, `INT8` or `INT4`, where the arrays are described; its name will do to make one.

    Raises:
      ValueError: a name that no scheme has.
    """

    values: jax.Array
    scales: jax.Array
    scheme: Scheme = FP8_BLOCK

    def __post_init__(self) -> None:
        if isinstance(self.scheme, str):
            object.__setattr__(self, "scheme", scheme_named(self.scheme))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor it stands for."""
        return self.scheme.shape_of(self.values)

    @property
    def ndim(self) -> int:
        """How many axes that has."""
        return self.values.ndim

    @property
    def dtype(self):
        """The dtype of the stored values."""
        return self.values.dtype

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """Returns the tensor itself; FP8 is exact in bfloat16 where scales are powers of two."""
        return self.scheme.dequantize(self.values, self.scales, dtype)


Weight = jax.Array | QTensor


def is_qtensor(leaf: object) -> bool:
    """Returns whether `jax.tree` functions should stop at a leaf: at a QTensor."""
    return isinstance(leaf, QTensor)


def dense(weight: Weight, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns a weight as a plain array of `dtype`."""
    return weight.dequantize(dtype) if isinstance(weight, QTensor) else weight.astype(dtype)


def scheme_of(weight: Weight) -> Scheme:
    """Returns the scheme of a weight: `PLAIN` of an array."""
    return weight.scheme if isinstance(weight, QTensor) else PLAIN


def scheme_name(weight: Any) -> str | None:
    """Returns the name of a QTensor's scheme; None of a plain array."""
    return weight.scheme.name if isinstance(weight, QTensor) else None


def parts_of(weight: Weight) -> tuple[jax.Array, Any]:
    """Returns stored values and scales; None for the scales of an array."""
    return (weight.values, weight.scales) if isinstance(weight, QTensor) else (weight, None)


def concatenated(*weights: Weight) -> Weight | None:
    """Returns weights of the same inputs, each [N, K], one below the other; None if that is no weight of a scheme."""
    schemes = {scheme_of(weight) for weight in weights}
    if len(schemes) > 1:
        return None
    (scheme,) = schemes
    values, scales = zip(*map(parts_of, weights), strict=True)
    joined = scheme.concatenate(list(values), list(scales))
    if joined is None or scheme == PLAIN:
        return joined and joined[0]
    return QTensor(*joined, scheme)


def quantize_weight(weight: jax.Array, scheme: str = FP8_BLOCK.name) -> QTensor:
    """Returns the nearest weight of a scheme, by its largest values alone.

    Args:
      weight: float [..., N, K].
      scheme: a name of `SCHEMES`. "fp8_block" takes the least powers of two that keep each block of 128 x 128 within
        448; "int8" divides each row by its largest magnitude / 127; "int4" divides each group of 128 along K, of which
        K must be a multiple, between its smallest and its largest value.

    Raises:
      ValueError: unknown scheme, or K does not fit it.
    """
    chosen = scheme_named(scheme)
    return QTensor(*chosen.quantize(weight), chosen)


@cache
def abstract_weight(shape: tuple[int, ...], scheme: str) -> QTensor:
    """Returns a weight of a scheme, of `jax.ShapeDtypeStruct`s; raises what `quantize_weight` does."""
    return jax.eval_shape(partial(quantize_weight, scheme=scheme), jax.ShapeDtypeStruct(shape, jnp.float32))
