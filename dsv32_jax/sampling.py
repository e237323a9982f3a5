"""The next token from logits: greedy, temperature and top-p, with one random stream a row."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax


@jax.jit
def row_keys(seeds: Array | int, rows: Array, positions: Array) -> Array:
    """One PRNG key for each row and position, so that what a row draws does not depend on its neighbours.

    Args:
      seeds: of the run, a scalar; or [B], each row's own.
      rows: int32 [B], the row's number within the run, or within those of one seed.
      positions: int32 [B], position of the token to be drawn.

    Returns:
      Keys [B] for `sample`.
    """

    def key(seed: Array, row: Array, position: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), position)

    return jax.vmap(key)(jnp.broadcast_to(seeds, rows.shape), rows, positions)


@jax.jit
def sample(logits: Array, keys: Array, temperature: Array | float, top_p: Array | float) -> Array:
    """Draws one token a row.

    Args:
      logits: [B, V], any float dtype; computed in float32.
      keys: PRNG keys [B] (`row_keys`).
      temperature: scalar or [B]. 0 means greedy: the largest logit, ties to the lowest id.
      top_p: scalar or [B] in (0, 1]. Only the nucleus is drawn from: the shortest run of tokens, by falling probability
        (ties by id), whose probability reaches `top_p`. 1 keeps every token.

    Returns:
      int32 [B].
    """
    rows = logits.shape[0]
    logits = logits.astype(jnp.float32)
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (rows,))
    top_p = jnp.broadcast_to(jnp.asarray(top_p, jnp.float32), (rows,))
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> Array:
        scaled = logits / jnp.where(temperature > 0, temperature, 1)[:, None]
        allowed = lax.cond(jnp.any(top_p < 1), lambda: _nucleus(scaled, top_p), lambda: jnp.ones(logits.shape, bool))
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
        # argmax of log-probability plus Gumbel noise is a draw from the distribution (Gumbel-max trick).
        return jnp.argmax(jnp.where(allowed, scaled + noise, -jnp.inf), axis=-1).astype(jnp.int32)

    # Sorting a vocabulary costs more than the rest of sampling: not done when every row is greedy.
    drawn = lax.cond(jnp.any(temperature > 0), draw, lambda: greedy)
    return jnp.where(temperature > 0, drawn, greedy)


@partial(jax.jit, static_argnames="count")
def log_probabilities(logits: Array, tokens: Array, wanted: Array | bool, count: int) -> tuple[Array, Array, Array]:
    """What the model thought of the drawn tokens, and of those it thought most likely; before temperature and top-p.

    Args:
      logits: [B, V].
      tokens: int32 [B], drawn.
      wanted: bool; without it nothing is computed, and all is 0.
      count: of the likeliest.

    Returns:
      Log-probabilities float32 [B] of `tokens`; ids int32 [B, count] of the likeliest, ties to the lowest; and theirs,
      float32 [B, count].
    """
    rows, count = logits.shape[0], min(count, logits.shape[1])

    def compute() -> tuple[Array, Array, Array]:
        every = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        values, ids = lax.top_k(every, count)
        return jnp.take_along_axis(every, tokens[:, None], axis=1)[:, 0], ids.astype(jnp.int32), values

    def nothing() -> tuple[Array, Array, Array]:
        return jnp.zeros(rows), jnp.zeros((rows, count), jnp.int32), jnp.zeros((rows, count))

    return lax.cond(wanted, compute, nothing)


def _nucleus(logits: Array, top_p: Array) -> Array:
    """bool [B, V]: tokens whose more probable predecessors sum to less than `top_p`; the first always belongs."""
    ids = jnp.broadcast_to(jnp.arange(logits.shape[1], dtype=jnp.int32), logits.shape)
    descending, order = lax.sort_key_val(-logits, ids, dimension=1, is_stable=True)
    probabilities = jax.nn.softmax(-descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The rounded sum may reach 1 early: a row with top_p 1 keeps everything.
    keep = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    keep = keep.at[:, 0].set(True)
    return jnp.zeros(logits.shape, bool).at[jnp.arange(logits.shape[0])[:, None], order].set(keep)
