"""The models of the table: the base in other schemes."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from dsv32_jax.convert.migration import migrate
from dsv32_jax.convert.quantization import UNQUANTISED, quantize_model, uniform
from dsv32_jax.convert.statistics import Statistics
from dsv32_jax.experiments.results import environment
from dsv32_jax.experiments.studies.quantization.measure import BATCH, dequantised
from dsv32_jax.experiments.studies.quantization.texts import (
    CALIBRATION,
    EVALUATION,
    LENGTH,
    PLANNING,
    Texts,
    statistics,
)
from dsv32_jax.experiments.train_demo.evaluate import weights_digest
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.loading import find, load
from dsv32_jax.model.model import DeepseekV32
from dsv32_jax.model.params import is_linear, named_parameters, replace_parameters


@dataclasses.dataclass(frozen=True)
class Setting:
    """The shipped model, its base, and the texts of every measurement."""

    name: str
    lm: LanguageModel
    texts: Texts

    @staticmethod
    def of(name: str = "demo") -> "Setting":
        """The setting of a checkpoint, named as for `load`."""
        lm = load(name)
        assert lm.tokenizer is not None
        return Setting(name, lm, Texts.of(lm.tokenizer))

    @cached_property
    def base(self) -> DeepseekV32:
        """The shipped weights in bfloat16."""
        return quantize_model(self.lm.model, uniform(self.lm.model, UNQUANTISED))

    @cached_property
    def plain_base(self) -> DeepseekV32:
        """The base as `dequantised` has it."""
        return dequantised(self.base)

    @cached_property
    def statistics(self) -> dict[str, Statistics]:
        """Statistics of the linears' inputs over the calibration text."""
        return statistics(self.lm, self.texts.calibration)

    @cached_property
    def calibrated_int4(self) -> DeepseekV32:
        """All linears in four bits, rounded for their inputs."""
        return quantize_model(self.base, uniform(self.base, "int4"), self.statistics)

    def mixed(self, schemes: Mapping[str, str]) -> DeepseekV32:
        """The model of a plan; its four-bit weights are those of `calibrated_int4`, the others are rounded plainly."""
        four = named_parameters(self.calibrated_int4)
        rest = quantize_model(self.base, {path: scheme for path, scheme in schemes.items() if scheme != "int4"})
        return replace_parameters(
            rest,
            named_parameters(rest) | {path: four[path] for path, scheme in schemes.items() if scheme == "int4"},
        )

    def describe(self) -> dict[str, Any]:
        """A description of the setting; a result with another description is not resumed."""
        parts = {"evaluation": EVALUATION, "calibration": CALIBRATION, "planning": PLANNING}
        return {
            "model": self.name,
            "weights": weights_digest(Path(find(self.name))),
            "length": LENGTH,
            "batch": BATCH,
            "documents": {name: [part.start, part.stop] for name, part in parts.items()},
            "environment": {name: value for name, value in environment().items() if name != "date"},
        }


def migrated_int8(setting: Setting) -> DeepseekV32:
    """The model in int8 with outliers moved into the weights, and the range of each row searched for."""
    model, migrated_statistics = migrate(setting.base, setting.statistics)
    return quantize_model(model, uniform(model, "int8"), migrated_statistics)


def indexer_int4(setting: Setting) -> DeepseekV32:
    """The base with the indexer's linears calibrated in four bits: the indexer decides where attention looks."""
    base, four = named_parameters(setting.base), named_parameters(setting.calibrated_int4)
    return replace_parameters(
        setting.base, {path: four[path] if ".indexer." in path and is_linear(path) else base[path] for path in base}
    )


def alone(scheme: str, ranges: str | None = None) -> Callable[[Setting], DeepseekV32]:
    """Makes models with every linear in a scheme, each weight rounded by itself, in ranges of one method."""
    return lambda setting: quantize_model(setting.base, uniform(setting.base, scheme), ranges=ranges)


def calibrated(scheme: str, ranges: str) -> Callable[[Setting], DeepseekV32]:
    """Makes models with every linear in a scheme, rounded with regard to its inputs, in ranges of one method."""
    return lambda setting: quantize_model(setting.base, uniform(setting.base, scheme), setting.statistics, ranges)


VARIANTS: dict[str, tuple[Callable[[Setting], DeepseekV32], bool]] = {
    "bf16": (lambda setting: setting.base, False),
    "fp8_block": (lambda setting: setting.lm.model, False),
    "fp8_block, activations": (lambda setting: setting.lm.model, True),
    "int8": (alone("int8"), False),
    "int8 ranges by percentile": (alone("int8", "percentile"), False),
    "int8 range searched": (calibrated("int8", "mse"), False),
    "int8, activations": (alone("int8"), True),
    "int8 migrated, activations": (migrated_int8, True),
    "int4": (alone("int4"), False),
    "int4 ranges by percentile": (alone("int4", "percentile"), False),
    "int4 range searched": (alone("int4", "mse"), False),
    "int4 calibrated, ranges by percentile": (calibrated("int4", "percentile"), False),
    "int4 calibrated": (lambda setting: setting.calibrated_int4, False),
    "int4 calibrated, indexer alone": (indexer_int4, False),
}
"""Each row of the table: its model, and whether activations are quantised, that is the inputs of FP8 and INT8 linears,
index queries and keys, and latents."""
