"""The fields of `config.json` and `generation_config.json`, checked; nothing here imports JAX."""

from dsv32_jax.config.model_config import PRESETS, ModelConfig
from dsv32_jax.config.rope_scaling import RopeScaling

__all__ = ["PRESETS", "ModelConfig", "RopeScaling"]
