"""A model with its linears in other schemes, in memory."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from convert.calibration import is_linear
from convert.rounding import round_int4
from dsv32_jax.errors import UserError
from dsv32_jax.model import DeepseekV32
from dsv32_jax.observation import Statistics
from dsv32_jax.params import named_parameters, replace_parameters
from dsv32_jax.quant import SCHEMES, dense, quantize_weight

UNQUANTISED = "bf16"
"""Says of a linear that it becomes plain bfloat16."""


def quantize_model(
    model: DeepseekV32, schemes: Mapping[str, str], statistics: Mapping[str, Statistics] | None = None
) -> DeepseekV32:
    """The model with some linears in other schemes; weights that have one are dequantised first.

    Args:
      model: concrete.
      schemes: one of `SCHEMES` or "bf16" for each linear that shall have it, by path; see `uniform`. Others stay.
      statistics: of the linears' inputs, from `calibrate`: four-bit weights are rounded for them. Without, or for what
        they lack (the MTP layer), each weight counts alike.

    Raises:
      UserError: a path that is no linear, an unknown scheme, or a width that a scheme does not take.
    """
    parameters = named_parameters(model)
    for path, scheme in schemes.items():
        if path not in parameters or not is_linear(path):
            raise UserError(f"{path}: no linear of this model; schemes are for linears")
        if scheme not in (*SCHEMES, UNQUANTISED):
            raise UserError(f"{path}: scheme {scheme!r}; must be one of {', '.join(SCHEMES)}, {UNQUANTISED}")
    statistics = statistics or {}
    changed = {path: _as(path, parameters[path], scheme, statistics.get(path)) for path, scheme in schemes.items()}
    return replace_parameters(model, parameters | changed)


def uniform(model: DeepseekV32, scheme: str) -> dict[str, str]:
    """The same scheme for every linear, the MTP layer's too."""
    return {path: scheme for path in named_parameters(model) if is_linear(path)}


def _as(path: str, leaf, scheme: str, statistics: Statistics | None):
    if scheme == UNQUANTISED:
        return dense(leaf, jnp.bfloat16)
    weight = dense(leaf, jnp.float32)
    try:
        if scheme == "int4" and statistics is not None:
            return round_int4(weight, statistics.moments)
        return _quantize(weight, scheme)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


_quantize = jax.jit(quantize_weight, static_argnames="scheme")
