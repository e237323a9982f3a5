"""The tensors of each parameter in the files of a Hugging Face checkpoint, and how they are encoded and decoded.

A checkpoint in the released FP8 form has a weight's scales under its name and "_scale_inv". One of compressed-tensors
has them under its name and "_scale", and stores a four-bit weight as four tensors: eight values in an int32, the first
in the lowest bits, along a row; zeros likewise, down a column.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from dsv32_jax.config import ModelConfig
from dsv32_jax.config.quantization_config import CompressedTensors, Group, QuantizationConfig
from dsv32_jax.convert.names import hf_name
from dsv32_jax.errors import UserError
from dsv32_jax.model.model import abstract_model
from dsv32_jax.model.params import is_linear, named_parameters
from dsv32_jax.model.quant import QTensor, abstract_weight
from pallas_kernels.quant_matmul import pack_int4, unpack_int4

OFFICIAL = {"values": "", "scales": "_scale_inv"}
"""Suffixes of the released form to a weight's name; despite their suffix, the scales are multipliers."""
COMPRESSED = {
    "fp8_block": {"values": "", "scales": "_scale"},
    "int8": {"values": "", "scales": "_scale"},
    "int4": {"packed": "_packed", "scales": "_scale", "zero_point": "_zero_point", "shape": "_shape"},
}
"""Suffixes of compressed-tensors, by scheme."""
IN_A_WORD = 8
"""Four-bit numbers in an int32."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint.

    Attributes:
      path: of the parameter that it belongs to.
      part: "array", or for a quantised parameter a key of `OFFICIAL` or `COMPRESSED`.
      expert: the slice of a stacked parameter, or None.
      shape: of the tensor in the file.
      dtype: NumPy's name; `dsv32_jax.convert.huggingface` says where other types are accepted.
    """

    path: str
    part: str
    expert: int | None
    shape: tuple[int, ...]
    dtype: str


def stored_parameters(config: ModelConfig) -> dict[str, Any]:
    """Every parameter as a checkpoint with this config has it, abstract: `jax.ShapeDtypeStruct`s and QTensors of them.

    Raises:
      UserError: the config's groups have a scheme for something that is no linear.
    """
    return dict(_stored_parameters(config))


@functools.lru_cache(maxsize=4)  # a conversion needs those of its source and of its target several times
def _stored_parameters(config: ModelConfig) -> dict[str, Any]:
    parameters = named_parameters(abstract_model(config))
    quantization = config.quantization_config
    if isinstance(quantization, CompressedTensors):
        for path, leaf in parameters.items():
            module = hf_name(path, config).format(expert=0).removesuffix(".weight")
            scheme = quantization.scheme(module)
            if scheme is None or len(leaf.shape) < 2:
                continue
            if is_linear(path):
                parameters[path] = abstract_weight(leaf.shape, scheme)
            elif not any("Linear" in group.targets for group in quantization.groups):
                raise UserError(
                    f"quantization_config.config_groups: {scheme} for {module}, which is never quantised; "
                    "leave it out of the targets"
                )
    return parameters


def may_be_plain(config: ModelConfig) -> bool:
    """Whether linears may be unquantised although the config has a scheme for them: in the released form."""
    return not isinstance(config.quantization_config, CompressedTensors)


def suffixes(leaf: Any, config: ModelConfig) -> dict[str, str]:
    """The suffix to a parameter's name for each of its tensors, by part."""
    if not isinstance(leaf, QTensor):
        return {"array": ""}
    return OFFICIAL if isinstance(config.quantization_config, QuantizationConfig) else COMPRESSED[leaf.scheme]


def hf_tensors(config: ModelConfig, stored: Mapping[str, Any] | None = None) -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint with this config by its HF name, in the order of the model's parameters.

    92,425 tensors for the 671B model. `stored` is `stored_parameters(config)` where the caller has it; that takes
    seconds.
    """
    specs = {}
    for path, leaf in (stored_parameters(config) if stored is None else stored).items():
        name = hf_name(path, config)
        stacked = "{expert}" in name
        for expert in range(leaf.shape[0]) if stacked else (None,):
            matrix = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), leaf) if stacked else leaf
            for part, suffix in suffixes(leaf, config).items():
                shape, dtype = part_shape(matrix, part, config)
                specs[name.format(expert=expert) + suffix] = TensorSpec(path, part, expert, shape, np.dtype(dtype).name)
    return specs


def part_shape(leaf: Any, part: str, config: ModelConfig) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of a part of one parameter that is not stacked."""
    if part == "array":
        return tuple(leaf.shape), leaf.dtype
    rows, depth = leaf.shape
    if leaf.scheme == "int4":
        groups = leaf.scales.shape[0]
        return {
            "packed": ((rows, depth // IN_A_WORD), np.int32),
            "scales": ((rows, groups), ml_dtypes.bfloat16),
            "zero_point": ((-(-rows // IN_A_WORD), groups), np.int32),
            "shape": ((2,), np.int64),
        }[part]
    array = getattr(leaf, part)
    return (rows, 1) if (leaf.scheme, part) == ("int8", "scales") else tuple(array.shape), array.dtype


def encode(leaf: Any, config: ModelConfig) -> dict[str, np.ndarray]:
    """The tensors of one parameter that is not stacked, by the suffix to its name."""
    names = suffixes(leaf, config)
    if not isinstance(leaf, QTensor):
        return {names["array"]: np.asarray(leaf)}
    values, scales = np.asarray(leaf.values), np.asarray(leaf.scales)
    if leaf.scheme == "int4":
        numbers, steps, zeros = map(np.asarray, _unpack(leaf.values, leaf.scales))
        parts = {
            "packed": in_words(numbers),
            "scales": steps,
            "zero_point": in_words(np.pad(zeros, ((0, -len(zeros) % IN_A_WORD), (0, 0))).T).T,
            "shape": np.asarray(leaf.shape, np.int64),
        }
    else:
        parts = {"values": values, "scales": scales[:, None] if leaf.scheme == "int8" else scales}
    return {names[part]: array for part, array in parts.items()}


def decode(scheme: str, parts: Mapping[str, np.ndarray]) -> QTensor:
    """The inverse of `encode`, from the tensors by part."""
    if scheme == "int4":
        zeros = from_words(np.ascontiguousarray(parts["zero_point"].T)).T[: len(parts["packed"])]
        values, words = _pack(from_words(parts["packed"]), parts["scales"], zeros)
        return host_qtensor(np.asarray(values), np.asarray(words), scheme)
    scales = parts["scales"].astype(np.float32)
    return host_qtensor(parts["values"], scales[:, 0] if scheme == "int8" else scales, scheme)


def host_qtensor(values: Any, scales: Any, scheme: str = "fp8_block") -> QTensor:
    """A QTensor whose arrays are NumPy's, in host memory. Any, because a `QTensor` has JAX's when a step takes it."""
    return QTensor(values, scales, scheme)


_pack, _unpack = jax.jit(pack_int4), jax.jit(unpack_int4)


def in_words(numbers: np.ndarray) -> np.ndarray:
    """uint8 [N, K] up to 15 as int32 [N, K / 8]."""
    words = numbers.reshape(len(numbers), -1, IN_A_WORD).astype(np.uint32) << np.arange(0, 32, 4, dtype=np.uint32)
    return np.bitwise_or.reduce(words, axis=-1).view(np.int32)


def from_words(words: np.ndarray) -> np.ndarray:
    """The inverse of `in_words`."""
    shifted = words.view(np.uint32)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)
    return (shifted & 15).astype(np.uint8).reshape(len(words), -1)


def quantization_config(
    schemes: Mapping[str, str], config: ModelConfig
) -> QuantizationConfig | CompressedTensors | None:
    """The quantisation config of a checkpoint whose linears have these schemes, by path; other linears are plain.

    It is of the released form where every linear is in FP8.
    """
    used = set(schemes.values())
    linears = set(filter(is_linear, stored_parameters(config)))
    if not used:
        return None
    if used == {"fp8_block"} and set(schemes) == linears:
        source_config = config.quantization_config
        if not isinstance(source_config, QuantizationConfig):
            return QuantizationConfig()
        return source_config.with_all_quantized(hf_name(path, config).removesuffix(".weight") for path in linears)
    families: dict[str, dict[str, list[int]]] = {}  # module pattern -> scheme -> layers
    for path in sorted(linears):
        module = hf_name(path, config).removesuffix(".weight")
        layer = int(module.split(".")[2])
        family = re.escape(module.replace(f".{layer}.", ".LAYER.", 1).replace("{expert}", "EXPERT"))
        families.setdefault(family, {}).setdefault(schemes.get(path, ""), []).append(layer)
    targets: dict[str, list[str]] = {scheme: [] for scheme in sorted(used)}
    for family, layers_of in families.items():
        for scheme, layers in layers_of.items():
            if scheme:
                layer_pattern = r"\d+" if len(layers_of) == 1 else f"({'|'.join(map(str, sorted(layers)))})"
                targets[scheme].append("re:" + family.replace("LAYER", layer_pattern).replace("EXPERT", r"\d+") + "$")
    return CompressedTensors(
        groups=tuple(Group(scheme=scheme, targets=tuple(patterns)) for scheme, patterns in targets.items())
    )
