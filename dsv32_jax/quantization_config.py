"""How a checkpoint's linears are stored: the `quantization_config` of its config.json."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dsv32_jax.errors import UserError
from dsv32_jax.fields import check_keys, only

__all__ = ["CompressedTensors", "Group", "QuantizationConfig", "read_quantization_config"]


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """The released checkpoint's own form: every linear in e4m3 values with one scale for each 128x128 block."""

    quant_method: str = "fp8"
    fmt: str = "e4m3"
    activation_scheme: str = "dynamic"
    weight_block_size: tuple[int, int] = (128, 128)
    scale_fmt: str | None = "ue8m0"

    def __post_init__(self) -> None:
        only("quantization_config.quant_method", self.quant_method, "fp8")
        only("quantization_config.fmt", self.fmt, "e4m3")
        only("quantization_config.activation_scheme", self.activation_scheme, "dynamic")
        only("quantization_config.scale_fmt", self.scale_fmt, "ue8m0", None)
        size = self.weight_block_size
        if not isinstance(size, tuple) or size != (128, 128):
            shown = list(size) if isinstance(size, tuple) else size
            raise UserError(
                f"quantization_config.weight_block_size is {shown!r}; the only supported value is [128, 128]"
            )

    @classmethod
    def from_hf(cls, raw: object) -> QuantizationConfig:
        known = frozenset(f.name for f in dataclasses.fields(cls))
        block = dict(check_keys("quantization_config", raw, known, known - {"scale_fmt"}))
        if isinstance(block["weight_block_size"], list):
            block["weight_block_size"] = tuple(block["weight_block_size"])
        return cls(**{"scale_fmt": None} | block)

    def to_hf(self) -> dict[str, Any]:
        block = dataclasses.asdict(self) | {"weight_block_size": list(self.weight_block_size)}
        if self.scale_fmt is None:
            del block["scale_fmt"]
        return dict(sorted(block.items()))


_ROW_SCALES = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
_GROUPS_OF_4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": False}
_BLOCKS = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128], "symmetric": True}
_OF_TOKENS = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
_OF_GROUPS = {
    "num_bits": 8,
    "type": "float",
    "strategy": "group",
    "group_size": 128,
    "symmetric": True,
    "dynamic": True,
}
FORMS: dict[str, dict[str, Any]] = {
    "int8": {"format": "int-quantized", "weights": _ROW_SCALES, "input_activations": _OF_TOKENS},
    "int4": {"format": "pack-quantized", "weights": _GROUPS_OF_4, "input_activations": None},
    "fp8_block": {"format": "float-quantized", "weights": _BLOCKS, "input_activations": _OF_GROUPS},
}
"""What compressed-tensors calls each scheme of `dsv32_jax.quant`."""
_DEFAULTS = {
    "num_bits": 8, "type": "int", "strategy": None, "symmetric": True, "dynamic": False, "group_size": None,
    "block_structure": None,
}  # fmt: skip
_WITHOUT_EFFECT = {"actorder", "observer", "observer_kwargs", "scale_dtype", "zp_dtype"}
"""Fields of a group's weights that say how scales were found, or that the files' tensors say themselves."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Linears that are stored alike.

    Attributes:
      scheme: of `dsv32_jax.quant.SCHEMES`.
      targets: module names as in the checkpoint; "re:" and a regular expression that matches their beginnings; or
        "Linear", all.
    """

    scheme: str
    targets: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CompressedTensors:
    """The compressed-tensors format (github.com/vllm-project/compressed-tensors): groups of linears, each in a scheme.

    Attributes:
      groups: the first whose targets match a module is its.
      ignore: module names or "re:..." that no group has.
    """

    groups: tuple[Group, ...]
    ignore: tuple[str, ...] = ()

    quant_method: ClassVar[str] = "compressed-tensors"
    scale_fmt: ClassVar[str] = "ue8m0"
    """Of activations in FP8, as the official code has it."""

    def scheme(self, module: str) -> str | None:
        """The scheme of a linear by its module's name in the checkpoint; None: it is not quantised."""
        if any(_matches(target, module) for target in self.ignore):
            return None
        for group in self.groups:
            if any(target == "Linear" or _matches(target, module) for target in group.targets):
                return group.scheme
        return None

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> CompressedTensors:
        where = "quantization_config"
        optional = {
            "format", "ignore", "quantization_status", "kv_cache_scheme", "global_compression_ratio", "version",
            "sparsity_config", "transform_config",
        }  # fmt: skip
        needed = {"quant_method", "config_groups"}
        block = check_keys(where, raw, frozenset(optional | needed), frozenset(needed))
        only(f"{where}.quantization_status", block.get("quantization_status"), "compressed", None)
        for name in ("kv_cache_scheme", "sparsity_config", "transform_config"):
            if block.get(name):
                raise UserError(f"{where}.{name} is {block[name]!r}; it must be absent or null")
        groups = block["config_groups"]
        if not isinstance(groups, Mapping) or not groups:
            raise UserError(f"{where}.config_groups is {groups!r}; it must be an object of groups")
        return cls(
            groups=tuple(_group(f"{where}.config_groups.{name}", group) for name, group in groups.items()),
            ignore=_strings(f"{where}.ignore", block.get("ignore") or []),
        )

    def to_hf(self) -> dict[str, Any]:
        groups = {
            f"group_{number}": {"targets": list(group.targets), **FORMS[group.scheme]}
            for number, group in enumerate(self.groups)
        }
        formats = {FORMS[group.scheme]["format"] for group in self.groups}
        return {
            "quant_method": self.quant_method,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(self.ignore),
        }


def _matches(target: str, module: str) -> bool:
    return re.match(target[3:], module) is not None if target.startswith("re:") else target == module


def _strings(where: str, raw: object) -> tuple[str, ...]:
    if not isinstance(raw, list) or not all(isinstance(one, str) for one in raw):
        raise UserError(f"{where} is {raw!r}; it must be a list of strings")
    for one in raw:
        try:
            re.compile(one[3:] if one.startswith("re:") else "")
        except re.error as error:
            raise UserError(f"{where}: {one!r} is no regular expression ({error})") from None
    return tuple(raw)


def _group(where: str, raw: object) -> Group:
    known = frozenset({"targets", "weights", "input_activations", "output_activations", "format"})
    block = check_keys(where, raw, known, frozenset({"targets", "weights"}))
    if block.get("output_activations"):
        raise UserError(f"{where}.output_activations is {block['output_activations']!r}; it must be absent or null")
    weights = _settings(f"{where}.weights", block["weights"])
    scheme = next((scheme for scheme, form in FORMS.items() if weights == _DEFAULTS | form["weights"]), None)
    if scheme is None:
        known_weights = "; ".join(f"{scheme}: {json.dumps(form['weights'])}" for scheme, form in FORMS.items())
        raise UserError(f"{where}.weights is {json.dumps(block['weights'])}; supported are {known_weights}")
    form, inputs = FORMS[scheme], block.get("input_activations")
    if (inputs and _settings(f"{where}.input_activations", inputs)) != (
        form["input_activations"] and _DEFAULTS | form["input_activations"]
    ):
        right = json.dumps(form["input_activations"])
        raise UserError(f"{where}.input_activations is {json.dumps(inputs)}; with these weights it must be {right}")
    only(f"{where}.format", block.get("format"), form["format"], None)
    return Group(scheme=scheme, targets=_strings(f"{where}.targets", block["targets"]))


def _settings(where: str, raw: object) -> dict[str, Any]:
    """What matters of a group's weights or inputs, with the format's defaults for what is absent."""
    known = frozenset(_DEFAULTS) | _WITHOUT_EFFECT
    block = check_keys(where, raw, known, frozenset())
    return _DEFAULTS | {name: value for name, value in block.items() if name not in _WITHOUT_EFFECT}


def read_quantization_config(raw: object) -> QuantizationConfig | CompressedTensors:
    """From the parsed `quantization_config`, by its `quant_method`."""
    if isinstance(raw, Mapping) and raw.get("quant_method") == CompressedTensors.quant_method:
        return CompressedTensors.from_hf(raw)
    if isinstance(raw, Mapping) and "quant_method" in raw:
        only("quantization_config.quant_method", raw["quant_method"], "fp8", CompressedTensors.quant_method)
    return QuantizationConfig.from_hf(raw)
