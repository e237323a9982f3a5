"""Normalisation of the residual stream, computed in float32."""

import jax
import jax.numpy as jnp

from pallas_kernels.rowwise import rms_norm


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
