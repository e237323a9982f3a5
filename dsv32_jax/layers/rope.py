"""Rotary position embeddings: YaRN's frequencies, and the two layouts that this model uses.

MLA pairs neighbours (interleaved), the indexer pairs the two halves. Weights are trained for one layout each: with the
wrong one nothing crashes, the indexer only selects worse tokens.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.config import ModelConfig


def yarn_frequencies(config: ModelConfig) -> np.ndarray:
    """Angle per position of each pair, float32 [qk_rope_head_dim / 2], the same at every context length.

    Source: `precompute_freqs_cis` in the official `inference/model.py`; YaRN, arXiv 2309.00071, section 3.2.
    """
    dim, base = config.qk_rope_head_dim, config.rope_theta
    frequencies = base ** -(np.arange(0, dim, 2) / dim)
    yarn = config.rope_scaling
    if yarn is None:
        return frequencies.astype(np.float32)

    def pair_with_turns(turns: float) -> float:
        """The (fractional) pair that turns this often over the original context."""
        return dim * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_with_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with_turns(yarn.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low if high > low else 0.001), 0, 1)
    return (frequencies * (1 - ramp) + frequencies / yarn.factor * ramp).astype(np.float32)


def rope_angles(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [T, qk_rope_head_dim / 2], of int32 positions [T]."""
    angles = positions.astype(jnp.float32)[:, None] * yarn_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


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
    rotated = rotate(*jnp.split(x, 2, axis=-1), cos, sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
