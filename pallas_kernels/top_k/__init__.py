"""Exact, deterministic selection of the k largest scores of each row."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic
from pallas_kernels.arguments import FLOAT32, INT32, check, check_size
from pallas_kernels.backend import KERNEL, launched, resolve
from pallas_kernels.operators import callable_package
from pallas_kernels.top_k import mosaic_gpu, reference
from pallas_kernels.top_k.config import LARGEST_K

__all__ = ["LONGEST", "top_k", "unsupported"]

callable_package(__name__)

LONGEST = 163840
"""Scores in a row that the kernel takes."""


def unsupported(shape: tuple[int, ...], dtype: Any, k: int) -> str | None:
    """Says which scores or k the kernel does not take, and which it does; None if it takes these."""
    if len(shape) != 2 or shape[1] > LONGEST or dtype != jnp.float32:
        return f"scores of shape {tuple(shape)} and dtype {dtype}; it takes float32 [T, L] with L up to {LONGEST}"
    if k > LARGEST_K:
        return f"k={k}; it takes k up to {LARGEST_K}"
    return None


def top_k(scores: jax.Array, k: int, *, lengths: jax.Array | None = None, backend: str = "auto") -> jax.Array:
    """Returns positions of the k largest scores of each row; equal scores go to the lowest position, always.

    Args:
      scores: float32 [T, L]; -inf and NaN are never chosen; -0 equals 0. The kernel copies scores whose L is not a
        multiple of 256.
      k: how many, at least 1.
      lengths: int32 [T]: only scores[t, :lengths[t]] exist, and what lies beyond may be anything; all L if None.
      backend: "auto", "mosaic_gpu", "reference" or "interpret" (see `pallas_kernels.backend`).

    Returns:
      int32 [T, k]: the chosen positions first, then -1 where a row has fewer than k that can be chosen. The order of
      the positions is not specified, but the same in each run.

    Raises:
      ValueError: other dtypes or ranks than these, k is no int or less than 1, or lengths are not one a row.
      BackendError: the kernel was asked for and does not take these arguments, or there is no such GPU.
    """
    check("top_k", scores=(scores, FLOAT32, "T L"))
    check_size("top_k", k=k)
    if lengths is not None:
        check("top_k", lengths=(lengths, INT32, "T"))
    if lengths is not None and lengths.shape != scores.shape[:-1]:
        raise ValueError(f"top_k needs a length for each row: {scores.shape[:-1]}, not {lengths.shape}")
    chosen = resolve(backend, "top_k", KERNEL, unsupported(scores.shape, scores.dtype, k))
    if chosen == "reference":
        return reference.top_k(scores, k, lengths)
    interpret = mosaic.interpret_on(chosen)
    kernel = functools.partial(mosaic_gpu.top_k, k=k, lengths=lengths, interpret=interpret)
    return launched(kernel, "top_k", chosen)(scores)
