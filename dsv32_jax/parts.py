"""A model like another but for some of its weights; the two share the rest."""

import difflib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.errors import UserError
from dsv32_jax.memory import available_bytes, human
from dsv32_jax.model import DeepseekV32
from dsv32_jax.params import is_linear, named_parameters, replace_parameters
from dsv32_jax.quant import QTensor, Weight, is_qtensor

__all__ = ["DEQUANTIZED", "dequantized", "with_weights"]

PLAIN_DTYPES = ("float32", "bfloat16", "float16")
DEQUANTIZED = ("float32", "bfloat16")
"""What quantised weights can become."""


def with_weights(model: DeepseekV32, weights: Mapping[str, Any]) -> DeepseekV32:
    """`model` with other weights.

    Args:
      model: stays as it is.
      weights: by path ("layers.3.attn.q_a", see `params.named_parameters`): arrays of the parameter's shape in float32,
        bfloat16 or float16, kept in their dtype; or a QTensor in place of a linear, whatever scheme that had.

    Raises:
      UserError: a path that the model has not, or an array of another shape or dtype.
    """
    parameters = named_parameters(model)
    for path, value in weights.items():
        if path not in parameters:
            close = difflib.get_close_matches(path, parameters, n=3, cutoff=0.5)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise UserError(f"weights {path!r}: the model has no parameter of that path{hint}")
        parameters[path] = _weight(path, value, parameters[path])
    return replace_parameters(model, parameters)


def _weight(path: str, value: Any, present: Weight) -> Weight:
    """`value` as it is put in the place of `present`."""
    if isinstance(value, QTensor):
        if not is_linear(path):
            raise UserError(f"weights {path!r}: a QTensor; only linears can be quantised, give an array")
    else:
        if not isinstance(value, jax.Array | np.ndarray):
            raise UserError(f"weights {path!r}: {type(value).__name__}; must be an array {list(present.shape)}")
        if str(value.dtype) not in PLAIN_DTYPES:
            raise UserError(f"weights {path!r}: {value.dtype}; must be one of {', '.join(PLAIN_DTYPES)}")
        value = jnp.asarray(value)
    if value.shape != present.shape:
        raise UserError(f"weights {path!r}: {list(value.shape)}; must be {list(present.shape)}")
    return value


def dequantized(model: DeepseekV32, dtype: str, *, memory_check: bool = True) -> DeepseekV32:
    """`model` with every quantised weight as a plain array, and a config that says so; the rest is shared.

    Args:
      model: stays as it is.
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


def check_room(needed: int, what: str, hint: str = "") -> None:
    """Raises `UserError` where so many bytes are not free."""
    free, place = available_bytes()
    if needed > free:
        raise UserError(f"{what} take {human(needed)} and {place} has {human(free)} free{hint}")
