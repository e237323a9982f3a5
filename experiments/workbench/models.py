"""Models by name, as the workbench's commands take them."""

import re

from dsv32_jax.config import ModelConfig
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.workbench.random_model import random_model
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.loading import load

RANDOM = "full-width"
LONGEST = 163840
"""Positions of a random model: those of the published config."""


def model_named(name: str, *, mtp: bool = True) -> LanguageModel:
    """A model: "full-width:N" is random weights at the real widths in N layers; any other name is for `load`.

    Args:
      name: of the model.
      mtp: False leaves out the MTP layer of a checkpoint; a random model has none.

    Raises:
      UserError: the name is neither.
    """
    if not name.startswith(RANDOM):
        return load(name, mtp=mtp)
    if not re.fullmatch(rf"{RANDOM}:[1-9]\d*", name):
        raise UserError(f"model {name!r}: must be {RANDOM}:N, with N layers of random weights, for instance {RANDOM}:5")
    config = ModelConfig.full_width(int(name.partition(":")[2]), max_position_embeddings=LONGEST)
    return random_model(config)
