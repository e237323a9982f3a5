"""Measures the loss of each tensor family of each layer when it alone is quantised, weights only."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv32_jax.common.reading import read_json
from dsv32_jax.experiments.results import RESULTS, environment, write_json
from dsv32_jax.experiments.studies.quantization.measure import Ruler, dequantised
from dsv32_jax.experiments.studies.quantization.variants import Setting, alone
from dsv32_jax.model.model import DeepseekV32
from dsv32_jax.model.params import is_linear, named_parameters, replace_parameters
from pallas_kernels.matmul import quantize_weight

RESULT = RESULTS / "quantization_sensitivity.json"
FAMILIES = {
    "q_a": ("attn.q_a",),
    "q_b": ("attn.q_b",),
    "kv_a": ("attn.kv_a",),
    "kv_b": ("attn.kv_b",),
    "o": ("attn.o",),
    "indexer.q_b": ("attn.indexer.q_b",),
    "indexer.k": ("attn.indexer.k",),
    "gate+up": ("ffn.gate", "ffn.up", "ffn.shared.gate", "ffn.shared.up"),
    "down": ("ffn.down", "ffn.shared.down"),
    "experts gate+up": ("ffn.experts.gate", "ffn.experts.up"),
    "experts down": ("ffn.experts.down",),
}
"""A layer's linears by what they do: gate, up and down of a dense layer or of the shared expert, and of the others."""
UNTAKEN = {
    "router": ("ffn.router",),
    "router_bias": ("ffn.router_bias",),
    "indexer.head_weights": ("attn.indexer.head_weights",),
    "norms": (
        *("attn_norm", "ffn_norm", "attn.q_a_norm", "attn.kv_a_norm"),
        *("attn.indexer.k_norm_weight", "attn.indexer.k_norm_bias"),
    ),
}
"""Tensors of a layer that are never quantised."""
WHOLE = {"embedding": "embed", "final norm": "norm", "head": "head"}
"""Such tensors outside the layers."""
SCHEMES = ("int4", "int8")
TRIED = ("int8", "fp8_block")
"""Schemes that are tried on those tensors; a vector is rounded as a matrix of one row."""


class Unit(NamedTuple):
    """Parameters that are quantised together; `layer` is the first that they change, None outside the layers."""

    layer: int | None
    family: str
    paths: tuple[str, ...]


def units(model: DeepseekV32, families: Mapping[str, tuple[str, ...]]) -> Iterator[Unit]:
    """Yields the units of every layer, family by family."""
    parameters = named_parameters(model)
    for family, names in families.items():
        for layer in range(len(model.layers)):
            paths = tuple(path for name in names if (path := f"layers.{layer}.{name}") in parameters)
            if paths:
                yield Unit(layer, family, paths)


def rounded(leaf: jax.Array, scheme: str) -> jax.Array:
    """Rounds a parameter that is never quantised to a scheme, and returns it in its own dtype."""
    matrix = leaf.astype(jnp.float32).reshape(-1, leaf.shape[-1])
    return quantize_weight(matrix, scheme).dequantize(jnp.float32).reshape(leaf.shape).astype(leaf.dtype)


def settings_of(setting: Setting) -> dict[str, Any]:
    """The settings of the measurement of sensitivities."""
    return setting.describe() | {"planning_length": setting.texts.planning.shape[1]}


def sensitivity(setting: Setting, out: Path = RESULT, report: Callable[[str], None] = print) -> None:
    """Measures the rows that the file does not contain yet; `kept` has those of tensors that are never quantised.

    Args:
      setting: of the measurement.
      out: JSON; rows with the same settings in it are kept.
      report: takes a line at a time.
    """
    settings = settings_of(setting)
    result = read_json(out) if out.exists() else {}
    if result.get("settings") != settings:
        result = {"settings": settings, "date": environment()["date"], "rows": [], "kept": []}
    ruler = Ruler(setting.plain_base, setting.texts.planning, keep=True)
    base = named_parameters(setting.plain_base)
    done = {(row["layer"], row["family"], row["scheme"]) for part in ("rows", "kept") for row in result[part]}

    def measure(part: str, unit: Unit, scheme: str, leaves: Mapping[str, Any], first: int) -> None:
        if (unit.layer, unit.family, scheme) in done:
            return
        changed = {path: leaves[path] for path in unit.paths}
        model = replace_parameters(setting.plain_base, base | changed)
        parameters = sum(base[path].size for path in unit.paths)
        row = {**unit._asdict(), "scheme": scheme, "parameters": parameters, **ruler.measure(model, first=first)}
        result[part].append(row)
        write_json(out, result)
        report(f"layer {unit.layer}, {unit.family}, {scheme}: KL {row['kl']:.2e}")

    for scheme in SCHEMES:
        model = setting.calibrated_int4 if scheme == "int4" else alone(scheme)(setting)
        leaves = named_parameters(dequantised(model))
        for unit in units(setting.base, FAMILIES):
            assert unit.layer is not None and all(map(is_linear, unit.paths))
            measure("rows", unit, scheme, leaves, unit.layer)
    for scheme in TRIED:
        for unit in units(setting.base, UNTAKEN):
            assert unit.layer is not None
            measure("kept", unit, scheme, {path: rounded(base[path], scheme) for path in unit.paths}, unit.layer)
        for family, path in WHOLE.items():
            first = 0 if path == "embed" else len(setting.base.layers)
            measure("kept", Unit(None, family, (path,)), scheme, {path: rounded(base[path], scheme)}, first)
