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
from pallas_kernels.matmul import (
    FP8_BLOCK,
    INT4,
    INT8,
    QTensor,
    Scheme,
    abstract_weight,
    pack_int4,
    unpack_int4,
)

OFFICIAL = {"values": "", "scales": "_scale_inv"}
"""Suffixes of the released form to a weight's name; despite their suffix, the scales are multipliers."""
IN_A_WORD = 8
"""Four-bit numbers in an int32."""


class AsItIs:
    """The form of a scheme in files of compressed-tensors: values and scales as in memory.

    `suffixes` are those of the tensors' names, by part.
    """

    suffixes: Mapping[str, str] = {"values": "", "scales": "_scale"}

    def shape_of(self, leaf: QTensor, part: str) -> tuple[tuple[int, ...], Any]:
        """Returns shape and dtype of a part of a weight [N, K]."""
        array = getattr(leaf, part)
        return tuple(array.shape), array.dtype

    def encode(self, leaf: QTensor) -> dict[str, np.ndarray]:
        """Returns the tensors of a weight [N, K] by part."""
        return {"values": np.asarray(leaf.values), "scales": np.asarray(leaf.scales)}

    def decode(self, parts: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
        """Returns values and scales: the inverse of `encode`."""
        return parts["values"], parts["scales"].astype(np.float32)


class ScalesInAColumn(AsItIs):
    """The same with the scales of rows as [N, 1]."""

    def shape_of(self, leaf: QTensor, part: str) -> tuple[tuple[int, ...], Any]:
        shape, dtype = super().shape_of(leaf, part)
        return (*shape, 1) if part == "scales" else shape, dtype

    def encode(self, leaf: QTensor) -> dict[str, np.ndarray]:
        parts = super().encode(leaf)
        return parts | {"scales": parts["scales"][:, None]}

    def decode(self, parts: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
        values, scales = super().decode(parts)
        return values, scales[:, 0]


class Packed(AsItIs):
    """Eight four-bit values in an int32, zeros likewise down a column, and the weight's shape."""

    suffixes: Mapping[str, str] = {
        "packed": "_packed",
        "scales": "_scale",
        "zero_point": "_zero_point",
        "shape": "_shape",
    }

    def shape_of(self, leaf: QTensor, part: str) -> tuple[tuple[int, ...], Any]:
        (rows, depth), groups = leaf.shape, leaf.scales.shape[0]
        return {
            "packed": ((rows, depth // IN_A_WORD), np.int32),
            "scales": ((rows, groups), ml_dtypes.bfloat16),
            "zero_point": ((-(-rows // IN_A_WORD), groups), np.int32),
            "shape": ((2,), np.int64),
        }[part]

    def encode(self, leaf: QTensor) -> dict[str, np.ndarray]:
        numbers, steps, zeros = map(np.asarray, _unpack(leaf.values, leaf.scales))
        return {
            "packed": in_words(numbers),
            "scales": steps,
            "zero_point": in_words(np.pad(zeros, ((0, -len(zeros) % IN_A_WORD), (0, 0))).T).T,
            "shape": np.asarray(leaf.shape, np.int64),
        }

    def decode(self, parts: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
        zeros = from_words(np.ascontiguousarray(parts["zero_point"].T)).T[: len(parts["packed"])]
        values, scales = _pack(from_words(parts["packed"]), parts["scales"], zeros)
        return np.asarray(values), np.asarray(scales)


COMPRESSED: dict[Scheme, AsItIs] = {FP8_BLOCK: AsItIs(), INT8: ScalesInAColumn(), INT4: Packed()}
"""How compressed-tensors stores each scheme."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint.

    Attributes:
      path: of the parameter that it belongs to.
      part: "array", or for a quantised parameter a key of `OFFICIAL` or of its scheme's `suffixes`.
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
    is_official = isinstance(config.quantization_config, QuantizationConfig)
    return OFFICIAL if is_official else dict(COMPRESSED[leaf.scheme].suffixes)


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
    return COMPRESSED[leaf.scheme].shape_of(leaf, part)


def encode(leaf: Any, config: ModelConfig) -> dict[str, np.ndarray]:
    """Returns the tensors of one parameter that is not stacked, by what is added to its name."""
    names = suffixes(leaf, config)
    if not isinstance(leaf, QTensor):
        return {names["array"]: np.asarray(leaf)}
    if names is OFFICIAL:
        return {names["values"]: np.asarray(leaf.values), names["scales"]: np.asarray(leaf.scales)}
    return {names[part]: array for part, array in COMPRESSED[leaf.scheme].encode(leaf).items()}


def decode(scheme: Scheme, parts: Mapping[str, np.ndarray]) -> QTensor:
    """Returns the weight of the tensors by part: the inverse of `encode`."""
    values, scales = COMPRESSED[scheme].decode(parts)
    return host_qtensor(values, scales, scheme)


def host_qtensor(values: Any, scales: Any, scheme: Scheme = FP8_BLOCK) -> QTensor:
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
    if used == {FP8_BLOCK.name} and set(schemes) == linears:
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
