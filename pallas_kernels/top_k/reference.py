"""Top-k by `lax.top_k`, whose ties go to the lowest index: the specification."""

import jax
import jax.numpy as jnp


def top_k(scores: jax.Array, k: int, lengths: jax.Array | None = None) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    scores = jnp.where(bits == jnp.int32(-(2**31)), 0.0, scores)  # `scores == 0` may hold for denormals, too
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    if lengths is not None:
        scores = jnp.where(jnp.arange(scores.shape[-1]) < lengths[..., None], scores, -jnp.inf)
    width = min(k, scores.shape[-1])
    values, positions = jax.lax.top_k(scores, width)
    chosen = jnp.where(values == -jnp.inf, -1, positions).astype(jnp.int32)
    return jnp.pad(chosen, [(0, 0)] * (chosen.ndim - 1) + [(0, k - width)], constant_values=-1)
