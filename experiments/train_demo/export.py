"""Makes the checkpoint that ships from the last stage's weights: FP8 blocks, tokenizer, generation settings."""

import json
import shutil
from pathlib import Path

import jax

from dsv32_jax import convert
from dsv32_jax.common.files import locked, replace_directory
from dsv32_jax.config import ModelConfig
from dsv32_jax.errors import UserError
from dsv32_jax.model.model import DeepseekV32, abstract_model
from dsv32_jax.model.params import named_parameters, replace_parameters
from pallas_kernels.matmul import QTensor, quantize_weight

SHARD_BYTES = 14 * 10**6
"""No file of the demo is larger, so that it can live in a repository."""
GENERATION = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 128, "eos_token_id": 1}


def quantised(model: DeepseekV32, config: ModelConfig) -> DeepseekV32:
    """The model with FP8 linears, and nothing else changed.

    Args:
      model: plain weights.
      config: the model's, with a quantization_config.
    """
    shapes = abstract_model(config)
    abstract_leaves = named_parameters(shapes)
    leaves = named_parameters(model)
    quantise = jax.jit(quantize_weight)
    return replace_parameters(
        shapes,
        {
            path: quantise(leaves[path]) if isinstance(leaf, QTensor) else leaves[path]
            for path, leaf in abstract_leaves.items()
        },
    )


def export(weights: Path, config: ModelConfig, directory: Path, card: str | None = None) -> None:
    """Writes the FP8 checkpoint in the Hugging Face layout; an older one there is replaced once the new one is whole.

    Args:
      weights: bfloat16 checkpoint with tokenizer files.
      config: with a quantization_config.
      directory: of the checkpoint.
      card: the text of its README.md; the present one stays where None.
    """
    if not (weights / "config.json").exists():
        raise UserError(f"{weights}: has no config.json; give the folder of a stage's bfloat16 checkpoint")
    fresh = directory.with_name(directory.name + ".new")
    with locked(directory):
        model = quantised(convert.load_hf(weights), config)
        shutil.rmtree(fresh, ignore_errors=True)  # of an interrupted run
        convert.export_model(model, fresh, tokenizer_files=weights, shard_bytes=SHARD_BYTES)
        (fresh / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n", encoding="utf-8")
        old_card = directory / "README.md"
        if card is None and old_card.exists():
            card = old_card.read_text(encoding="utf-8")
        if card is not None:
            (fresh / "README.md").write_text(card, encoding="utf-8")
        replace_directory(fresh, directory)
