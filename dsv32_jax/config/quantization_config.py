"""How a checkpoint's linears are stored: the `quantization_config` of its config.json."""

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
"""Options of transformers' loader, which it writes into a config."""
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
"""Lists of modules that are not quantised, for other readers; here the tensors themselves tell."""


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """The released checkpoint's own form: every linear in e4m3 values with one scale for each 128x128 block.

    Attributes:
      fmt: of the values; None where the file does not say, which means the same.
      scale_fmt: of the scales of activations: "ue8m0", powers of two, or None or transformers' "float", any float32.
      beside: fields that change nothing here, written back as they were read.
    """

    quant_method: str = "fp8"
    fmt: str | None = "e4m3"
    activation_scheme: str = "dynamic"
    weight_block_size: tuple[int, int] = (128, 128)
    scale_fmt: str | None = "ue8m0"
    beside: NeutralFields = ()

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
        for name, text in self.beside:
            value = json.loads(text)
            if name in _NEUTRAL:
                neutral(f"quantization_config.{name}", value, *_NEUTRAL[name])
            elif name in _PLAIN_MODULES and value is not None:
                _strings(f"quantization_config.{name}", value)

    @classmethod
    def from_hf(cls, raw: object) -> QuantizationConfig:
        where = "quantization_config"
        attributes = frozenset(f.name for f in dataclasses.fields(cls)) - {"beside"}
        known = attributes | _NEUTRAL.keys() | set(_PLAIN_MODULES)
        block = dict(check_keys(where, raw, known, frozenset({"quant_method", "weight_block_size"})))
        # A null means the same as an absent field, and "float" the same as an absent format of scales.
        kept = {name: value for name, value in block.items() if name not in attributes or value is None}
        if block.get("scale_fmt") == "float":
            kept["scale_fmt"] = "float"
        block = {name: value for name, value in block.items() if name not in kept}
        if isinstance(block.get("weight_block_size"), list):
            block["weight_block_size"] = tuple(block["weight_block_size"])
        if "weight_block_size" not in block:
            only(f"{where}.weight_block_size", None, [128, 128])
        if "quant_method" not in block:
            only(f"{where}.quant_method", None, "fp8")
        beside = tuple((name, json.dumps(value, ensure_ascii=False)) for name, value in kept.items())
        return cls(**{"scale_fmt": None, "fmt": None} | block, beside=beside)

    def to_hf(self) -> dict[str, Any]:
        block = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "beside"}
        block["weight_block_size"] = list(self.weight_block_size)
        beside = {name: json.loads(text) for name, text in self.beside}
        return dict(sorted((beside | {name: value for name, value in block.items() if value is not None}).items()))

    def with_all_quantized(self, modules: Iterable[str]) -> QuantizationConfig:
        """The same without what lists these modules as not quantised; experts have "{expert}" in place of a number."""
        parts_of = [module.split(".") for module in modules]
        names = {
            ".".join(parts[begin:end])
            for parts in parts_of
            for begin in range(len(parts))
            for end in range(begin + 1, len(parts) + 1)
        }

        def listed(entry: str) -> bool:
            return entry.startswith("re:") or re.sub(r"experts\.\d+", "experts.{expert}", entry.strip(".")) in names

        beside = {name: json.loads(text) for name, text in self.beside}
        for name in _PLAIN_MODULES:
            if beside.get(name):
                beside[name] = [entry for entry in beside[name] if not listed(entry)]
        texts = tuple((name, json.dumps(value, ensure_ascii=False)) for name, value in beside.items())
        return dataclasses.replace(self, beside=texts)


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
"""Fields of a group's weights that say how scales were found, or that the files' tensors say themselves."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Linears that are stored alike.

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
            "sparsity_config", "transform_config", *_OF_LOADING,
        }  # fmt: skip
        needed = {"quant_method", "config_groups"}
        block = check_keys(where, raw, frozenset(optional | needed), frozenset(needed))
        only(f"{where}.quantization_status", block.get("quantization_status"), "compressed", None)
        for name, (accepted, reason) in _OF_LOADING.items():
            neutral(f"{where}.{name}", block.get(name), accepted, reason)
        for name in ("kv_cache_scheme", "sparsity_config", "transform_config"):
            dense = isinstance(block.get(name), Mapping) and block[name].get("format") == "dense"
            if block.get(name) and not (name == "sparsity_config" and dense):
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
    neutral(f"{where}.actorder", block.get("actorder"), ("static", "weight", False), "columns lie in their own order")
    return _DEFAULTS | {name: value for name, value in block.items() if name not in _WITHOUT_EFFECT}


def read_quantization_config(raw: object) -> QuantizationConfig | CompressedTensors:
    """From the parsed `quantization_config`, by its `quant_method`."""
    if isinstance(raw, Mapping) and raw.get("quant_method") == CompressedTensors.quant_method:
        return CompressedTensors.from_hf(raw)
    if isinstance(raw, Mapping) and "quant_method" in raw:
        only("quantization_config.quant_method", raw["quant_method"], "fp8", CompressedTensors.quant_method)
    return QuantizationConfig.from_hf(raw)
