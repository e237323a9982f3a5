"""Makes a model with some weights of another one replaced; the two share the rest."""

import difflib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv32_jax.common.arguments import instance
from dsv32_jax.errors import UserError
from dsv32_jax.generate.memory import check_room
from dsv32_jax.model.model import DeepseekV32
from dsv32_jax.model.params import is_choosing, is_linear, named_parameters, path_name, replace_parameters
from pallas_kernels.matmul import QTensor, Weight, abstract_weight, dense, is_qtensor

__all__ = ["DEQUANTIZED", "check_edited", "dequantized", "shapes_of", "with_weights"]

PLAIN_DTYPES = ("float32", "bfloat16", "float16")
DEQUANTIZED = ("float32", "bfloat16")
"""Dtypes to which quantised weights can be dequantised."""


def with_weights(model: DeepseekV32, weights: Mapping[str, Any]) -> DeepseekV32:
    """Returns `model` with some weights replaced.

    Args:
      model: it is not changed.
      weights: by path ("layers.3.attn.q_a", see `params.named_parameters`): arrays of the parameter's shape in float32,
        bfloat16 or float16, kept in their dtype; or a QTensor in place of a linear, whatever scheme that had.

    Raises:
      UserError: a path that the model does not have; an array of another shape or dtype; or one with a NaN or infinity
        that would only make the model choose other keys or experts.
    """
    instance("weights", weights, Mapping, "a mapping from paths to arrays")
    parameters = named_parameters(model)
    for path, value in weights.items():
        if path not in parameters:
            instance("weights", path, str, "a path, such as 'layers.3.attn.q_a'")
            close = difflib.get_close_matches(path, parameters, n=3, cutoff=0.5)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise UserError(f"weights {path!r}: the model has no parameter of that path{hint}")
        parameters[path] = _weight(path, value, parameters[path])
    return replace_parameters(model, parameters)


def _weight(path: str, value: Any, present: Weight) -> Weight:
    """`value`, checked and as a JAX array, for the place of the weight `present`."""
    if isinstance(value, QTensor):
        if not is_linear(path):
            raise UserError(f"weights {path!r}: a QTensor; only linears can be quantised, give an array")
        _check_stored(path, value)
    else:
        if not isinstance(value, jax.Array | np.ndarray):
            raise UserError(f"weights {path!r}: {type(value).__name__}; must be an array {list(present.shape)}")
        if str(value.dtype) not in PLAIN_DTYPES:
            raise UserError(f"weights {path!r}: {value.dtype}; must be one of {', '.join(PLAIN_DTYPES)}")
        value = jnp.asarray(value)
    if value.shape != present.shape:
        raise UserError(f"weights {path!r}: {list(value.shape)}; must be {list(present.shape)}")
    if is_choosing(path) and not bool(jnp.isfinite(dense(value, jnp.float32)).all()):
        raise UserError(f"weights {path!r}: has a value that is NaN or infinite; others would be chosen without a word")
    return value


def _check_stored(path: str, value: QTensor) -> None:
    """Checks shapes and dtypes of a QTensor's arrays against its scheme."""
    try:
        expected = abstract_weight(value.shape, value.scheme.name)
    except ValueError as error:
        raise UserError(f"weights {path!r}: {error}") from error
    for part in ("values", "scales"):
        array, right = getattr(value, part), getattr(expected, part)
        if (array.shape, array.dtype) != (right.shape, right.dtype):
            raise UserError(
                f"weights {path!r}: {part} {array.dtype} {list(array.shape)}; in {value.scheme} they must be "
                f"{right.dtype} {list(right.shape)}"
            )


def check_edited(model: DeepseekV32, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Checks a model that the user may have edited in place.

    Args:
      model: the model now.
      shapes: `shapes_of` the model when it was last replaced.

    Raises:
      UserError: a weight that could change unnoticed (a NumPy array, an `nnx.Variable`), that is no float array, that
        has another shape, or that is missing.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_whole)
    parameters = {path_name(path): leaf for path, leaf in leaves}
    for path in [*parameters, *(shapes.keys() - parameters.keys())]:
        leaf: Any = parameters.get(path)
        right = f"a jax.Array of floats {list(shapes[path])}" if path in shapes else "absent"
        arrays = (leaf.values, leaf.scales) if isinstance(leaf, QTensor) else (leaf,)
        if path not in shapes or not all(isinstance(array, jax.Array) for array in arrays):
            raise UserError(f"model.{path}: {type(leaf).__name__}; must be {right}")
        if leaf.shape != shapes[path] or not (is_qtensor(leaf) or jnp.issubdtype(leaf.dtype, jnp.floating)):
            raise UserError(f"model.{path}: {leaf.dtype} {list(leaf.shape)}; must be {right}")


def shapes_of(model: DeepseekV32) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by its path."""
    return {path: tuple(leaf.shape) for path, leaf in named_parameters(model).items()}


def _is_whole(leaf: Any) -> bool:
    return is_qtensor(leaf) or isinstance(leaf, nnx.Variable)


def dequantized(model: DeepseekV32, dtype: str, *, memory_check: bool = True) -> DeepseekV32:
    """Returns `model` with every quantised weight as a plain array, and a config without quantisation.

    Args:
      model: it is not changed; the plain weights are shared.
      dtype: one of `DEQUANTIZED`; bfloat16 is exact for FP8 whose scales are powers of two, float32 always.
      memory_check: refuse what does not fit into the free memory.

    Raises:
      UserError: an unknown dtype, or there is no room.
    """
    check_dequantized(dtype)
    parameters = named_parameters(model)
    quantized = {path: leaf for path, leaf in parameters.items() if is_qtensor(leaf)}
    if memory_check:
        check_room(dequantized_bytes(quantized, dtype), f"dequantize: the weights in {dtype}")
    changed = replace_parameters(model, parameters | {path: leaf.dequantize(dtype) for path, leaf in quantized.items()})
    changed.config = model.config.replace(quantization_config=None)
    return changed


def check_dequantized(dtype: str) -> None:
    """Raises `UserError` for a dtype that quantised weights cannot become."""
    if dtype not in DEQUANTIZED:
        raise UserError(f"dequantize: {dtype!r} is unknown; it is one of {', '.join(DEQUANTIZED)}")


def dequantized_bytes(parameters: Mapping[str, Any], dtype: str) -> int:
    """Bytes of parameters, by path, abstract or not, with those that are quantised as arrays of `dtype`."""
    return sum(
        math.prod(leaf.shape) * (jnp.dtype(dtype) if is_qtensor(leaf) else leaf.dtype).itemsize
        for leaf in parameters.values()
    )
