"""The bytes of the block cache: how latent rows and index keys lie in it, how they are packed, stored and read.

A token has, in each layer, one latent row and one index key. Both exist in a plain form and in an FP8 form:

  latent row    float [latent + rope]; or a record of bytes, uint8 [record]: latent e4m3 values, latent / 128 float32
                scales, and rope bfloat16 numbers (656 bytes for 512 + 64: the layout of FlashMLA);
  index key     float [dim]; or, for a block of 64 tokens, uint8 [64 * (dim + 4)]: 64 x dim e4m3 values, then 64 float32
                scales (the layout of DeepGEMM).

The cache holds all layers and blocks: kv [layers, blocks, 64, latent + rope or record], and index [layers, blocks, 64,
dim] or [layers, blocks, 64 * (dim + 4)]. A slot is block * 64 + offset.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.paging import BLOCK_SIZE, split_slots
from pallas_kernels.quantize.reference import GROUP, dequantize, quantize

# ---- sizes ---------------------------------------------------------------------------------------------------------


def record_bytes(latent_dim: int, rope_dim: int) -> int:
    """Bytes of one token's FP8 record: 656 for 512 + 64."""
    return latent_dim + 4 * (latent_dim // GROUP) + 2 * rope_dim


def index_block_bytes(index_dim: int) -> int:
    """Bytes of a block of FP8 index keys: 8448 for 128."""
    return BLOCK_SIZE * (index_dim + 4)


# ---- packing -------------------------------------------------------------------------------------------------------


def to_bytes(x: jax.Array) -> jax.Array:
    """[..., N] of any dtype -> uint8 [..., N * itemsize], little-endian."""
    return jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(*x.shape[:-1], -1)


def from_bytes(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns the inverse of `to_bytes`."""
    size = jnp.dtype(dtype).itemsize
    return jax.lax.bitcast_convert_type(x if size == 1 else x.reshape(*x.shape[:-1], -1, size), dtype)


def pack_record(latent: jax.Array, rope_key: jax.Array, scale_fmt: str | None) -> jax.Array:
    """Latent [..., latent] and rope key [..., rope] -> FP8 records uint8 [..., record]; `scale_fmt`: see `quantize`."""
    values, scales = quantize(latent, scale_fmt, GROUP)
    return jnp.concatenate([to_bytes(values), to_bytes(scales), to_bytes(rope_key.astype(jnp.bfloat16))], axis=-1)


def pack_rows(
    latent: jax.Array, rope_key: jax.Array, dtype: jax.typing.DTypeLike, scale_fmt: str | None = "ue8m0"
) -> jax.Array:
    """Latent [..., latent] and rope key [..., rope] -> rows of a cache of `dtype`; uint8 means FP8 records."""
    if dtype == jnp.uint8:
        return pack_record(latent, rope_key, scale_fmt)
    return jnp.concatenate([latent, rope_key], axis=-1).astype(dtype)


def unpack_rows(rows: jax.Array, rope_dim: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Unpacks rows of the cache, of either form, to [..., latent + rope] in `dtype`."""
    if rows.dtype != jnp.uint8:
        return rows.astype(dtype)
    latent_dim = (rows.shape[-1] - 2 * rope_dim) * GROUP // (GROUP + 4)
    values, scales, rope_key = jnp.split(rows, [latent_dim, rows.shape[-1] - 2 * rope_dim], axis=-1)
    latent = dequantize(from_bytes(values, jnp.float8_e4m3fn), from_bytes(scales, jnp.float32), dtype)
    return jnp.concatenate([latent, from_bytes(rope_key, jnp.bfloat16).astype(dtype)], axis=-1)


# ---- storing and reading -------------------------------------------------------------------------------------------


def store_keys(
    kv: jax.Array,
    index: jax.Array,
    layer: int | jax.Array,
    slots: jax.Array,
    latent: jax.Array,
    rope_key: jax.Array,
    index_key: jax.Array,
    scale_fmt: str | None = "ue8m0",
) -> tuple[jax.Array, jax.Array]:
    """Stores the finished keys of T tokens into their slots of one layer, quantised where the cache is FP8.

    Args:
      kv: the latent cache, all layers, in either form.
      index: the cache of index keys, all layers, in either form.
      layer: which layer.
      slots: int32 [T], each at most once; -1 stores nothing.
      latent: [T, latent], normalised.
      rope_key: [T, rope], rotated.
      index_key: [T, dim], normalised, rotated and transformed.
      scale_fmt: of FP8 scales, see `quantize`.

    Returns:
      kv and index with those slots written.
    """
    block, offset = split_slots(slots, kv.shape[1])
    kv = kv.at[layer, block, offset].set(pack_rows(latent, rope_key, kv.dtype, scale_fmt), mode="drop")
    if index.dtype != jnp.uint8:
        return kv, index.at[layer, block, offset].set(index_key.astype(index.dtype), mode="drop")
    dim = index_key.shape[-1]
    values, scales = quantize(index_key, scale_fmt, dim)
    key_in_block = offset[:, None]
    value_bytes = key_in_block * dim + jnp.arange(dim)
    scale_bytes = BLOCK_SIZE * dim + key_in_block * 4 + jnp.arange(4)
    index = index.at[layer, block[:, None], value_bytes].set(to_bytes(values), mode="drop")
    return kv, index.at[layer, block[:, None], scale_bytes].set(to_bytes(scales), mode="drop")


def read_latents(
    kv: jax.Array, layer: int, block_tables: jax.Array, rope_dim: int, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Reads one layer's rows of whole sequences: [S, N * 64, latent + rope] by block tables int32 [S, N]."""
    rows = unpack_rows(kv[layer, block_tables], rope_dim, dtype)
    return rows.reshape(block_tables.shape[0], -1, rows.shape[-1])


def read_index_keys(index: jax.Array, layer: int, block_tables: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Reads one layer's index keys [S, N * 64, dim] and, in the FP8 form, their scales float32 [S, N * 64]."""
    blocks = index[layer, block_tables]
    sequences = block_tables.shape[0]
    if index.dtype != jnp.uint8:
        return blocks.reshape(sequences, -1, blocks.shape[-1]), None
    dim = blocks.shape[-1] // BLOCK_SIZE - 4
    values, scales = jnp.split(blocks, [BLOCK_SIZE * dim], axis=-1)
    keys = from_bytes(values, jnp.float8_e4m3fn).reshape(sequences, -1, dim)
    return keys, from_bytes(scales, jnp.float32).reshape(sequences, -1)
