"""A model with its linears in other schemes: in memory, or from checkpoint to checkpoint.

The price of a scheme is in docs/quantisation.md. Whatever the scheme, embedding, head, router, norms and the indexer's
head weights stay as they are: `dsv32_jax.model.params.PLAIN`.
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
"""Says of a linear that it becomes plain bfloat16."""
ROUNDED = {INT4.name: round_int4, INT8.name: round_int8}
"""Schemes whose rounding can know its inputs."""


def quantize_model(
    model: DeepseekV32,
    schemes: Mapping[str, str],
    statistics: Mapping[str, Statistics] | None = None,
    ranges: str | None = None,
) -> DeepseekV32:
    """The model with some linears in other schemes; weights that have one are dequantised first.

    Args:
      model: concrete.
      schemes: one of `SCHEMES` or "bf16" for each linear that shall have it, by path; see `uniform`. Others stay.
      statistics: of the linears' inputs, from `calibrate`: integers are rounded for them.
      ranges: how integers' ranges are found, one of `dsv32_jax.convert.ranges.RANGES`. None: "mse" where there are
        statistics; else (the MTP layer has none) "min-max".

    Returns:
      A model whose config says the new schemes, so that `dsv32_jax.convert.export_model` writes it as it is.

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
    made = {path: _as(path, parameters[path], scheme, statistics.get(path), ranges) for path, scheme in schemes.items()}
    parameters |= made
    found = {path: scheme for path, leaf in parameters.items() if (scheme := scheme_name(leaf))}
    changed = replace_parameters(model, parameters)
    changed.config = model.config.replace(
        quantization_config=quantization_config(found, model.config), unknown=without_provenance(model.config)
    )
    check_all_finite(made, changed.config)
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
    """Raises UserError for an unknown kind."""
    if ranges not in (None, *RANGES):
        raise UserError(f"ranges: {ranges!r}; must be one of {', '.join(RANGES)}")


def uniform(model: DeepseekV32, scheme: str) -> dict[str, str]:
    """The same scheme for every linear, the MTP layer's too."""
    return {path: scheme for path in named_parameters(model) if is_linear(path)}


def mixed(model: DeepseekV32) -> dict[str, str]:
    """Four bits where most of the bytes are, in the routed experts, eight elsewhere."""
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

    In the Hugging Face layout, all in "fp8_block" is the released checkpoint's own form; anything else is
    compressed-tensors, which other programs read too; see `dsv32_jax.convert.stored`. An interrupted run leaves nothing
    that loads, and goes on where it stopped when it is made again with the same arguments, whatever they hold.

    Args:
      source: a checkpoint directory, of either layout.
      target: must not exist.
      schemes: as for `quantize_model`.
      to: "hf" or "orbax".
      statistics, ranges: as for `quantize_model`.
      weights: parameters to take instead of the source's, by path: those of a model that `migrate` changed. They get
        the scheme that the source's have, where `schemes` says no other.
      provenance: JSON-able; the new config.json has it, with this package's version and the number of linears in each
        scheme, as the field `dsv32_jax_quantization`.

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
    before = {path: scheme_name(leaf) or UNQUANTISED for path, leaf in stored.items() if is_linear(path)}
    after = {**before, **schemes}
    note = {"version": __version__, "linears": dict(Counter(after.values())), **provenance}
    quantised = {path: scheme for path, scheme in after.items() if scheme != UNQUANTISED}
    wanted = {**quantised, **schemes}  # in the released form a weight may be plain: not in another
    wanted |= {path: after[path] for path in weights if path in after}
    new_config = config.replace(
        quantization_config=quantization_config(quantised, config),
        unknown=(*without_provenance(config), (PROVENANCE, json.dumps(note))),
    )
    check_statistics(statistics)
    check_all_finite(weights, config)

    def leaf(path: str, value: Any) -> Any:
        value = weights.get(path, value)
        scheme = wanted.get(path)
        if scheme is None or scheme == scheme_name(value):
            return value
        found, lead = statistics.get(path), value.shape[:-2]
        every = [
            _as(path, matrix(value, at), scheme, found and jax.tree.map(itemgetter(at), found), ranges)
            for at in np.ndindex(lead)
        ]
        return jax.tree.map(lambda *parts: np.stack(parts).reshape(*lead, *parts[0].shape), *every)

    def abstract(path: str, value: Any) -> Any:
        scheme = wanted.get(path)
        if scheme is None or scheme == scheme_name(value):
            return value
        if scheme == UNQUANTISED:
            return jax.ShapeDtypeStruct(value.shape, jnp.bfloat16)
        return abstract_weight(value.shape, scheme)

    arrays = digest({"statistics": statistics, "weights": weights})
    asked = {"schemes": after, "ranges": ranges, "provenance": provenance, "arrays": arrays}
    return Change(new_config, leaf, abstract, asked)


def digest(arrays: Any) -> str | None:
    """Of a tree of arrays, its structure among them; None where there are none."""
    leaves, structure = jax.tree.flatten(arrays)
    if not leaves:
        return None
    digest = hashlib.sha256(str(structure).encode())
    for leaf in map(np.asarray, leaves):
        digest.update(f"{leaf.dtype}{leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return digest.hexdigest()


def _as(path: str, leaf, scheme: str, statistics: Statistics | None, ranges: str | None):
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
