"""Reads how positions are rotated: the fields `rope_theta` and `rope_scaling`, or `rope_parameters`, of config.json.

transformers 5 nests in `rope_parameters` what older files have as two fields. Both forms are read, also from a file
that has both, if they agree.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsv32_jax.common.fields import check_keys, integer, neutral, number, only, same
from dsv32_jax.errors import UserError

_TYPES = ("type", "rope_type")
"""Spellings of one field; a file may have both."""
_OTHER_KINDS = "it belongs to another kind of RoPE scaling"
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "partial_rotary_factor": ((1,), "all of qk_rope_head_dim is rotated"),
    "attention_factor": ((1,), "cos and sin are not scaled"),
    "attn_factor": ((1,), "cos and sin are not scaled"),
    "extrapolation_factor": ((1,), "YaRN's ramp is not weighted"),
    "truncate": ((True,), "YaRN's ramp begins and ends at whole pairs"),
    "apply_yarn_scaling": ((True,), "the softmax scale has YaRN's factor"),
    "short_factor": ((), _OTHER_KINDS),
    "long_factor": ((), _OTHER_KINDS),
    "low_freq_factor": ((), _OTHER_KINDS),
    "high_freq_factor": ((), _OTHER_KINDS),
    "mrope_section": ((), _OTHER_KINDS),
    "mrope_interleaved": ((False,), _OTHER_KINDS),
}
"""Fields that are kept and written back: accepted values beside null, and the reason why others are refused."""

NeutralFields = tuple[tuple[str, str], ...]
"""Name and JSON text of fields that have no effect, and are written back as they were read."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """YaRN: rotation frequencies interpolated by `factor`, and the constants of the softmax scale."""

    type: str = "yarn"
    factor: float = 40
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32
    beta_slow: float = 1
    mscale: float = 1.0
    mscale_all_dim: float = 1.0
    type_keys: tuple[str, ...] = ("type",)  # how the file spells the type: "type", "rope_type" or both

    def __post_init__(self) -> None:
        only("rope_scaling.type", self.type, "yarn")
        integer("rope_scaling.original_max_position_embeddings", self.original_max_position_embeddings, 1)
        for name in ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            number(f"rope_scaling.{name}", getattr(self, name))
        if self.factor < 1:
            raise UserError(f"rope_scaling.factor is {self.factor!r}; it must be at least 1")
        if self.beta_fast < self.beta_slow:
            raise UserError(
                f"rope_scaling.beta_fast {self.beta_fast!r} is below rope_scaling.beta_slow {self.beta_slow!r}; "
                "beta_fast must be the larger one"
            )
        if self.mscale != self.mscale_all_dim:
            raise UserError(
                f"rope_scaling.mscale {self.mscale!r} differs from rope_scaling.mscale_all_dim "
                f"{self.mscale_all_dim!r}; only equal values are supported (cos and sin are not scaled)"
            )

    @classmethod
    def from_hf(cls, raw: object, path: str = "rope_scaling") -> RopeScaling:
        names = frozenset(f.name for f in dataclasses.fields(cls)) - {"type", "type_keys"}
        block = dict(check_keys(path, raw, names | set(_TYPES), names))
        spelled = tuple(key for key in _TYPES if key in block)
        kinds = [block.pop(key) for key in spelled]
        if not kinds:
            raise UserError(f"{path}.type is missing; the only supported value is 'yarn'")
        for key, kind in zip(spelled, kinds, strict=True):
            only(f"{path}.{key}", kind, "yarn")
        return cls(type="yarn", type_keys=spelled, **block)

    def to_hf(self) -> dict[str, Any]:
        block = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("type", "type_keys")}
        return dict(sorted((block | dict.fromkeys(self.type_keys, self.type)).items()))


def read_rope(raw: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Takes the rope fields out of a parsed config.json.

    Returns:
      Attributes of `ModelConfig`, and the fields that restate them, by name as they were read.

    Raises:
      UserError: a block with a field that is missing, unknown or of a value that is not computed; two spellings that
        disagree.
    """
    names = ("rope_scaling", "rope_parameters", "rope_theta")
    top: dict[str, Any] = {name: raw.pop(name) for name in names if name in raw}
    nested = not _empty(top.get("rope_parameters"))
    name_read = "rope_parameters" if nested else "rope_scaling"
    scaling, theta, neutral_fields = _read_block(name_read, top.get(name_read))
    attributes: dict[str, Any] = {"rope_scaling": scaling, "rope_in_parameters": nested, "rope_neutral": neutral_fields}
    stated = top.get("rope_theta")
    if theta is not None and not nested and stated is not None and not same(stated, theta):
        raise UserError(f"rope_theta {stated!r} and rope_scaling.rope_theta {theta!r} disagree; keep one")
    if theta is not None:
        attributes["rope_theta"] = theta
    elif stated is not None:
        attributes["rope_theta"] = stated
    elif nested:
        raise UserError("rope_parameters.rope_theta is missing; the config must give it")
    restated = {name: value for name, value in top.items() if name != name_read and (nested or name != "rope_theta")}
    return attributes, restated


def write_rope(config: Any) -> dict[str, Any]:
    """The inverse of `read_rope`, but for the restating fields."""
    block = {name: json.loads(text) for name, text in config.rope_neutral}
    if config.rope_scaling is not None:
        block |= config.rope_scaling.to_hf()
    if not config.rope_in_parameters:
        return {"rope_theta": config.rope_theta, "rope_scaling": dict(sorted(block.items())) or None}
    if not any(key in block for key in _TYPES):
        block["rope_type"] = "default"
    return {"rope_parameters": dict(sorted((block | {"rope_theta": config.rope_theta}).items()))}


def check_rope_again(config: Any, name: str, value: object) -> None:
    """Refuses a `rope_scaling` or `rope_theta` beside `rope_parameters` that says something else."""
    if _empty(value):
        return
    if name == "rope_theta":
        agrees = same(value, config.rope_theta)
    else:
        scaling, theta, _ = _read_block(name, value)
        agrees = _plain(scaling) == _plain(config.rope_scaling) and theta in (None, config.rope_theta)
    if not agrees:
        other = "rope_scaling" if name == "rope_parameters" else "rope_parameters"
        raise UserError(f"{name} and {other} are both given and disagree; keep one of them")


def _empty(block: object) -> bool:
    return block is None or block == {}


def _plain(scaling: RopeScaling | None) -> RopeScaling | None:
    return scaling and dataclasses.replace(scaling, type_keys=())


def _read_block(path: str, raw: object) -> tuple[RopeScaling | None, Any, NeutralFields]:
    """The scaling of a block, the base of the frequencies where it has one, and fields to be written back."""
    if _empty(raw):
        return None, None, ()
    if not isinstance(raw, Mapping):
        raise UserError(f"{path} is {raw!r}; it must be an object or absent")
    block = dict(raw)
    neutral_fields: dict[str, Any] = {name: block.pop(name) for name in raw if name in NEUTRAL}
    for name, value in neutral_fields.items():
        neutral(f"{path}.{name}", value, *NEUTRAL[name])
    theta = block.pop("rope_theta", None)
    if "rope_theta" in raw and path == "rope_scaling":
        neutral_fields["rope_theta"] = theta
    kinds = {key: block.pop(key) for key in _TYPES if key in block}
    scaling = None
    if all(kind in (None, "default") for kind in kinds.values()) and (kinds or not block):
        for name, value in block.items():
            neutral(f"{path}.{name}", value, (), "without a type that has it, it would be passed over")
        neutral_fields |= kinds | block
    else:
        scaling = RopeScaling.from_hf(block | kinds, path)
    texts = tuple((name, json.dumps(value, ensure_ascii=False)) for name, value in neutral_fields.items())
    return scaling, theta, texts
