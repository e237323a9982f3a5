"""The next token from logits: greedy, temperature and top-p, with one random stream a row."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dsv32_jax.common.arguments import integer, number
from dsv32_jax.errors import UserError

NOT_FINITE = -2
"""Returned instead of a token for logits that contain NaN or infinity, or none above -infinity."""


def check_sampling(temperature: float, top_p: float, seed: int) -> None:
    """Raises `UserError` for sampling parameters that are out of range."""
    # The device has float32.
    number("temperature", temperature, "0 (greedy) or above", least=0, most=float(np.finfo(np.float32).max))
    number("top_p", top_p, "above 0 and at most 1", above=0, most=1)
    integer("seed", seed, 0, 2**31 - 1)


def not_finite(prompt: int, position: int) -> UserError:
    """The error of a position where `NOT_FINITE` was drawn, or whose log-likelihood is not finite."""
    return UserError(
        f"prompt {prompt}, position {position}: the logits are not finite; a weight is NaN or infinite, or the numbers "
        "outgrew the compute dtype: `trace` shows in which layer it begins"
    )


@jax.jit
def row_keys(seeds: Array | int, rows: Array, positions: Array) -> Array:
    """Makes one PRNG key for each row and position, so that a row's tokens do not depend on its neighbours.

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


@partial(jax.jit, static_argnames=("greedy", "nucleus"))
def sample(
    logits: Array,
    keys: Array | None,
    temperature: Array | float,
    top_p: Array | float,
    *,
    greedy: bool = False,
    nucleus: bool = True,
) -> Array:
    """Draws one token a row.

    Args:
      logits: [B, V], any float dtype; computed in float32.
      keys: PRNG keys [B] (`row_keys`); None only if greedy.
      temperature: scalar or [B]. 0 means greedy: the largest logit, ties to the lowest id.
      top_p: scalar or [B] in (0, 1]. Only the nucleus is drawn from: the shortest run of tokens, by falling probability
        (ties by id), whose probability reaches `top_p`. 1 keeps every token.
      greedy: True if the caller knows that every temperature is 0; no noise is computed then.
      nucleus: False if the caller knows that every `top_p` is 1; the vocabulary is not sorted then, which costs more
        than all the rest. (The device could test it, but the host would have to wait for the result.)

    Returns:
      int32 [B]; `NOT_FINITE` for a row from which nothing can be drawn.
    """
    rows = logits.shape[0]
    logits = logits.astype(jnp.float32)
    largest = logits.max(axis=-1, keepdims=True)
    # Not of the largest alone: XLA's maximum loses a NaN or keeps it, by the shape.
    finite = (logits < jnp.inf).all(axis=-1) & (largest[:, 0] > -jnp.inf)
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (rows,))
    top_p = jnp.broadcast_to(jnp.asarray(top_p, jnp.float32), (rows,))
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if greedy:
        return jnp.where(finite, likeliest, NOT_FINITE)
    if keys is None:
        raise ValueError("keys: None; drawing needs one key a row")
    # The largest logit is subtracted, so that it is 0 however small the temperature is and none becomes +infinity.
    scaled = (logits - largest) / jnp.where(temperature > 0, temperature, 1)[:, None]
    if nucleus:
        scaled = jnp.where(_nucleus(scaled, top_p), scaled, -jnp.inf)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    # argmax of log-probability plus Gumbel noise is a draw from the distribution (Gumbel-max trick).
    drawn = jnp.argmax(scaled + noise, axis=-1).astype(jnp.int32)
    return jnp.where(finite, jnp.where(temperature > 0, drawn, likeliest), NOT_FINITE)


@partial(jax.jit, static_argnames="count")
def log_probabilities(logits: Array, tokens: Array, count: int) -> tuple[Array, Array, Array]:
    """Log-probabilities of the sampled tokens and of the likeliest ones, before temperature and top-p.

    Args:
      logits: [B, V].
      tokens: int32 [B], the sampled ones.
      count: number of the likeliest.

    Returns:
      Log-probabilities float32 [B] of `tokens`; ids int32 [B, count] of the likeliest, ties to the lowest; and theirs,
      float32 [B, count].
    """
    every = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    values, ids = lax.top_k(every, min(count, logits.shape[1]))
    return jnp.take_along_axis(every, tokens[:, None], axis=1)[:, 0], ids.astype(jnp.int32), values


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
