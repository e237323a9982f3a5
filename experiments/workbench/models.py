"""Models by name, as the workbench's commands take them."""

import dataclasses
import re
from typing import Any

from dsv32_jax.config import ModelConfig
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.workbench.random_model import random_model
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.loading import load
from dsv32_jax.model.context import Options

RANDOM = "full-width"
LONGEST = 163840
"""Positions of a random model: those of the published config."""


def model_named(name: str, *, mtp: bool = True, **options: Any) -> LanguageModel:
    """A model: "full-width:N" is random weights at the real widths in N layers; any other name is for `load`.

    Args:
      name: of the model.
      mtp: False leaves out the MTP layer of a checkpoint; a random model has none.
      options: fields of `Options` that differ from the defaults, None for the default.

    Raises:
      UserError: the name is neither, or an option is wrong.
    """
    if not name.startswith(RANDOM):
        m = load(name, mtp=mtp)
        chosen = {field: value for field, value in options.items() if value is not None}
        m.options = dataclasses.replace(m.options, **chosen)
        return m
    if not re.fullmatch(rf"{RANDOM}:[1-9]\d*", name):
        raise UserError(f"model {name!r}: must be {RANDOM}:N, with N layers of random weights, for instance {RANDOM}:5")
    config = ModelConfig.full_width(int(name.partition(":")[2]), max_position_embeddings=LONGEST)
    m = random_model(config)
    m.options = Options.default(config, **options)
    return m
