"""Checks that weights and statistics are finite: in INT8 or INT4 a NaN would become a number, or every token id 0."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from dsv32_jax.config import ModelConfig
from dsv32_jax.convert.names import hf_name
from dsv32_jax.convert.statistics import Statistics
from dsv32_jax.convert.stored import suffixes
from dsv32_jax.errors import UserError
from dsv32_jax.model.params import is_choosing
from pallas_kernels.matmul import QTensor

EXPONENTS = {
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, 0x7F),  # no infinity; the one NaN has all bits
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(np.float32): (np.uint32, 0x7F800000),
}
"""The bits that are all set in a value that is NaN or infinite; testing them is ten times as fast as `isfinite`."""
CHUNK = 2**18
"""Values that are tested together, so that the check takes little memory."""


def check_finite(path: str, leaf: Any, config: ModelConfig, parts: tuple[str, ...] | None = None) -> None:
    """Checks that all values of a parameter are finite, and its scales positive.

    Args:
      path: of the parameter.
      leaf: concrete.
      config: of the checkpoint, for the name that the tensor has in files.
      parts: of a quantised parameter, "values" or "scales"; both where None.

    Raises:
      UserError: a value or scale is NaN or infinite, or a scale is 0 or negative; the message names the tensor.
    """
    if not isinstance(leaf, QTensor):
        arrays = {"array": leaf}
    else:
        arrays = {"values": leaf.values, "scales": leaf.scheme.multipliers(np.asarray(leaf.scales))}
    for part in arrays if parts is None else parts:
        array = arrays[part]
        at = first_not_finite(np.asarray(array))
        rule = "weights and scales must be finite"
        if at is None and part == "scales":
            at = next(iter(np.flatnonzero(np.asarray(array) <= 0).tolist()), None)
            rule = "scales must be positive"
        if at is not None:
            place = [int(index) for index in np.unravel_index(at, array.shape)]
            name = hf_name(path, config)
            if "{expert}" in name:
                name = name.format(expert=place.pop(0))
            value = np.asarray(array).reshape(-1)[at]
            raise UserError(
                f"{name}{suffixes(leaf, config)[part]} ({path}) is {value} at {place}; {rule}: get its file again"
            )


def check_loaded(path: str, leaf: Any, config: ModelConfig) -> None:
    """`check_finite` of what the logits would not show: parameters that choose, and the scales of all others."""
    if is_choosing(path):
        check_finite(path, leaf, config)
    elif isinstance(leaf, QTensor):
        check_finite(path, leaf, config, parts=("scales",))


def check_all_finite(parameters: Mapping[str, Any], config: ModelConfig) -> None:
    """`check_finite` of each parameter, by path."""
    for path, leaf in parameters.items():
        check_finite(path, leaf, config)


def first_not_finite(array: np.ndarray) -> int | None:
    """The flat index of the first value that is NaN or infinite."""
    if array.dtype not in EXPONENTS:
        return None
    word, mask = EXPONENTS[array.dtype]
    bits = array.reshape(-1).view(word)
    for begin in range(0, len(bits), CHUNK):
        bad = (bits[begin : begin + CHUNK] & word(mask)) == mask
        if bad.any():
            return begin + int(bad.argmax())
    return None


def check_statistics(statistics: Mapping[str, Statistics]) -> None:
    """Raises UserError for inputs of a linear whose statistics are NaN or infinite."""
    for path, linear in statistics.items():
        for name in ("rows", "largest", "moments"):
            if not bool(jnp.isfinite(getattr(linear, name)).all()):
                raise UserError(
                    f"{path}: the statistics of its inputs ({name}) are NaN or infinite; calibrate on another text, "
                    "and look for such weights in the layers before it"
                )
