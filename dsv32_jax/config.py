"""The model's configuration: the fields of the Hugging Face config.json, checked."""

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv32_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """YaRN's parameters (`rope_scaling`; arXiv 2309.00071)."""

    type: str = "yarn"
    factor: float = 40
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32
    beta_slow: float = 1
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """How the checkpoint's linear weights are stored (`quantization_config`).

    `scale_fmt` "ue8m0" rounds the scales of activations up to powers of two; None keeps them as they are.
    """

    quant_method: str = "fp8"
    fmt: str = "e4m3"
    activation_scheme: str = "dynamic"
    weight_block_size: tuple[int, int] = (128, 128)
    scale_fmt: str | None = "ue8m0"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Every field of DeepSeek-V3.2-Exp's config.json under its own name; defaults are the 671B model's values.

    Frozen and hashable, so that it can be static data of a jitted function. Fields that this project does not know are
    kept in `unknown` as (name, JSON text) and written back by `to_hf`.
    """

    architectures: tuple[str, ...] = ("DeepseekV32ForCausalLM",)
    attention_bias: bool = False
    attention_dropout: float = 0.0
    bos_token_id: int | None = 0
    eos_token_id: int | None = 1
    ep_size: int = 1
    first_k_dense_replace: int = 3
    hidden_act: str = "silu"
    hidden_size: int = 7168
    index_head_dim: int = 128
    index_n_heads: int = 64
    index_topk: int = 2048
    initializer_range: float = 0.02
    intermediate_size: int = 18432
    kv_lora_rank: int = 512
    max_position_embeddings: int = 163840
    model_type: str = "deepseek_v32"
    moe_intermediate_size: int = 2048
    moe_layer_freq: int = 1
    n_group: int = 8
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    norm_topk_prob: bool = True
    num_attention_heads: int = 128
    num_experts_per_tok: int = 8
    num_hidden_layers: int = 61
    num_key_value_heads: int = 128
    num_nextn_predict_layers: int = 1
    q_lora_rank: int = 1536
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    quantization_config: QuantizationConfig | None = QuantizationConfig()
    rms_norm_eps: float = 1e-6
    rope_scaling: RopeScaling | None = RopeScaling()
    rope_theta: float = 10000
    routed_scaling_factor: float = 2.5
    scoring_func: str = "sigmoid"
    tie_word_embeddings: bool = False
    topk_group: int = 4
    topk_method: str = "noaux_tc"
    torch_dtype: str = "bfloat16"
    transformers_version: str = "4.44.2"
    use_cache: bool = True
    v_head_dim: int = 128
    vocab_size: int = 129280
    unknown: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        check(self)

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key of one head: 192."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of a token's latent row with its rope key: 576."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Scale of attention scores with YaRN's temperature: 0.1352337788608801 for the 671B model.

        Source: `MLA.__init__` in the official `inference/model.py`; the indexer's scores do not take it.
        """
        scale = self.qk_head_dim**-0.5
        if self.rope_scaling is None:
            return scale
        return scale * (0.1 * self.rope_scaling.mscale_all_dim * math.log(self.rope_scaling.factor) + 1) ** 2

    @property
    def has_mtp(self) -> bool:
        """Whether the checkpoint has a multi-token-prediction layer after the last."""
        return self.num_nextn_predict_layers > 0

    def is_moe(self, layer: int) -> bool:
        """Whether this layer has experts; the first `first_k_dense_replace` do not."""
        return layer >= self.first_k_dense_replace

    def replace(self, **fields: Any) -> "ModelConfig":
        """A copy with other values, checked again."""
        return dataclasses.replace(self, **fields)

    @staticmethod
    def deepseek_v32() -> "ModelConfig":
        """The full DeepSeek-V3.2-Exp, 671B parameters."""
        return ModelConfig()

    @staticmethod
    def full_width(num_layers: int, **fields: Any) -> "ModelConfig":
        """The real widths with fewer layers (and no MTP layer unless asked for)."""
        dense = min(3, max(0, num_layers - 1))
        return ModelConfig(
            **{"num_hidden_layers": num_layers, "first_k_dense_replace": dense, "num_nextn_predict_layers": 0, **fields}
        )

    @staticmethod
    def tiny(**fields: Any) -> "ModelConfig":
        """Every part of the model at the least size that FP8 blocks allow; for tests."""
        return ModelConfig(**{**TINY, **fields})

    @staticmethod
    def from_hf(source: str | Path | Mapping[str, Any]) -> "ModelConfig":
        """From a config.json, a directory that has one, or its content.

        Raises:
          UserError: unreadable, a wrong or misspelt field, or fields that contradict each other.
        """
        if not isinstance(source, Mapping):
            source = read_json(Path(source) / "config.json" if Path(source).is_dir() else Path(source))
        known = {field.name for field in dataclasses.fields(ModelConfig)} - {"unknown"}
        source = dict(source)
        source.pop("qk_head_dim", None)  # derived; some writers store it
        values: dict[str, Any] = {}
        unknown = []
        for name, value in source.items():
            if name in known:
                values[name] = nested(name, value)
            else:
                refuse_near_miss(name, known - set(source), "config field")
                unknown.append((name, json.dumps(value)))
        # A checkpoint without this field is not quantised; the default is the 671B model's.
        values.setdefault("quantization_config", None)
        values.setdefault("num_nextn_predict_layers", 0)
        return ModelConfig(**values, unknown=tuple(unknown))

    def to_hf(self) -> dict[str, Any]:
        """The content of config.json; `quantization_config` is left out where there is none."""
        out: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "unknown":
                continue
            if dataclasses.is_dataclass(value):
                value = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(value).items()}  # type: ignore[arg-type]
                value = {k: v for k, v in value.items() if v is not None}
            out[field.name] = list(value) if isinstance(value, tuple) else value
        if self.quantization_config is None:
            del out["quantization_config"]
        return dict(sorted({**out, **{name: json.loads(text) for name, text in self.unknown}}.items()))


TINY: dict[str, Any] = {
    "first_k_dense_replace": 1,
    "hidden_size": 128,
    "index_head_dim": 128,
    "index_n_heads": 2,
    "index_topk": 16,
    "intermediate_size": 256,
    "kv_lora_rank": 128,
    "max_position_embeddings": 1280,
    "moe_intermediate_size": 128,
    "n_group": 4,
    "n_routed_experts": 8,
    "num_attention_heads": 2,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "rope_scaling": RopeScaling(original_max_position_embeddings=32),
    "topk_group": 2,
    "v_head_dim": 64,
    "vocab_size": 512,
}

PRESETS = {"671b": ModelConfig.deepseek_v32, "tiny": ModelConfig.tiny}
"""Configurations by name, as `dsv32 info --config` takes them."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a UserError that names it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); a checkpoint directory has one") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def refuse_near_miss(name: str, known: set[str], what: str) -> None:
    """An unknown name that is almost a known one is a slip, not an extension."""
    if close := difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.85):
        raise UserError(f"{what} {name!r} is unknown; did you mean {close[0]!r}?")


def nested(name: str, value: Any) -> Any:
    """A config field's JSON value as this module holds it."""
    kinds = {"rope_scaling": RopeScaling, "quantization_config": QuantizationConfig}
    if name not in kinds or value is None:
        return tuple(value) if isinstance(value, list) else value
    if not isinstance(value, Mapping):
        raise UserError(f"{name} must be an object or null, not {value!r}")
    fields = {field.name for field in dataclasses.fields(kinds[name])}
    value = dict(value)
    if name == "rope_scaling" and "rope_type" in value:  # newer name of the same field
        value.setdefault("type", value.pop("rope_type"))
        value.pop("rope_type", None)
    if name == "quantization_config":
        value.setdefault("scale_fmt", None)
    for key in value:
        if key not in fields:
            refuse_near_miss(key, fields - set(value), f"{name} field")
            raise UserError(f"{name} field {key!r} is not supported; known are {', '.join(sorted(fields))}")
    return kinds[name](**{key: tuple(v) if isinstance(v, list) else v for key, v in value.items()})


ONLY = {
    "model_type": ("deepseek_v32",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "moe_layer_freq": (1,),
    "tie_word_embeddings": (False,),
    "num_nextn_predict_layers": (0, 1),
}
"""Fields that select behaviour, and the values that this model implements."""

MAY_BE_ZERO = {"first_k_dense_replace", "num_nextn_predict_layers", "bos_token_id", "eos_token_id", "attention_dropout"}


def check(config: ModelConfig) -> None:
    """Types, ranges and contradictions, each refused with the names of its fields."""
    for field in dataclasses.fields(config):
        check_type(field.name, field.type, getattr(config, field.name))
    for name, allowed in ONLY.items():
        if getattr(config, name) not in allowed:
            supported = " or ".join(map(repr, allowed))
            raise UserError(f"{name} is {getattr(config, name)!r}; this model supports {supported}")
    c = config
    rules = [
        (c.num_key_value_heads == c.num_attention_heads, "num_key_value_heads must equal num_attention_heads"),
        (c.n_routed_experts % c.n_group == 0, "n_routed_experts must be a multiple of n_group"),
        (c.topk_group <= c.n_group, "topk_group must not exceed n_group"),
        (
            c.num_experts_per_tok * c.n_group <= c.n_routed_experts * c.topk_group,
            "num_experts_per_tok must not exceed the experts of topk_group groups (n_routed_experts / n_group each)",
        ),
        (c.first_k_dense_replace <= c.num_hidden_layers, "first_k_dense_replace must not exceed num_hidden_layers"),
        (c.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim must be even"),
        (c.qk_rope_head_dim <= c.index_head_dim, "qk_rope_head_dim must not exceed index_head_dim"),
        (c.index_head_dim & (c.index_head_dim - 1) == 0, "index_head_dim must be a power of two (Hadamard rotation)"),
    ]
    if c.rope_scaling is not None:
        rules.append((c.rope_scaling.type == "yarn", f"rope_scaling type {c.rope_scaling.type!r} must be 'yarn'"))
        rules.append((c.rope_scaling.factor >= 1, "rope_scaling factor must be at least 1"))
    for holds, rule in rules:
        if not holds:
            names = [name for name in vars(c) if name in rule.replace("(", " ").split() and name != "rope_scaling"]
            raise UserError(f"{rule}: {', '.join(f'{name} is {getattr(c, name)}' for name in names)}".rstrip(": "))
    if c.quantization_config is not None:
        check_quantization(c, c.quantization_config)


def check_type(name: str, kind: Any, value: Any) -> None:
    """Numbers must be finite and positive (or 0 where that means something); bools are no numbers."""
    if name in ("rope_scaling", "quantization_config", "unknown", "architectures"):
        if name in ("rope_scaling", "quantization_config") and value is not None:
            for field in dataclasses.fields(value):
                check_type(f"{name}.{field.name}", field.type, getattr(value, field.name))
        return
    if kind in (int, float, int | None):
        if value is None and kind == int | None:
            return
        numeric = isinstance(value, int) if kind is not float else isinstance(value, int | float)
        if isinstance(value, bool) or not numeric or not math.isfinite(value):
            raise UserError(f"{name} must be {'a number' if kind is float else 'an integer'}, not {value!r}")
        if value < 0 or (value == 0 and name not in MAY_BE_ZERO and "mscale" not in name):
            raise UserError(f"{name} must be positive, not {value!r}")
    elif kind in (bool, str) and not isinstance(value, kind):
        raise UserError(f"{name} must be {'true or false' if kind is bool else 'a string'}, not {value!r}")


def check_quantization(config: ModelConfig, quantization: QuantizationConfig) -> None:
    """Only the checkpoint's own scheme, and widths that its groups of 128 divide."""
    supported = {
        "quant_method": ("fp8",),
        "fmt": ("e4m3",),
        "activation_scheme": ("dynamic",),
        "weight_block_size": ((128, 128),),
        "scale_fmt": ("ue8m0", None),
    }
    for name, allowed in supported.items():
        value = getattr(quantization, name)
        if value not in allowed:
            raise UserError(f"quantization_config.{name} is {value!r}; supported is {' or '.join(map(repr, allowed))}")
    widths = {
        name: getattr(config, name)
        for name in ("hidden_size", "q_lora_rank", "kv_lora_rank", "intermediate_size", "moe_intermediate_size")
    }
    widths["num_attention_heads * v_head_dim"] = config.num_attention_heads * config.v_head_dim
    widths["index_head_dim"] = config.index_head_dim
    for name, width in widths.items():
        if width % 128:
            raise UserError(f"{name} is {width}, but quantization_config needs multiples of 128 (FP8 groups)")
