"""Quantises a model's linears to other schemes: in memory, or from checkpoint to checkpoint.

docs/quantisation.md has the accuracy of each scheme. Whatever the scheme, embedding, head, router, norms and the
indexer's head weights stay as they are: `dsv32_jax.model.params.PLAIN`.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax import __version__
from dsv32_jax.config import ModelConfig
from dsv32_jax.convert.conversion import PROVENANCE, Change, matrix, rewrite, without_provenance
from dsv32_jax.convert.finite import check_all_finite, check_statistics
from dsv32_jax.convert.ranges import RANGES
from dsv32_jax.convert.rounding import round_int4, round_int8
from dsv32_jax.convert.statistics import Statistics
from dsv32_jax.convert.stored import quantization_config, stored_parameters
from dsv32_jax.errors import UserError
from dsv32_jax.model.model import DeepseekV32
from dsv32_jax.model.params import is_linear, named_parameters, replace_parameters
from pallas_kernels.matmul import INT4, INT8, SCHEMES, abstract_weight, dense, quantize_weight, scheme_name

UNQUANTISED = "bf16"
"""The scheme of a linear that becomes plain bfloat16."""
ROUNDED = {INT4.name: round_int4, INT8.name: round_int8}
"""Rounding functions of the schemes that can take the inputs' statistics into account."""


def quantize_model(
    model: DeepseekV32,
    schemes: Mapping[str, str],
    statistics: Mapping[str, Statistics] | None = None,
    ranges: str | None = None,
) -> DeepseekV32:
    """Quantises some linears of a model to other schemes; quantised weights are dequantised first.

    Args:
      model: concrete.
      schemes: one of `SCHEMES` or "bf16" by the path of a linear, see `uniform`; the other linears stay as they are.
      statistics: of the linears' inputs, from `calibrate`; integers are rounded with regard to them.
      ranges: the method that chooses integers' ranges, one of `dsv32_jax.convert.ranges.RANGES`. None means "mse" for a
        linear with statistics, and else "min-max".

    Returns:
      A model whose config names the new schemes, so that `dsv32_jax.convert.export_model` writes it as it is.

    Raises:
      UserError: a path that is no linear, an unknown scheme or kind of range, a width that a scheme does not take, or a
        weight or statistics that are NaN or infinite.
    """
    parameters = named_parameters(model)
    check_schemes(schemes, parameters)
    check_ranges(ranges)
    statistics = statistics or {}
    check_statistics(statistics)
    check_all_finite(parameters, model.config)
    changed_weights = {
        path: _in_scheme(path, parameters[path], scheme, statistics.get(path), ranges)
        for path, scheme in schemes.items()
    }
    parameters |= changed_weights
    all_schemes = {path: scheme for path, leaf in parameters.items() if (scheme := scheme_name(leaf))}
    changed = replace_parameters(model, parameters)
    changed.config = model.config.replace(
        quantization_config=quantization_config(all_schemes, model.config), unknown=without_provenance(model.config)
    )
    check_all_finite(changed_weights, changed.config)
    return changed


def check_schemes(schemes: Mapping[str, str], paths: Iterable[str]) -> None:
    """Raises UserError for a path that is no linear among `paths`, and for an unknown scheme."""
    paths = set(paths)
    for path, scheme in schemes.items():
        if path not in paths or not is_linear(path):
            raise UserError(f"{path}: no linear of this model; schemes are for linears")
        if scheme not in (*SCHEMES, UNQUANTISED):
            raise UserError(f"{path}: scheme {scheme!r}; must be one of {', '.join(SCHEMES)}, {UNQUANTISED}")


def check_ranges(ranges: str | None) -> None:
    """Raises UserError for an unknown method."""
    if ranges not in (None, *RANGES):
        raise UserError(f"ranges: {ranges!r}; must be one of {', '.join(RANGES)}")


def uniform(model: DeepseekV32, scheme: str) -> dict[str, str]:
    """Schemes that give every linear the same one, the MTP layer's too."""
    return {path: scheme for path in named_parameters(model) if is_linear(path)}


def mixed(model: DeepseekV32) -> dict[str, str]:
    """Schemes with four bits for the routed experts, which have most of the bytes, and eight bits for the others."""
    return {path: (INT4 if ".experts." in path else INT8).name for path in uniform(model, INT8.name)}


def quantize_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    schemes: Mapping[str, str],
    *,
    to: str = "hf",
    statistics: Mapping[str, Statistics] | None = None,
    ranges: str | None = None,
    weights: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint with its linears in other schemes, one parameter after the other.

    In the Hugging Face layout, a checkpoint with all linears in "fp8_block" has the released form; any other is
    compressed-tensors, which other programs read too; see `dsv32_jax.convert.stored`. An interrupted run leaves nothing
    that loads; a run with the same arguments, arrays included, resumes where it stopped.

    Args:
      source: a checkpoint directory, of either layout.
      target: must not exist.
      schemes: as for `quantize_model`.
      to: "hf" or "orbax".
      statistics, ranges: as for `quantize_model`.
      weights: parameters that replace the source's, by path, for instance of a model that `migrate` changed. Where
        `schemes` has none for them, they get the scheme of the source's.
      provenance: JSON-able; the new config.json records it, with this package's version and the number of linears in
        each scheme, as the field `dsv32_jax_quantization`.

    Raises:
      UserError: what `dsv32_jax.convert.convert` and `quantize_model` raise it for.
    """
    check_ranges(ranges)
    rewrite(
        source,
        target,
        to,
        lambda config: _change(config, schemes, statistics or {}, ranges, weights or {}, provenance or {}),
    )


def _change(
    config: ModelConfig,
    schemes: Mapping[str, str],
    statistics: Mapping[str, Statistics],
    ranges: str | None,
    weights: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> Change:
    stored = stored_parameters(config)
    check_schemes(schemes, stored)
    source_schemes = {path: scheme_name(leaf) or UNQUANTISED for path, leaf in stored.items() if is_linear(path)}
    new_schemes = {**source_schemes, **schemes}
    note = {"version": __version__, "linears": dict(Counter(new_schemes.values())), **provenance}
    quantised = {path: scheme for path, scheme in new_schemes.items() if scheme != UNQUANTISED}
    target_schemes = {**quantised, **schemes}  # in another than the released form no weight may be plain
    target_schemes |= {path: new_schemes[path] for path in weights if path in new_schemes}
    new_config = config.replace(
        quantization_config=quantization_config(quantised, config),
        unknown=(*without_provenance(config), (PROVENANCE, json.dumps(note))),
    )
    check_statistics(statistics)
    check_all_finite(weights, config)

    def leaf(path: str, value: Any) -> Any:
        value = weights.get(path, value)
        scheme = target_schemes.get(path)
        if scheme is None or scheme == scheme_name(value):
            return value
        input_statistics, lead = statistics.get(path), value.shape[:-2]
        matrices = [
            _in_scheme(
                path,
                matrix(value, at),
                scheme,
                input_statistics and jax.tree.map(itemgetter(at), input_statistics),
                ranges,
            )
            for at in np.ndindex(lead)
        ]
        return jax.tree.map(lambda *parts: np.stack(parts).reshape(*lead, *parts[0].shape), *matrices)

    def abstract(path: str, value: Any) -> Any:
        scheme = target_schemes.get(path)
        if scheme is None or scheme == scheme_name(value):
            return value
        if scheme == UNQUANTISED:
            return jax.ShapeDtypeStruct(value.shape, jnp.bfloat16)
        return abstract_weight(value.shape, scheme)

    arrays = digest({"statistics": statistics, "weights": weights})
    identity = {"schemes": new_schemes, "ranges": ranges, "provenance": provenance, "arrays": arrays}
    return Change(new_config, leaf, abstract, identity)


def digest(arrays: Any) -> str | None:
    """SHA-256 of a tree of arrays and its structure; None for a tree without arrays."""
    leaves, structure = jax.tree.flatten(arrays)
    if not leaves:
        return None
    digest = hashlib.sha256(str(structure).encode())
    for leaf in map(np.asarray, leaves):
        digest.update(f"{leaf.dtype}{leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return digest.hexdigest()


def _in_scheme(path: str, leaf, scheme: str, statistics: Statistics | None, ranges: str | None):
    """One weight in a scheme; `UserError` where the scheme does not take its width."""
    if scheme == scheme_name(leaf):
        return leaf
    if scheme == UNQUANTISED:
        return _dense(leaf, jnp.bfloat16)
    weight = _dense(leaf, jnp.float32)
    try:
        if scheme in ROUNDED and (statistics is not None or ranges is not None):
            return ROUNDED[scheme](weight, None if statistics is None else statistics.moments, ranges or "mse")
        return _quantize(weight, scheme)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


_dense, _quantize = jax.jit(dense, static_argnames="dtype"), jax.jit(quantize_weight, static_argnames="scheme")
