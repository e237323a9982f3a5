"""ModelConfig: the fields of a Hugging Face `config.json` of model type `deepseek_v32`, checked.

Attribute names are the file's names and the defaults are the values of the 671B model. `dsv32_jax.config.fields` says
what other fields may hold; all are kept and written back by `to_hf`. Unknown fields are named in a warning; one that is
a typing slip away from a known one is refused, because ignoring it would run another model than the file describes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv32_jax.common.fields import integer, number, only
from dsv32_jax.common.reading import read_json
from dsv32_jax.config.fields import check_extra_fields, check_field, refuse_typing_slips, unknown
from dsv32_jax.config.quantization_config import CompressedTensors, QuantizationConfig, read_quantization_config
from dsv32_jax.config.rope_scaling import NeutralFields, RopeScaling, read_rope, write_rope
from dsv32_jax.errors import CheckpointWarning, UserError

__all__ = ["PRESETS", "ModelConfig", "RopeScaling"]

_ARCHITECTURE = "DeepseekV32ForCausalLM"

# Must be in the file: a default would silently be another model's size.
_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "q_lora_rank",
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_n_heads", "index_head_dim",
    "index_topk", "intermediate_size", "moe_intermediate_size", "n_routed_experts", "n_shared_experts",
    "num_experts_per_tok", "n_group", "topk_group", "max_position_embeddings",
)  # fmt: skip
_REQUIRED = frozenset({*_SIZES, "first_k_dense_replace", "model_type", "routed_scaling_factor", "rms_norm_eps"})
# Attributes that are not fields of the file under their own name.
_INTERNAL = frozenset({"unknown", "rope_in_parameters", "rope_neutral"})
# Attributes whose null is the same as no field: their default holds. Not norm_topk_prob: its default is true, and to
# transformers a null is false.
_NULL_IS_ABSENT = (
    "attention_bias", "hidden_act", "moe_layer_freq", "scoring_func", "tie_word_embeddings", "topk_method",
)  # fmt: skip
# Attributes that only training reads; any plain value will do.
_UNUSED = ("attention_dropout", "ep_size", "initializer_range", "torch_dtype", "transformers_version", "use_cache")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A checked, hashable config. Construct it directly, by a preset, or with `from_hf`.

    Raises `UserError` (naming the field, its value and what is supported) for any value or combination that this
    implementation does not compute exactly.
    """

    model_type: str = "deepseek_v32"
    architectures: tuple[str, ...] | None = (_ARCHITECTURE,)
    # Sizes.
    vocab_size: int = 129280
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    max_position_embeddings: int = 163840
    # Attention (MLA) and the lightning indexer.
    num_attention_heads: int = 128
    num_key_value_heads: int = 128
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 2048
    # Feed-forward.
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    first_k_dense_replace: int = 3
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True
    # Multi-token prediction modules in the checkpoint: 0 or 1.
    num_nextn_predict_layers: int = 1
    # Positions and norms.
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000
    rope_scaling: RopeScaling | None = RopeScaling()  # noqa: RUF009  (frozen)
    quantization_config: QuantizationConfig | CompressedTensors | None = QuantizationConfig()  # noqa: RUF009  (frozen)
    # One supported value each.
    attention_bias: bool = False
    hidden_act: str = "silu"
    moe_layer_freq: int = 1
    scoring_func: str = "sigmoid"
    tie_word_embeddings: bool = False
    topk_method: str = "noaux_tc"
    # Token ids.
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    # No effect on inference: dropout and initial values are for training, and tensors' types are those of the files.
    attention_dropout: float = 0.0
    ep_size: int = 1
    initializer_range: float = 0.02
    torch_dtype: str | None = "bfloat16"
    transformers_version: str | None = "4.44.2"
    use_cache: bool = True
    # Kept to be written back: (name, JSON text) of the fields of `dsv32_jax.config.fields` and of unknown ones; whether
    # the rope fields are nested as in transformers 5, and further fields of their block.
    unknown: NeutralFields = ()
    rope_in_parameters: bool = False
    rope_neutral: NeutralFields = ()

    def __post_init__(self) -> None:
        self._check_values()
        self._check_combinations()
        check_extra_fields(self, self.extra_fields)

    def _check_values(self) -> None:
        only("model_type", self.model_type, "deepseek_v32")
        only("scoring_func", self.scoring_func, "sigmoid")
        only("topk_method", self.topk_method, "noaux_tc")
        only("hidden_act", self.hidden_act, "silu")
        only("attention_bias", self.attention_bias, False)
        only("moe_layer_freq", self.moe_layer_freq, 1)
        only("tie_word_embeddings", self.tie_word_embeddings, False)
        only("num_nextn_predict_layers", self.num_nextn_predict_layers, 0, 1)
        only("norm_topk_prob", self.norm_topk_prob, True, False)
        names = self.architectures
        if names is not None and not (isinstance(names, tuple) and _ARCHITECTURE in names):
            raise UserError(f"architectures is {names!r}; it must be a list with {_ARCHITECTURE!r} in it or be absent")
        for name in _SIZES:
            integer(name, getattr(self, name), 1)
        integer("first_k_dense_replace", self.first_k_dense_replace, 0)
        for name in ("rms_norm_eps", "rope_theta", "routed_scaling_factor"):
            number(name, getattr(self, name))
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            raise UserError(f"rope_scaling is {self.rope_scaling!r}; it must be a RopeScaling or None")
        if self.quantization_config is not None and not isinstance(
            self.quantization_config, QuantizationConfig | CompressedTensors
        ):
            raise UserError(
                f"quantization_config is {self.quantization_config!r}; it must be a QuantizationConfig, "
                "CompressedTensors or None"
            )
        for name in _UNUSED:
            if not isinstance(getattr(self, name), str | int | float | None):
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be a text, a number, true, false or null")
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            several = isinstance(value, tuple) and name == "eos_token_id"
            for token in value if several else () if value is None else (value,):
                integer(name, token, 0)
                if token >= self.vocab_size:
                    raise UserError(f"{name} {token} is outside vocab_size {self.vocab_size}")

    def _check_combinations(self) -> None:
        if self.num_key_value_heads != self.num_attention_heads:
            raise UserError(
                f"num_key_value_heads {self.num_key_value_heads} differs from num_attention_heads "
                f"{self.num_attention_heads}; MLA needs them equal"
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise UserError(
                f"first_k_dense_replace {self.first_k_dense_replace} exceeds num_hidden_layers {self.num_hidden_layers}"
            )
        if self.n_routed_experts % self.n_group:
            raise UserError(f"n_routed_experts {self.n_routed_experts} is not a multiple of n_group {self.n_group}")
        per_group = self.n_routed_experts // self.n_group
        if per_group < 2:
            raise UserError(
                f"n_routed_experts {self.n_routed_experts} and n_group {self.n_group} leave {per_group} a group; "
                "groups are scored by their two best, so each needs at least 2"
            )
        if self.topk_group > self.n_group:
            raise UserError(f"topk_group {self.topk_group} exceeds n_group {self.n_group}")
        if self.num_experts_per_tok > self.topk_group * per_group:
            raise UserError(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds the {self.topk_group * per_group} experts of "
                f"the topk_group {self.topk_group} groups that stay"
            )
        if self.qk_rope_head_dim % 2:
            raise UserError(f"qk_rope_head_dim is {self.qk_rope_head_dim}; it must be even (it is rotated in pairs)")
        if self.qk_rope_head_dim > self.index_head_dim:
            raise UserError(
                f"qk_rope_head_dim {self.qk_rope_head_dim} exceeds index_head_dim {self.index_head_dim}; the indexer "
                "rotates its first qk_rope_head_dim features"
            )
        if self.index_head_dim & (self.index_head_dim - 1):
            raise UserError(f"index_head_dim is {self.index_head_dim}; it must be a power of two (Hadamard transform)")
        if self.quantization_config is not None:
            self._check_group_widths()

    def _check_group_widths(self) -> None:
        # FP8 inputs (arXiv 2412.19437, 3.3.2) and INT4 weights have groups of 128 along the input of a linear.
        widths = {
            "hidden_size": self.hidden_size,
            "q_lora_rank": self.q_lora_rank,
            "kv_lora_rank": self.kv_lora_rank,
            "num_attention_heads * v_head_dim": self.num_attention_heads * self.v_head_dim,
            "intermediate_size": self.intermediate_size,
            "moe_intermediate_size": self.moe_intermediate_size,
            "index_head_dim": self.index_head_dim,
        }
        for name, width in widths.items():
            if width % 128:
                raise UserError(
                    f"{name} {width} contradicts quantization_config.weight_block_size [128, 128]: "
                    "the input width of a quantised linear must be a multiple of 128"
                )

    @property
    def extra_fields(self) -> dict[str, Any]:
        """Fields of the file that are no attribute, by name as they were read."""
        return {name: json.loads(text) for name, text in self.unknown}

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: nope and rope features."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Features cached for a token and layer by MLA: the latent and the shared rope key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Scale of the attention scores: `qk_head_dim ** -0.5`, times YaRN's `m ** 2` (arXiv 2309.00071, eq. 22)."""
        scale = self.qk_head_dim**-0.5
        if self.rope_scaling is not None:
            m = 0.1 * self.rope_scaling.mscale_all_dim * math.log(self.rope_scaling.factor) + 1.0
            scale *= m * m
        return scale

    @property
    def has_mtp(self) -> bool:
        """Whether the checkpoint holds a multi-token prediction module."""
        return self.num_nextn_predict_layers > 0

    def is_moe(self, layer: int) -> bool:
        """Whether decoder layer `layer` has routed experts (the MTP layer, index `num_hidden_layers`, always has)."""
        return layer >= self.first_k_dense_replace

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> ModelConfig:
        """Read a `config.json`, a directory that holds one, or its parsed content.

        Raises `UserError` for a file that is missing or not JSON, for a size that is missing, for a name that is nearly
        a known one, and for everything the constructor refuses. Warns (`CheckpointWarning`) once, by name, of unknown
        fields.
        """
        file = "config"
        if not isinstance(source, Mapping):
            path = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
            source, file = read_json(path), str(path)
        raw = dict(source)
        if "model_type" in raw:  # first: in another model's config no other error matters
            only("model_type", raw["model_type"], "deepseek_v32")
        known = frozenset(f.name for f in dataclasses.fields(cls)) - _INTERNAL
        rope, extra_fields = read_rope(raw)
        extra_fields |= {name: raw.pop(name) for name in [name for name in raw if name not in known]}
        refuse_typing_slips(extra_fields, known)
        if missing := sorted(_REQUIRED - raw.keys()):
            raise UserError(f"{missing[0]} is missing from the config; it has no default")
        if raw.setdefault("quantization_config", None) is not None:
            raw["quantization_config"] = read_quantization_config(raw["quantization_config"])
        for name in [name for name, value in raw.items() if value is None and name in _NULL_IS_ABSENT]:
            del raw[name]
        raw["num_nextn_predict_layers"] = 0 if (mtp := raw.get("num_nextn_predict_layers")) is None else mtp
        for name, value in raw.items():
            if isinstance(value, list):
                raw[name] = tuple(value)
        texts = tuple((name, json.dumps(value, ensure_ascii=False)) for name, value in extra_fields.items())
        config = cls(**raw, **rope, unknown=texts)
        if unknown_names := unknown(name for name, value in extra_fields.items() if value is not None):
            message = (
                f"{file}: fields that this model does not know are passed over: {', '.join(sorted(unknown_names))}"
            )
            # Attributed to this line, so that a file that is read twice warns once.
            warnings.warn(message, CheckpointWarning, stacklevel=1)
        return config

    def to_hf(self) -> dict[str, Any]:
        """The content of a `config.json`, sorted by name: all attributes, and the fields beside them as read."""
        skipped = _INTERNAL | {"rope_theta", "rope_scaling"}
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in skipped}
        out = {name: list(value) if isinstance(value, tuple) else value for name, value in out.items()}
        if self.quantization_config is None:
            del out["quantization_config"]
        else:
            out["quantization_config"] = self.quantization_config.to_hf()
        return dict(sorted((out | write_rope(self) | self.extra_fields).items()))

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with other values, checked again.

        Fields beside the attributes (`mlp_layer_types`, `num_experts`, ...) that no longer agree with them are left
        out, since they only restate what has changed.
        """
        if changes.keys() & {"rope_scaling", "rope_theta"}:
            changes = {"rope_neutral": ()} | changes
        if "unknown" in changes:
            return dataclasses.replace(self, **changes)
        config = dataclasses.replace(self, **changes, unknown=())
        return dataclasses.replace(
            config, unknown=tuple(entry for entry in self.unknown if config._agrees(entry[0], self))
        )

    def _agrees(self, name: str, other: ModelConfig) -> bool:
        """Whether a field beside the attributes of another config fits this one."""
        try:
            check_field(self, name, other.extra_fields[name], other.extra_fields)
        except UserError:
            return False
        return True

    @classmethod
    def deepseek_v32(cls) -> ModelConfig:
        """The 671B model of DeepSeek-V3.2-Exp."""
        return cls()

    @classmethod
    def full_width(cls, num_layers: int, **overrides: Any) -> ModelConfig:
        """The real widths with fewer layers, at least one of them with experts, and no MTP module unless asked for."""
        dense = min(3, max(0, num_layers - 1))
        sizes = {"num_hidden_layers": num_layers, "first_k_dense_replace": dense, "num_nextn_predict_layers": 0}
        return cls(**sizes | overrides)

    @classmethod
    def tiny(cls, **overrides: Any) -> ModelConfig:
        """Every part of the model (FP8 and MTP too) at the least size FP8 groups allow; any field can be changed."""
        sizes: dict[str, Any] = {
            "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 1280,
            "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 128, "kv_lora_rank": 128,
            "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64, "index_n_heads": 2, "index_topk": 16,
            "intermediate_size": 256, "moe_intermediate_size": 128, "n_routed_experts": 8, "num_experts_per_tok": 2,
            "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
            "rope_scaling": RopeScaling(original_max_position_embeddings=32),
        }  # fmt: skip
        return cls(**sizes | overrides)


PRESETS = {"671b": ModelConfig.deepseek_v32(), "tiny": ModelConfig.tiny()}
"""Configurations by name, as `dsv32 info --config` takes them."""
