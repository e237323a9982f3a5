"""Keys from raw projections into the cache, in plain jax.numpy: the specification.

`latents` and `index_keys` finish the keys, and `cache_format.store_keys` stores them. Each norm and each rotation can
be replaced by another function of the same signature.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import rowwise
from pallas_kernels.cache_format import store_keys
from pallas_kernels.quantize.reference import GROUP, dequantize, quantize


@dataclasses.dataclass(frozen=True)
class KeyNorms:
    """Parameters of the two norms that keys pass through.

    Attributes:
      latent_weight: [latent], of the RMSNorm.
      index_weight: [dim], of the index key's LayerNorm.
      index_bias: [dim].
      latent_eps: added to the mean square.
      index_eps: added to the variance.
    """

    latent_weight: jax.Array
    index_weight: jax.Array
    index_bias: jax.Array
    latent_eps: float
    index_eps: float


def latents(
    kv_a: jax.Array,
    weight: jax.Array,
    eps: float,
    angles: tuple[jax.Array, jax.Array],
    quantize_latent: bool = False,
    scale_fmt: str | None = "ue8m0",
    norm: rowwise.Norm = rowwise.rms_norm,
    rope: rowwise.Rotation = rowwise.rope_interleaved,
) -> tuple[jax.Array, jax.Array]:
    """Normalises the latents of raw projections and rotates their rope keys.

    Args:
      kv_a: float [T, latent + rope].
      weight: [latent], of the norm.
      eps: of the norm.
      angles: cos and sin, float32 [T, rope / 2].
      quantize_latent: round the latent to what FP8 in groups of 128 can hold.
      scale_fmt: of that, see `quantize`.
      norm: (latent [T, latent], weight, eps) -> [T, latent], in place of the RMSNorm.
      rope: of the rope key [T, rope], in place of the rotation of neighbours.

    Returns:
      latent [T, latent] and rope key [T, rope], in the dtype of `kv_a`.
    """
    latent, rope_key = jnp.split(kv_a, [weight.shape[0]], axis=-1)
    latent = norm(latent, weight, eps)
    if quantize_latent:
        latent = dequantize(*quantize(latent, scale_fmt, GROUP), latent.dtype)
    return latent, rope(rope_key, *angles)


def index_keys(
    index_key: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    eps: float,
    angles: tuple[jax.Array, jax.Array],
    rope: rowwise.Rotation = rowwise.rope_half_split,
    *,
    norm: Callable[[jax.Array, jax.Array, jax.Array, float], jax.Array] = rowwise.layer_norm,
) -> jax.Array:
    """Normalises raw index keys, rotates their first features, and applies the Hadamard transform.

    Args:
      index_key: float [T, dim].
      weight: [dim], of the norm.
      bias: [dim], of the norm.
      eps: of the norm.
      angles: cos and sin, float32 [T, rope / 2].
      rope: of the first `rope` features, in place of the rotation of halves.
      norm: (index_key, weight, bias, eps) -> [T, dim], in place of the LayerNorm.

    Returns:
      [T, dim] in the dtype of `index_key`.
    """
    return rowwise.hadamard(rowwise.rope_leading(norm(index_key, weight, bias, eps), *angles, rope))


def cache_write(kv, index, layer, slots, kv_a, index_key, norms, angles, quantize_latent, scale_fmt):
    latent, rope_key = latents(kv_a, norms.latent_weight, norms.latent_eps, angles, quantize_latent, scale_fmt)
    index_key = index_keys(index_key, norms.index_weight, norms.index_bias, norms.index_eps, angles)
    return store_keys(kv, index, layer, slots, latent, rope_key, index_key, scale_fmt)
