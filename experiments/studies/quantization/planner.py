"""Plans a scheme for every linear from the measured sensitivities, and measures plans of other sizes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsv32_jax.common.reading import read_json
from dsv32_jax.convert import planning
from dsv32_jax.convert.conversion import nbytes
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.results import environment, write_json
from dsv32_jax.experiments.studies.quantization import sensitivity
from dsv32_jax.experiments.studies.quantization.measure import Ruler, dequantised, megabytes
from dsv32_jax.experiments.studies.quantization.table import PLAN
from dsv32_jax.experiments.studies.quantization.variants import Setting
from dsv32_jax.model.model import DeepseekV32
from dsv32_jax.model.params import is_linear, named_parameters
from pallas_kernels.matmul import abstract_weight

ADDED_KL = 0.001
"""Nats that the shipped plan's four bits may add to the loss of eight bits everywhere, by the sum of the sensitivities:
of the 0.3% of perplexity that the plan aims at, eight bits with quantised activations take most."""
POINTS = 5
"""Number of plans of the curve between the smallest and the largest."""
GRAIN = 512
UNMEASURED = "int8"
"""The scheme of linears without a sensitivity: the MTP module only drafts, and does not change the output."""


def losses(measured: Mapping[str, Any]) -> dict[planning.Unit, dict[str, float]]:
    """The KL of each unit in each scheme, from the sensitivities' JSON."""
    unit_losses: dict[planning.Unit, dict[str, float]] = {}
    for row in measured["rows"]:
        unit_losses.setdefault(tuple(row["paths"]), {})[row["scheme"]] = max(0.0, row["kl"])
    return unit_losses


def bytes_in(model: DeepseekV32, schemes: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """Bytes of each linear in each scheme, from shapes alone."""
    sizes: dict[str, dict[str, int]] = {}
    for path, leaf in named_parameters(model).items():
        if is_linear(path):
            sizes[path] = {scheme: nbytes(abstract_weight(leaf.shape, scheme)) for scheme in schemes}
    return sizes


def points_of(front: planning.Front, least_loss: float) -> dict[str, int]:
    """Points of the front to measure: spread evenly over its bytes, and the plan that ships."""
    budgets = np.linspace(front.size[0], front.size[-1], POINTS + 2)
    chosen = {f"budget {n}": int(np.searchsorted(front.size, size, "right") - 1) for n, size in enumerate(budgets)}
    return chosen | {"shipped": int(np.flatnonzero(front.loss <= least_loss + ADDED_KL)[0])}


def make_plan(setting: Setting, out: Path = PLAN, report: Callable[[str], None] = print) -> None:
    """Writes the plan, and the curve of plans measured on the planning text, weights alone.

    Raises:
      UserError: the sensitivities are missing, of another setting, or not finished.
    """
    sensitivities = read_json(sensitivity.RESULT) if sensitivity.RESULT.exists() else {}
    if sensitivities.get("settings") != sensitivity.settings_of(setting):
        raise UserError(f"{sensitivity.RESULT}: not of this model and text; run `sensitivity` first")
    measured = losses(sensitivities)
    if set(measured) != {unit.paths for unit in sensitivity.units(setting.base, sensitivity.FAMILIES)}:
        raise UserError(f"{sensitivity.RESULT}: not finished; run `sensitivity` again")
    front = planning.front(measured, bytes_in(setting.base, sensitivity.SCHEMES), GRAIN)
    default_schemes = {path: UNMEASURED for path in named_parameters(setting.base) if is_linear(path)}
    ruler = Ruler(setting.plain_base, setting.texts.planning)
    least_loss = sum(min(scheme_losses.values()) for scheme_losses in measured.values())
    result: dict[str, Any] = {
        "settings": sensitivity.settings_of(setting) | {"added_kl": ADDED_KL},
        "date": environment()["date"],
        "curve": [],
    }
    for name, point in points_of(front, least_loss).items():
        schemes = default_schemes | front.schemes(point)
        model = setting.mixed(schemes)
        size = megabytes(model)
        row = {
            "name": name,
            "megabytes": size,
            "predicted_kl": float(front.loss[point]),
            "in_int4": sum(schemes[path] == "int4" for path in schemes),
            **ruler.measure(dequantised(model)),
        }
        result["curve"].append(row)
        if name == "shipped":
            result["schemes"] = schemes
        write_json(out, result)
        report(f"{name}: {size['total']:.2f} MB, KL {row['kl']:.5f}, predicted {row['predicted_kl']:.5f}")
