"""The programs that the engine runs on the device for a step: the model, the sampling of tokens, and the draft.

They are separate programs because the kind of sampling differs from step to step: with a branch inside one program the
host would wait for the device to tell which way to go, and could not run ahead. The host passes its whole description
of a step as one flat array, since a small transfer costs the host as much as a larger one.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dsv32_jax.engine.speculation import NextTokens, draft_tokens
from dsv32_jax.generate.sampling import row_keys, sample
from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.model import Batch, Options

__all__ = [
    "RowSampling",
    "SampledTokens",
    "SamplingKinds",
    "Shape",
    "compile_programs",
    "copy_blocks",
    "draft_step",
    "engine_step",
    "sample_tokens",
]

Flat = TypeVar("Flat", np.ndarray, Array)
ALIGNMENT = 64
"""Elements: XLA gives a kernel a part of the flat array where it lies, and Mosaic takes none but at multiples of 256
bytes."""


class Shape(NamedTuple):
    """The shape of a step: T tokens, block tables of S sequences with W blocks each, R rows that sample a token."""

    tokens: int
    width: int
    sequences: int
    rows: int

    def layout(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Where each part of the flat array begins, and its shape."""
        names_by_shape = [
            ((self.tokens,), ("ids", "positions", "slots", "sequence", "previous_rows", "next_ids", "next_rows")),
            ((self.sequences, self.width), ("block_tables",)),
            ((self.rows,), ("logit_rows", "seeds", "completions", "sample_positions", "temperature", "top_p")),
        ]
        layout: dict[str, tuple[int, tuple[int, ...]]] = {}
        begin = 0
        for shape, names in names_by_shape:
            for name in names:
                layout[name] = begin, shape
                begin += -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT
        return layout

    @property
    def size(self) -> int:
        """Elements of the flat array."""
        begin, shape = list(self.layout().values())[-1]
        return begin + math.prod(shape)

    def parts(self, flat: Flat) -> dict[str, Flat]:
        """Views of the flat array, int32 [size], by name.

        [T]: `ids`, `positions`, `slots`, `sequence` as in `Batch`; `previous_rows`, the row of the previous step that
        samples the token, -1 where the host knows its id; `next_ids` and `next_rows` as in `NextTokens`.
        [S, W]: `block_tables`.
        [R]: `logit_rows` as in `Batch`; `seeds`, `completions`, `sample_positions` as in `RowSampling`; `temperature`
        and `top_p`, the bits of float32.
        """
        parts = {}
        for name, (begin, shape) in self.layout().items():
            parts[name] = flat[begin : begin + math.prod(shape)].reshape(shape)
        return parts

    def batch(self, flat: Array) -> Batch:
        """The `Batch` of the model in the flat array."""
        parts = self.parts(flat)
        return Batch(**{field.name: parts[field.name] for field in dataclasses.fields(Batch)})


class RowSampling(NamedTuple):
    """The sampling parameters of a step's rows, each [R]; see `sampling.row_keys` and `sampling.sample`.

    Attributes:
      seeds: int32, of the requests.
      completions: int32, the number of the row's completion in its request.
      positions: int32, of the tokens to be sampled.
      temperature, top_p: float32.
    """

    seeds: Array
    completions: Array
    positions: Array
    temperature: Array
    top_p: Array


@dataclasses.dataclass(frozen=True)
class SamplingKinds:
    """What at least one row of a step needs beyond the likeliest token.

    Attributes:
      random: a random draw.
      nucleus: a random draw with top-p below 1.
      logprobs: log-probabilities.
    """

    random: bool = False
    nucleus: bool = False
    logprobs: bool = False


@dataclasses.dataclass(frozen=True)
class SampledTokens:
    """The results of a step, as arrays of the device or of NumPy.

    Attributes:
      tokens: int32 [R].
      logprobs: the three arrays of `sampling.log_probabilities`; None where no row asks for them.
      drafts: int32 [R], guesses at the tokens after them; None without speculation.
    """

    tokens: Any
    logprobs: tuple[Any, ...] | None
    drafts: Any

    def fetched(self) -> "SampledTokens":
        """The same as NumPy arrays; waits for the device."""
        return SampledTokens(
            np.asarray(self.tokens),
            None if self.logprobs is None else tuple(map(np.asarray, self.logprobs)),
            None if self.drafts is None else np.asarray(self.drafts),
        )


@functools.partial(jax.jit, static_argnames=("structure", "shape", "options"), donate_argnames="cache")
def engine_step(
    leaves: list[Any],
    structure: Any,
    flat: Array,
    previous_tokens: Array,
    cache: KVCache,
    *,
    shape: Shape,
    options: Options,
) -> tuple[Array, Array, RowSampling, KVCache]:
    """Runs the model.

    Args:
      leaves, structure: of the model.
      flat: int32 [shape.size], the host's description of the step; see `Shape.parts`.
      previous_tokens: int32 [R], sampled by the previous step.
      cache: donated.
      shape: of the step.
      options: of the model.

    Returns:
      States [T, D] for the draft, logits float32 [R, V], the rows' sampling parameters, and the cache.
    """
    parts, batch = shape.parts(flat), shape.batch(flat)
    previous_rows = parts["previous_rows"]
    batch = dataclasses.replace(batch, ids=jnp.where(previous_rows >= 0, previous_tokens[previous_rows], batch.ids))
    model = jax.tree.unflatten(structure, leaves)
    states, cache = model.states(batch, cache, options)
    temperature, top_p = (lax.bitcast_convert_type(parts[name], jnp.float32) for name in ("temperature", "top_p"))
    sampling = RowSampling(parts["seeds"], parts["completions"], parts["sample_positions"], temperature, top_p)
    return states, model.logits(states, batch.logit_rows), sampling, cache


@functools.partial(jax.jit, static_argnames=("greedy", "nucleus"))
def sample_tokens(logits: Array, sampling: RowSampling, *, greedy: bool, nucleus: bool) -> Array:
    """Samples tokens int32 [R] from logits [R, V]; `greedy` and `nucleus` as in `sample`."""
    keys = row_keys(sampling.seeds, sampling.completions, sampling.positions)
    return sample(logits, keys, sampling.temperature, sampling.top_p, greedy=greedy, nucleus=nucleus)


@functools.partial(jax.jit, static_argnames=("structure", "shape", "options"), donate_argnames="cache")
def draft_step(
    leaves: list[Any],
    structure: Any,
    flat: Array,
    states: Array,
    tokens: Array,
    cache: KVCache,
    *,
    shape: Shape,
    options: Options,
) -> tuple[Array, KVCache]:
    """Guesses int32 [R] at the token after each sampled token, and the cache; see `speculation.draft_tokens`."""
    parts = shape.parts(flat)
    next_tokens = NextTokens(parts["next_ids"], parts["next_rows"])
    model = jax.tree.unflatten(structure, leaves)
    return draft_tokens(model, states, shape.batch(flat), next_tokens, tokens, cache, options)


def compile_programs(
    leaves: list[Any],
    structure: Any,
    tokens: Any,
    cache: Any,
    *,
    shape: Shape,
    options: Options,
    speculate: bool,
) -> tuple[Any, Any]:
    """Compiles the programs of a shape; all arrays may be abstract.

    Args:
      leaves, structure: of the model.
      tokens: int32 [R], as a step samples them.
      cache: of the engine.
      shape: of the step.
      options: of the model.
      speculate: compile the draft too.

    Returns:
      `engine_step`, and `draft_step` or None.
    """
    flat = np.zeros(shape.size, np.int32)
    step = engine_step.lower(leaves, structure, flat, tokens, cache, shape=shape, options=options)
    if not speculate:
        return step.compile(), None
    states, *_ = step.out_info
    draft = draft_step.lower(leaves, structure, flat, states, tokens, cache, shape=shape, options=options)
    return step.compile(), draft.compile()


@functools.partial(jax.jit, donate_argnames="cache")
def copy_blocks(cache: KVCache, sources: Array, targets: Array) -> KVCache:
    """`KVCache.copy_blocks`, in place."""
    return cache.copy_blocks(sources, targets)
