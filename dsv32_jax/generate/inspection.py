"""Values inside a step: traces, taps, and one layer alone. Each runs a whole sequence as one step."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv32_jax.common.arguments import instance, integer
from dsv32_jax.common.progress import progress_bar
from dsv32_jax.errors import UserError
from dsv32_jax.fidelity import OF_LAYER, TAPS, Trace
from dsv32_jax.generate import batching
from dsv32_jax.generate.flat_model import FlatModel, flat_tapped_step
from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.model import Batch
from dsv32_jax.model.taps import Taps

__all__ = ["run_layer", "tap_names", "tapped", "traces"]

ALL = Taps.of({"*": None})
OF_LAYER_TAPS = Taps.of(dict.fromkeys(f"layers.*.{name}" for name in OF_LAYER))


def traces(flat: FlatModel, rows: list[list[int]]) -> list[Trace]:
    """What every layer chose and computed for each sequence; padded alike, they share a program."""
    experts = any(flat.config.is_moe(layer) for layer in range(flat.config.num_hidden_layers))
    names = [name for name in TAPS if experts or not name.startswith("layers.*.ffn.")]
    taps = Taps.of(dict.fromkeys(names))
    longest = max(map(len, rows))
    size = batching.padded(longest, batching.SMALLEST_CHUNK)
    traced = []
    with progress_bar("tracing", len(rows), "sequences") as advance:
        for row in rows:
            logits, values = tapped(flat, row, taps, size, longest)
            traced.append(Trace.from_taps(logits, values, len(row)))
            advance(1)
    return traced


def tapped(
    flat: FlatModel,
    row: list[int],
    taps: Taps,
    size: int,
    longest: int | None = None,
    operands: Mapping[str, Array] | None = None,
) -> tuple[Array, dict[str, Any]]:
    """Logits [size, V] of a sequence, padded to `size` tokens, and what the taps ask for.

    Args:
      flat: the model.
      row: the sequence.
      taps: what is asked for.
      size: tokens of the step.
      longest: tokens that the cache has room for; those of the sequence where None.
      operands: further details of every value, by name.
    """
    return flat.tapped_step(*_one_step(flat, row, size, longest), taps, operands)


def tap_names(flat: FlatModel) -> dict[str, str]:
    """The names of the values of a step, each with the dtype and shape of its value for 8 tokens."""
    batch, cache = _one_step(flat, [0] * 8, 8)
    run = functools.partial(flat_tapped_step, structure=flat.structure, options=flat.options, taps=ALL)
    values = jax.eval_shape(run, flat.leaves, batch=batch, cache=cache)[2]
    return {name: f"{value.dtype} {list(value.shape)}" for name, value in values.items()}


def run_layer(flat: FlatModel, layer: int, hidden: np.ndarray | Array) -> dict[str, np.ndarray]:
    """What one layer alone makes of a residual stream [T, hidden_size]; see `LanguageModel.run_layer`."""
    layer = integer("layer", layer, 0, flat.config.num_hidden_layers - 1)
    every = flat.options.index_topk_freq
    if layer % every:
        raise UserError(
            f"layer {layer}: attends to what layer {layer - layer % every} chose (index_topk_freq = {every}), so it "
            "does not run alone; give a layer that chooses, or set index_topk_freq to 1"
        )
    width, longest = flat.config.hidden_size, flat.config.max_position_embeddings
    instance("hidden", hidden, (np.ndarray, Array), f"an array of floats [T, {width}]")
    if hidden.ndim != 2 or hidden.shape[1] != width or not 1 <= len(hidden) <= longest:
        raise UserError(f"hidden: {list(hidden.shape)}; must be [T, {width}], T in 1..{longest}")
    if not jnp.issubdtype(hidden.dtype, jnp.floating):
        raise UserError(f"hidden: {hidden.dtype}; must be floats")
    tokens = len(hidden)
    batch, cache = _one_step(flat, [0] * tokens, tokens)
    values = flat.tapped_layer(layer, jnp.asarray(hidden), batch, cache, OF_LAYER_TAPS)
    arrays = {name.rpartition(".")[2]: np.asarray(value) for name, value in values.items()}
    for name in ("index_scores", "attention"):
        arrays[name] = arrays[name][:, :tokens]
    return arrays


def _one_step(flat: FlatModel, row: list[int], size: int, longest: int | None = None) -> tuple[Batch, KVCache]:
    """One sequence as one step of `size` tokens with all its logits, and a cache for it."""
    tables = batching.block_tables(1, longest or len(row), flat.config.max_position_embeddings)
    batch = batching.prompt_batch(row, 0, len(row), size, tables[0], np.arange(size, dtype=np.int32))
    return batch, flat.new_cache(tables)
