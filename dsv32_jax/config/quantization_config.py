"""Reads the `quantization_config` of a config.json: how a checkpoint's linears are stored."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dsv32_jax.common.fields import check_keys, neutral, only
from dsv32_jax.config.rope_scaling import NeutralFields
from dsv32_jax.errors import UserError

__all__ = ["CompressedTensors", "Group", "QuantizationConfig", "read_quantization_config"]


_KEPT = "weights stay as they are stored; act_quant=False and --no-act-quant leave their inputs as they are"
_OF_LOADING: dict[str, tuple[tuple[Any, ...], str]] = {
    "dequantize": ((False,), _KEPT),
    "run_compressed": ((True,), _KEPT),
    "use_optimized_inference": ((True, False), _KEPT),
}
"""Options of transformers' loader, which writes them into a config."""
_NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "dequantize": _OF_LOADING["dequantize"],
    "modules_to_convert": (([],), "nothing but linears is stored in FP8"),
    "expert_dtype": (("fp8",), "experts are stored as the other linears are"),
    "is_checkpoint_fp8_serialized": ((True,), "weights are stored in FP8"),
    "kv_cache_scheme": ((), "the cache has no scales of its own"),
    "kv_cache_quant_method": ((), "the cache has no scales of its own"),
}
"""Fields of the released form that are kept and written back: accepted values beside null, and the reason."""
_PLAIN_MODULES = ("modules_to_not_convert", "ignored_layers")
"""Lists of modules that are not quantised, for other readers; this one sees it from the tensors."""


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """The released checkpoint's own form: every linear in e4m3 values with one scale for each 128x128 block.

    Attributes:
      fmt: format of the values; None where the file does not say, which means the same.
      scale_fmt: format of the scales of activations: "ue8m0", powers of two, or None or transformers' "float", any
        float32.
      extra_fields: fields that have no effect here, written back as they were read.
    """

    quant_method: str = "fp8"
    fmt: str | None = "e4m3"
    activation_scheme: str = "dynamic"
    weight_block_size: tuple[int, int] = (128, 128)
    scale_fmt: str | None = "ue8m0"
    extra_fields: NeutralFields = ()

    def __post_init__(self) -> None:
        only("quantization_config.quant_method", self.quant_method, "fp8")
        only("quantization_config.fmt", self.fmt, "e4m3", None)
        only("quantization_config.activation_scheme", self.activation_scheme, "dynamic")
        only("quantization_config.scale_fmt", self.scale_fmt, "ue8m0", None)
        size = self.weight_block_size
        if not isinstance(size, tuple) or size != (128, 128):
            shown = list(size) if isinstance(size, tuple) else size
            raise UserError(
                f"quantization_config.weight_block_size is {shown!r}; the only supported value is [128, 128]"
            )
        for name, text in self.extra_fields:
            value = json.loads(text)
            if name in _NEUTRAL:
                neutral(f"quantization_config.{name}", value, *_NEUTRAL[name])
            elif name in _PLAIN_MODULES and value is not None:
                _strings(f"quantization_config.{name}", value)

    @classmethod
    def from_hf(cls, raw: object) -> QuantizationConfig:
        path = "quantization_config"
        attributes = frozenset(f.name for f in dataclasses.fields(cls)) - {"extra_fields"}
        known = attributes | _NEUTRAL.keys() | set(_PLAIN_MODULES)
        block = dict(check_keys(path, raw, known, frozenset({"quant_method", "weight_block_size"})))
        # A null means the same as an absent field, and "float" the same as an absent format of scales.
        neutral_fields = {name: value for name, value in block.items() if name not in attributes or value is None}
        if block.get("scale_fmt") == "float":
            neutral_fields["scale_fmt"] = "float"
        block = {name: value for name, value in block.items() if name not in neutral_fields}
        if isinstance(block.get("weight_block_size"), list):
            block["weight_block_size"] = tuple(block["weight_block_size"])
        if "weight_block_size" not in block:
            only(f"{path}.weight_block_size", None, [128, 128])
        if "quant_method" not in block:
            only(f"{path}.quant_method", None, "fp8")
        extra_fields = tuple((name, json.dumps(value, ensure_ascii=False)) for name, value in neutral_fields.items())
        return cls(**{"scale_fmt": None, "fmt": None} | block, extra_fields=extra_fields)

    def to_hf(self) -> dict[str, Any]:
        block = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra_fields"}
        block["weight_block_size"] = list(self.weight_block_size)
        extra_fields = {name: json.loads(text) for name, text in self.extra_fields}
        present = {name: value for name, value in block.items() if value is not None}
        return dict(sorted((extra_fields | present).items()))

    def with_all_quantized(self, modules: Iterable[str]) -> QuantizationConfig:
        """The same without the entries that list these modules as not quantised.

        Args:
          modules: names; experts have "{expert}" in place of a number.
        """
        parts_of = [module.split(".") for module in modules]
        names = {
            ".".join(parts[begin:end])
            for parts in parts_of
            for begin in range(len(parts))
            for end in range(begin + 1, len(parts) + 1)
        }

        def listed(entry: str) -> bool:
            return entry.startswith("re:") or re.sub(r"experts\.\d+", "experts.{expert}", entry.strip(".")) in names

        extra_fields = {name: json.loads(text) for name, text in self.extra_fields}
        for name in _PLAIN_MODULES:
            if extra_fields.get(name):
                extra_fields[name] = [entry for entry in extra_fields[name] if not listed(entry)]
        texts = tuple((name, json.dumps(value, ensure_ascii=False)) for name, value in extra_fields.items())
        return dataclasses.replace(self, extra_fields=texts)


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
"""What compressed-tensors calls each scheme of `pallas_kernels.matmul`."""
_DEFAULTS = {
    "num_bits": 8, "type": "int", "strategy": None, "symmetric": True, "dynamic": False, "group_size": None,
    "block_structure": None,
}  # fmt: skip
_WITHOUT_EFFECT = {"actorder", "observer", "observer_kwargs", "scale_dtype", "zp_dtype"}
"""Fields of a group's weights that say how scales were computed, or that the files' tensors tell."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Linears that are stored in one scheme.

    Attributes:
      scheme: of `pallas_kernels.matmul.SCHEMES`.
      targets: module names as in the checkpoint; "re:" and a regular expression that matches their beginnings; or
        "Linear", all.
    """

    scheme: str
    targets: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CompressedTensors:
    """The compressed-tensors format (github.com/vllm-project/compressed-tensors): groups of linears, each in a scheme.

    Attributes:
      groups: a module belongs to the first group whose targets match it.
      ignore: module names or "re:..." of linears that belong to no group.
    """

    groups: tuple[Group, ...]
    ignore: tuple[str, ...] = ()

    quant_method: ClassVar[str] = "compressed-tensors"
    scale_fmt: ClassVar[str] = "ue8m0"
    """Format of the scales of FP8 activations, as in the official code."""

    def scheme(self, module: str) -> str | None:
        """The scheme of a linear by its module's name in the checkpoint; None if it is not quantised."""
        if any(_matches(target, module) for target in self.ignore):
            return None
        for group in self.groups:
            if any(target == "Linear" or _matches(target, module) for target in group.targets):
                return group.scheme
        return None

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> CompressedTensors:
        path = "quantization_config"
        optional = {
            "format", "ignore", "quantization_status", "kv_cache_scheme", "global_compression_ratio", "version",
            "sparsity_config", "transform_config", *_OF_LOADING,
        }  # fmt: skip
        needed = {"quant_method", "config_groups"}
        block = check_keys(path, raw, frozenset(optional | needed), frozenset(needed))
        only(f"{path}.quantization_status", block.get("quantization_status"), "compressed", None)
        for name, (accepted, reason) in _OF_LOADING.items():
            neutral(f"{path}.{name}", block.get(name), accepted, reason)
        for name in ("kv_cache_scheme", "sparsity_config", "transform_config"):
            dense = isinstance(block.get(name), Mapping) and block[name].get("format") == "dense"
            if block.get(name) and not (name == "sparsity_config" and dense):
                raise UserError(f"{path}.{name} is {block[name]!r}; it must be absent or null")
        groups = block["config_groups"]
        if not isinstance(groups, Mapping) or not groups:
            raise UserError(f"{path}.config_groups is {groups!r}; it must be an object of groups")
        return cls(
            groups=tuple(_group(f"{path}.config_groups.{name}", group) for name, group in groups.items()),
            ignore=_strings(f"{path}.ignore", block.get("ignore") or []),
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


def _strings(path: str, raw: object) -> tuple[str, ...]:
    if not isinstance(raw, list) or not all(isinstance(entry, str) for entry in raw):
        raise UserError(f"{path} is {raw!r}; it must be a list of strings")
    for entry in raw:
        try:
            re.compile(entry[3:] if entry.startswith("re:") else "")
        except re.error as error:
            raise UserError(f"{path}: {entry!r} is no regular expression ({error})") from None
    return tuple(raw)


def _group(path: str, raw: object) -> Group:
    known = frozenset({"targets", "weights", "input_activations", "output_activations", "format"})
    block = check_keys(path, raw, known, frozenset({"targets", "weights"}))
    if block.get("output_activations"):
        raise UserError(f"{path}.output_activations is {block['output_activations']!r}; it must be absent or null")
    weights = _settings(f"{path}.weights", block["weights"])
    scheme = next((scheme for scheme, form in FORMS.items() if weights == _DEFAULTS | form["weights"]), None)
    if scheme is None:
        known_weights = "; ".join(f"{scheme}: {json.dumps(form['weights'])}" for scheme, form in FORMS.items())
        raise UserError(f"{path}.weights is {json.dumps(block['weights'])}; supported are {known_weights}")
    form, inputs = FORMS[scheme], block.get("input_activations")
    if (inputs and _settings(f"{path}.input_activations", inputs)) != (
        form["input_activations"] and _DEFAULTS | form["input_activations"]
    ):
        right = json.dumps(form["input_activations"])
        raise UserError(f"{path}.input_activations is {json.dumps(inputs)}; with these weights it must be {right}")
    only(f"{path}.format", block.get("format"), form["format"], None)
    return Group(scheme=scheme, targets=_strings(f"{path}.targets", block["targets"]))


def _settings(path: str, raw: object) -> dict[str, Any]:
    """The fields of a group's weights or inputs that have an effect, with the format's defaults for absent ones."""
    known = frozenset(_DEFAULTS) | _WITHOUT_EFFECT
    block = check_keys(path, raw, known, frozenset())
    neutral(f"{path}.actorder", block.get("actorder"), ("static", "weight", False), "columns lie in their own order")
    return _DEFAULTS | {name: value for name, value in block.items() if name not in _WITHOUT_EFFECT}


def read_quantization_config(raw: object) -> QuantizationConfig | CompressedTensors:
    """Reads a parsed `quantization_config` by its `quant_method`."""
    if isinstance(raw, Mapping) and raw.get("quant_method") == CompressedTensors.quant_method:
        return CompressedTensors.from_hf(raw)
    if isinstance(raw, Mapping) and "quant_method" in raw:
        only("quantization_config.quant_method", raw["quant_method"], "fp8", CompressedTensors.quant_method)
    return QuantizationConfig.from_hf(raw)
