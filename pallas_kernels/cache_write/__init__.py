"""Writing new tokens into the block cache, and the cache's formats.

One token and layer is a latent row and an index key:

  latent row    float [latent + rope], or the FP8 record of bytes: latent x e4m3, latent / 128 x float32 scale,
                rope x bf16 (656 bytes for 512 + 64: the layout of FlashMLA);
  index key     float [dim], or, for a block of 64 tokens, 64 x dim e4m3 values and then 64 float32 scales (DeepGEMM).
"""

import jax

from pallas_kernels.backend import resolve
from pallas_kernels.cache_write import reference
from pallas_kernels.cache_write.reference import (
    index_block_bytes,
    read_index_keys,
    read_latents,
    record_bytes,
    unpack_latents,
)

__all__ = ["cache_write", "index_block_bytes", "read_index_keys", "read_latents", "record_bytes", "unpack_latents"]


def cache_write(
    kv: jax.Array,
    index: jax.Array,
    layer: int,
    slots: jax.Array,
    latent: jax.Array,
    rope_key: jax.Array,
    index_key: jax.Array,
    *,
    scale_fmt: str | None = "ue8m0",
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Scatters one layer's latents, rope keys and index keys of T tokens into their slots.

    Args:
      kv: [layers, blocks, 64, latent + rope] float, or uint8 [layers, blocks, 64, record].
      index: [layers, blocks, 64, dim] float, or uint8 [layers, blocks, 64 * (dim + 4)].
      layer: which layer.
      slots: int32 [T], block * 64 + offset; -1 writes nothing.
      latent: float [T, latent], after its norm.
      rope_key: float [T, rope], rotated.
      index_key: float [T, dim], after norm, rotation and Hadamard.
      scale_fmt: of FP8 scales, see `quantize`.
      backend: "auto" or "reference".

    Returns:
      kv and index with those slots written (in place where the arrays are donated).
    """
    resolve(backend, "cache_write")
    return reference.cache_write(kv, index, layer, slots, latent, rope_key, index_key, scale_fmt)
