"""Writing new tokens' keys into the block cache, whose forms `pallas_kernels.cache_format` describes."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic
from pallas_kernels.arguments import FLOAT32, FLOATS, INT32, check, check_layer
from pallas_kernels.backend import KERNEL, launched, resolve, without_gradient
from pallas_kernels.cache_format import index_block_bytes, record_bytes
from pallas_kernels.cache_write import mosaic_gpu, reference
from pallas_kernels.cache_write.config import CONFIG
from pallas_kernels.cache_write.reference import KeyNorms, index_keys, latents
from pallas_kernels.operators import callable_package
from pallas_kernels.paging import BLOCK_SIZE
from pallas_kernels.quantize import SCALE_FORMATS

__all__ = ["KeyNorms", "cache_write", "index_keys", "latents"]

callable_package(__name__)


def check_dtypes(kv, index, slots, kv_a, index_key, norms: KeyNorms, angles) -> None:
    """Raises ValueError for arguments of `cache_write` that have other dtypes or ranks."""
    keys = "layers blocks bytes" if getattr(index, "dtype", None) == jnp.uint8 else "layers blocks 64 dim"
    cos, sin = angles
    check(
        "cache_write",
        kv=(kv, (*FLOATS, "uint8"), "layers blocks 64 row"),
        index=(index, (*FLOATS, "uint8"), keys),
        slots=(slots, INT32, "T"),
        kv_a=(kv_a, FLOATS, "T D"),
        index_key=(index_key, FLOATS, "T dim"),
        latent_weight=(norms.latent_weight, FLOATS, "latent"),
        index_weight=(norms.index_weight, FLOATS, "dim"),
        index_bias=(norms.index_bias, FLOATS, "dim"),
        cos=(cos, FLOAT32, "T rope/2"),
        sin=(sin, FLOAT32, "T rope/2"),
    )


def cache_write(
    kv: jax.Array,
    index: jax.Array,
    layer: int | jax.Array,
    slots: jax.Array,
    kv_a: jax.Array,
    index_key: jax.Array,
    norms: KeyNorms,
    angles: tuple[jax.Array, jax.Array],
    *,
    quantize_latent: bool = False,
    scale_fmt: str | None = "ue8m0",
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Writes one layer's keys of T tokens into their slots, from their raw projections: norms, rotations, FP8.

    The latent passes an RMSNorm, the rope key RoPE on neighbouring pairs; the index key a LayerNorm, RoPE on the halves
    of its first `rope` features, and a Hadamard transform. Each step ends in the projections' dtype.

    Args:
      kv: [layers, blocks, 64, latent + rope] float, or uint8 [layers, blocks, 64, record].
      index: [layers, blocks, 64, dim] float, or uint8 [layers, blocks, 64 * (dim + 4)].
      layer: which layer; an array does as well.
      slots: int32 [T], block * 64 + offset, each at most once; -1 writes nothing.
      kv_a: float [T, latent + rope].
      index_key: float [T, dim].
      norms: weights and eps of the two norms.
      angles: cos and sin of the tokens' positions, float32 [T, rope / 2].
      quantize_latent: round the latent to what FP8 in groups of 128 can hold before it is stored, in every form.
      scale_fmt: of FP8 scales, see `quantize`.
      backend: "auto", "mosaic_gpu", "interpret" or "reference". The kernel has no gradient.

    Returns:
      kv and index with those slots written (in place where the arrays are donated).

    Raises:
      ValueError: other dtypes than these, shapes do not go together, no such layer, or unknown `scale_fmt`.
      BackendError: the kernel was asked for and does not take these arguments, or there is no such GPU.
    """
    check_dtypes(kv, index, slots, kv_a, index_key, norms, angles)
    latent_dim, rope_dim, dim = norms.latent_weight.shape[0], 2 * angles[0].shape[1], index_key.shape[1]
    if kv_a.shape != (slots.shape[0], latent_dim + rope_dim):
        raise ValueError(
            f"kv_a of shape {kv_a.shape} is not [T, latent + rope] with {slots.shape[0]} slots, a latent weight of "
            f"{latent_dim} and a rope of {rope_dim}"
        )
    shapes = [array.shape for array in (index_key, norms.index_weight, norms.index_bias, *angles)]
    angle_shape = (slots.shape[0], rope_dim // 2)
    row = record_bytes(latent_dim, rope_dim) if kv.dtype == jnp.uint8 else latent_dim + rope_dim
    key = (index_block_bytes(dim),) if index.dtype == jnp.uint8 else (BLOCK_SIZE, dim)
    if kv.shape[2:] != (BLOCK_SIZE, row) or index.shape != (*kv.shape[:2], *key):
        raise ValueError(
            f"caches kv and index of shapes {kv.shape} and {index.shape} do not hold rows of {row} and keys of {dim}"
        )
    if shapes != [(slots.shape[0], dim), (dim,), (dim,), angle_shape, angle_shape]:
        raise ValueError(
            f"cache_write: index_key, index_weight, index_bias, cos and sin of shapes {shapes} are not [T, dim], "
            f"[dim], [dim] and twice [T, rope / 2] with {slots.shape[0]} slots"
        )
    if scale_fmt not in SCALE_FORMATS:
        raise ValueError(f"scale_fmt {scale_fmt!r} is unknown; it is one of {SCALE_FORMATS}")
    check_layer("cache_write", layer, kv.shape[0])
    unsupported = mosaic_gpu.unsupported(kv, index, kv_a, index_key, norms, angles)
    chosen = resolve(backend, "cache_write", KERNEL, unsupported)
    if slots.shape[0] == 0:
        return kv, index
    if chosen == "reference":
        return reference.cache_write(
            kv, index, layer, slots, kv_a, index_key, norms, angles, quantize_latent, scale_fmt
        )

    def kernel(*arrays: Any) -> tuple[jax.Array, jax.Array]:
        return mosaic_gpu.cache_write(
            *arrays,
            eps=(norms.latent_eps, norms.index_eps),
            quantize_latent=quantize_latent,
            scale_fmt=scale_fmt,
            config=CONFIG,
            interpret=mosaic.interpret_on(chosen),
        )

    layer = jnp.full((1,), layer, jnp.int32)
    weights = (norms.latent_weight, norms.index_weight, norms.index_bias)
    kernel = without_gradient(launched(kernel, "cache_write", chosen), "cache_write")
    return kernel(kv, index, layer, slots, (kv_a, index_key), weights, angles)
