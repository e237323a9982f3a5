"""Angles of the rotary position embeddings, with YaRN's frequencies; the rotations are in `pallas_kernels.rowwise`."""

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
