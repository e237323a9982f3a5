"""Normalisation, computed in float32."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """x / rms(x) * weight over the last axis, in float32, cast once (official `RMSNorm`).

    Args:
      x: [..., D].
      weight: [D].
      eps: added to the mean square.
      dtype: of the result; x's own where None.
    """
    x32 = x.astype(jnp.float32)
    scaled = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (scaled * weight.astype(jnp.float32)).astype(dtype or x.dtype)


def add_rms_norm(
    residual: jax.Array, update: jax.Array | None, weight: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """(residual + update, its norm). The norm sees the float32 sum, before the residual stream is rounded.

    Args:
      residual: [T, D], the residual stream.
      update: [T, D], what the last block adds; None before the first.
      weight: [D].
      eps: see `rms_norm`.
    """
    if update is None:
        return residual, rms_norm(residual, weight, eps)
    total = residual.astype(jnp.float32) + update.astype(jnp.float32)
    return total.astype(residual.dtype), rms_norm(total, weight, eps, residual.dtype)


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / std * weight + bias over the last axis, in float32, cast to x's dtype (the indexer's key norm)."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    scaled = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return (scaled * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)
