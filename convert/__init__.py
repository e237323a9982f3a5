"""Checkpoints: Hugging Face safetensors, this model, Orbax. HF names and file formats are known here alone."""

from dsv32_jax.convert.conversion import checkpoint_kind, convert, export_model, load_hf, load_orbax
from dsv32_jax.convert.stored import TensorSpec, hf_tensors, stored_parameters

__all__ = [
    "TensorSpec",
    "checkpoint_kind",
    "convert",
    "export_model",
    "hf_tensors",
    "load_hf",
    "load_orbax",
    "stored_parameters",
]
