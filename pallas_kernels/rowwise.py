"""Norms and rotations of rows, in plain jax.numpy, for the model and for the references of kernels that contain them.

Those of the model and of the references can be replaced: see `cache_write.reference`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Norm = Callable[[jax.Array, jax.Array, float], jax.Array]
"""Such as `rms_norm`, of x [..., D], weight [D] and eps."""
Rotation = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Such as `rope_half_split`, of x [T, ..., R], cos and sin [T, R / 2]."""

# ---- norms ---------------------------------------------------------------------------------------------------------


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


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / std * weight + bias over the last axis, in float32, cast to x's dtype (the indexer's key norm)."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    scaled = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return (scaled * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


# ---- rotary position embedding -------------------------------------------------------------------------------------
# MLA pairs neighbours (interleaved), the indexer pairs the two halves. Weights are trained for one layout each: with
# the wrong one nothing crashes, the indexer only selects worse tokens.


def rotate(first: jax.Array, second: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pairs (first, second) turned by their angles; [T, ..., R / 2] and [T, R / 2]."""
    shape = (cos.shape[0],) + (1,) * (first.ndim - 2) + (cos.shape[1],)
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    return first * cos - second * sin, first * sin + second * cos


def rope_interleaved(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Pair i is (x[2i], x[2i + 1]): MLA. x is [T, ..., R]; float32 inside, x's dtype out."""
    rotated = rotate(x[..., 0::2], x[..., 1::2], cos, sin)
    return jnp.stack(rotated, axis=-1).reshape(x.shape).astype(x.dtype)


def rope_half_split(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Pair i is (x[i], x[i + R / 2]): the indexer. x is [T, ..., R]; float32 inside, x's dtype out."""
    first, second = jnp.split(x, 2, axis=-1)
    rotated = rotate(first, second, cos, sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def rope_leading(x: jax.Array, cos: jax.Array, sin: jax.Array, rope: Rotation = rope_half_split) -> jax.Array:
    """Rotates the first R features of x [T, ..., D] by `rope`: index queries and keys, where MLA has them last."""
    leading, rest = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
    return jnp.concatenate([rope(leading, cos, sin), rest], axis=-1)


# ---- Hadamard ------------------------------------------------------------------------------------------------------


def hadamard_matrix(dim: int) -> np.ndarray:
    """Sylvester's matrix H[i, j] = (-1)^popcount(i & j) over sqrt(dim), float32 [dim, dim]: symmetric, orthonormal."""
    bits = np.arange(dim)[:, None] & np.arange(dim)
    signs = 1 - 2 * (np.bitwise_count(bits) % 2).astype(np.float32)
    return signs / np.sqrt(np.float32(dim))


def hadamard(x: jax.Array) -> jax.Array:
    """x [..., D] rotated: changes no dot product, but spreads outliers before FP8; float32 inside, x's dtype out."""
    rotated = jnp.matmul(
        x, hadamard_matrix(x.shape[-1]).astype(x.dtype), precision="highest", preferred_element_type=jnp.float32
    )
    return rotated.astype(x.dtype)
