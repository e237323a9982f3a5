"""A model as jitted steps take it: a flat list of leaves, with the config and the options of a run."""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from dsv32_jax.config import ModelConfig
from dsv32_jax.errors import UserError
from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.checks import shown_as_user_errors
from dsv32_jax.model.model import Batch, Options, step, tapped_layer, tapped_step
from dsv32_jax.model.taps import Taps
from pallas_kernels.backend import BackendError

__all__ = ["FlatModel", "flat_step", "flat_tapped_layer", "flat_tapped_step", "user_errors"]


class FlatModel(NamedTuple):
    """A prepared model at the beginning of a call, and how the call computes.

    Passing a module to a jitted function costs the host some microseconds a leaf at every call; a flat list costs far
    less.

    Attributes:
      leaves, structure: of the `prepared` model, see `LanguageModel.flat_model`.
      config: the model's.
      options: of the run.
    """

    leaves: list[Any]
    structure: Any
    config: ModelConfig
    options: Options

    def new_cache(self, tables: np.ndarray) -> KVCache:
        """An empty cache with the blocks of these tables."""
        return KVCache.create(self.config, tables.size, self.options)

    def step(self, batch: Batch, cache: KVCache) -> tuple[Array, KVCache]:
        """`model.step`; the cache is donated. With `options.check` it waits for the result, whose checks may fail."""
        with user_errors():
            out = flat_step(self.leaves, self.structure, batch, cache, self.options)
            return jax.block_until_ready(out) if self.options.check else out

    def tapped_step(
        self, batch: Batch, cache: KVCache, taps: Taps, operands: Mapping[str, Array] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Logits of a step, and what the taps ask for; the cache is donated."""
        with user_errors():
            out = flat_tapped_step(self.leaves, self.structure, batch, cache, self.options, taps, operands)
            logits, _, values = jax.block_until_ready(out)
        return logits, values

    def tapped_layer(self, layer: int, hidden: Array, batch: Batch, cache: KVCache, taps: Taps) -> dict[str, Any]:
        """What the taps ask for of one layer alone."""
        with user_errors():
            return jax.block_until_ready(
                flat_tapped_layer(self.leaves, self.structure, layer, hidden, batch, cache, self.options, taps)
            )


@functools.partial(jax.jit, static_argnames=("structure", "options"), donate_argnames=("cache",))
def flat_step(
    leaves: list[Any], structure: Any, batch: Batch, cache: KVCache, options: Options
) -> tuple[Array, KVCache]:
    """`model.step` of a flattened model."""
    return step(jax.tree.unflatten(structure, leaves), batch, cache, options)


@functools.partial(jax.jit, static_argnames=("structure", "options", "taps"), donate_argnames=("cache",))
def flat_tapped_step(
    leaves: list[Any],
    structure: Any,
    batch: Batch,
    cache: KVCache,
    options: Options,
    taps: Taps,
    operands: Mapping[str, Array] | None = None,
) -> tuple[Array, KVCache, dict[str, Any]]:
    """`model.tapped_step` of a flattened model."""
    return tapped_step(jax.tree.unflatten(structure, leaves), batch, cache, options, taps, operands)


@functools.partial(jax.jit, static_argnames=("structure", "layer", "options", "taps"))
def flat_tapped_layer(
    leaves: list[Any],
    structure: Any,
    layer: int,
    hidden: Array,
    batch: Batch,
    cache: KVCache,
    options: Options,
    taps: Taps,
) -> dict[str, Any]:
    """`model.tapped_layer` of a flattened model."""
    return tapped_layer(jax.tree.unflatten(structure, leaves), layer, hidden, batch, cache, options, taps)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Raises as `UserError` that an op lacks the backend, which the user chose, and what `checks` refuse."""
    try:
        with shown_as_user_errors():
            yield
    except BackendError as error:
        raise UserError(f"backend: {error}") from error
