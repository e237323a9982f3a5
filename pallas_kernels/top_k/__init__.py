"""Exact, deterministic selection of the k largest scores of each row."""

import jax

from pallas_kernels.backend import resolve
from pallas_kernels.top_k import reference


def top_k(scores: jax.Array, k: int, *, backend: str = "auto") -> jax.Array:
    """Positions of the k largest scores of each row; equal scores go to the lowest position, always.

    Args:
      scores: float32 [T, L]; -inf and NaN are never chosen; -0 equals 0.
      k: how many, at least 1.
      backend: "auto" or "reference".

    Returns:
      int32 [T, k]; -1 where a row has fewer than k that can be chosen. The order within a row is not specified.

    Raises:
      ValueError: k is less than 1.
    """
    resolve(backend, "top_k")
    if k < 1:
        raise ValueError(f"top_k needs k >= 1, not {k}")
    return reference.top_k(scores, k)
