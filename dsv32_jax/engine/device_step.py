"""What the engine runs on the device for a step: the model, the drawing of tokens, and the draft behind them.

They are programs of their own because what is drawn differs from step to step: a branch inside one program would make
the host wait for the device to tell which way to go, and so keep it from running ahead. All that the host says of a
step is one flat array, since a small transfer costs the host as much as a larger one.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dsv32_jax.engine.speculation import After, draft
from dsv32_jax.generate.sampling import row_keys, sample
from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.model import Batch, Options

__all__ = [
    "Drawing",
    "Drawn",
    "Draws",
    "Shape",
    "compiled",
    "copy_blocks",
    "draft_step",
    "draw",
    "engine_step",
]

Flat = TypeVar("Flat", np.ndarray, Array)
ALIGNED = 64
"""Numbers: XLA gives a kernel a part of the flat array where it lies, and Mosaic takes none but at multiples of 256
bytes."""


class Shape(NamedTuple):
    """Of a step: T tokens, block tables of S sequences with W blocks each, R rows that draw a token."""

    tokens: int
    width: int
    sequences: int
    rows: int

    def layout(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Where each part of the flat array begins, and its shape."""
        names = [
            ((self.tokens,), ("ids", "positions", "slots", "sequence", "feed", "after_ids", "after_rows")),
            ((self.sequences, self.width), ("block_tables",)),
            ((self.rows,), ("logit_rows", "seeds", "numbers", "places", "temperature", "top_p")),
        ]
        found, begin = {}, 0
        for shape, those in names:
            for name in those:
                found[name] = begin, shape
                begin += -(-math.prod(shape) // ALIGNED) * ALIGNED
        return found

    @property
    def size(self) -> int:
        """Numbers in the flat array."""
        begin, shape = list(self.layout().values())[-1]
        return begin + math.prod(shape)

    def parts(self, flat: Flat) -> dict[str, Flat]:
        """Views of int32 [size] by name.

        [T]: `ids`, `positions`, `slots`, `sequence` as in `Batch`; `feed`, the row of the step before that drew the
        token, -1 for known ids; `after_ids` and `after_rows` as in `After`. [S, W]: `block_tables`. [R]: `logit_rows`
        as in `Batch`; `seeds`, `numbers`, `places` as in `row_keys`; `temperature` and `top_p`, the bits of float32.
        """
        found = {}
        for name, (begin, shape) in self.layout().items():
            found[name] = flat[begin : begin + math.prod(shape)].reshape(shape)
        return found

    def batch(self, flat: Array) -> Batch:
        """The model's part of it."""
        given = self.parts(flat)
        return Batch(**{field.name: given[field.name] for field in dataclasses.fields(Batch)})


class Draws(NamedTuple):
    """How tokens are drawn, by row: [R]; see `sampling`."""

    seeds: Array
    numbers: Array
    places: Array
    temperature: Array
    top_p: Array


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What the rows of a step ask for beyond the likeliest token: a draw, from a nucleus, log-probabilities."""

    drawn: bool = False
    nucleus: bool = False
    logprobs: bool = False


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a step drew: int32 [R]; where a row asks for it, what `log_probabilities` says; drafts behind the tokens."""

    tokens: Any
    told: tuple[Any, ...] | None
    drafts: Any

    def fetched(self) -> "Drawn":
        """The same as NumPy arrays; waits for the device."""
        return Drawn(
            np.asarray(self.tokens),
            None if self.told is None else tuple(map(np.asarray, self.told)),
            None if self.drafts is None else np.asarray(self.drafts),
        )


@functools.partial(jax.jit, static_argnames=("structure", "shape", "options"), donate_argnames="cache")
def engine_step(
    leaves: list[Any], structure: Any, flat: Array, drawn: Array, cache: KVCache, *, shape: Shape, options: Options
) -> tuple[Array, Array, Draws, KVCache]:
    """The model's step.

    Args:
      leaves, structure: of the model.
      flat: int32 [shape.size]; what the host says.
      drawn: int32 [R], of the step before.
      cache: donated.
      shape: of the step.
      options: of the model.

    Returns:
      States [T, D] for the draft, logits float32 [R, V] and how they are drawn from, and the cache.
    """
    given, batch = shape.parts(flat), shape.batch(flat)
    feed = given["feed"]
    batch = dataclasses.replace(batch, ids=jnp.where(feed >= 0, drawn[feed], batch.ids))
    model = jax.tree.unflatten(structure, leaves)
    states, cache = model.states(batch, cache, options)
    temperature, top_p = (lax.bitcast_convert_type(given[name], jnp.float32) for name in ("temperature", "top_p"))
    draws = Draws(given["seeds"], given["numbers"], given["places"], temperature, top_p)
    return states, model.logits(states, batch.logit_rows), draws, cache


@functools.partial(jax.jit, static_argnames=("greedy", "nucleus"))
def draw(logits: Array, draws: Draws, *, greedy: bool, nucleus: bool) -> Array:
    """Tokens int32 [R] from logits [R, V]; `greedy` and `nucleus` as in `sample`."""
    keys = row_keys(draws.seeds, draws.numbers, draws.places)
    return sample(logits, keys, draws.temperature, draws.top_p, greedy=greedy, nucleus=nucleus)


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
    """What may come behind the drawn `tokens`: int32 [R], and the cache; see `speculation.draft`."""
    given = shape.parts(flat)
    after = After(given["after_ids"], given["after_rows"])
    model = jax.tree.unflatten(structure, leaves)
    return draft(model, states, shape.batch(flat), after, tokens, cache, options)


def compiled(
    model: tuple[list[Any], Any], shape: Shape, drawn: Any, cache: Any, options: Options, speculate: bool
) -> tuple[Any, Any]:
    """The programs of a shape: the step, and the draft of an engine that speculates. All arrays may be abstract."""
    flat, how = np.zeros(shape.size, np.int32), {"shape": shape, "options": options}
    step = engine_step.lower(*model, flat, drawn, cache, **how)
    if not speculate:
        return step.compile(), None
    states, *_ = step.out_info
    return step.compile(), draft_step.lower(*model, flat, states, drawn, cache, **how).compile()


@functools.partial(jax.jit, donate_argnames="cache")
def copy_blocks(cache: KVCache, sources: Array, targets: Array) -> KVCache:
    """`KVCache.copy_blocks`, in place."""
    return cache.copy_blocks(sources, targets)
