"""Keys from raw projections, the cache's formats, and the scatter into them, in plain jax.numpy: the specification."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import rowwise
from pallas_kernels.paging import BLOCK_SIZE, split_slots
from pallas_kernels.quantize.reference import GROUP, dequantize, quantize


def record_bytes(latent_dim: int, rope_dim: int) -> int:
    """Bytes of one token's FP8 record: 656 for 512 + 64."""
    return latent_dim + 4 * (latent_dim // GROUP) + 2 * rope_dim


def index_block_bytes(index_dim: int) -> int:
    """Bytes of a block of FP8 index keys: 8448 for 128."""
    return BLOCK_SIZE * (index_dim + 4)


def to_bytes(x: jax.Array) -> jax.Array:
    """[..., N] of any dtype -> uint8 [..., N * itemsize], little-endian."""
    return jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(*x.shape[:-1], -1)


def from_bytes(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The inverse of `to_bytes`."""
    size = jnp.dtype(dtype).itemsize
    return jax.lax.bitcast_convert_type(x if size == 1 else x.reshape(*x.shape[:-1], -1, size), dtype)


def pack_latents(latent: jax.Array, rope_key: jax.Array, scale_fmt: str | None) -> jax.Array:
    """[..., latent], [..., rope] -> uint8 [..., record]."""
    values, scales = quantize(latent, scale_fmt, GROUP)
    return jnp.concatenate([to_bytes(values), to_bytes(scales), to_bytes(rope_key.astype(jnp.bfloat16))], axis=-1)


def unpack_latents(rows: jax.Array, rope_dim: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rows of the cache in either form -> [..., latent + rope] in `dtype`."""
    if rows.dtype != jnp.uint8:
        return rows.astype(dtype)
    latent_dim = (rows.shape[-1] - 2 * rope_dim) * GROUP // (GROUP + 4)
    values, scales, rope_key = jnp.split(rows, [latent_dim, rows.shape[-1] - 2 * rope_dim], axis=-1)
    latent = dequantize(from_bytes(values, jnp.float8_e4m3fn), from_bytes(scales, jnp.float32), dtype)
    return jnp.concatenate([latent, from_bytes(rope_key, jnp.bfloat16).astype(dtype)], axis=-1)


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
    quantize_latent: bool,
    scale_fmt: str | None,
    norm: rowwise.Norm = rowwise.rms_norm,
    rope: rowwise.Rotation = rowwise.rope_interleaved,
) -> tuple[jax.Array, jax.Array]:
    """Raw projections [T, latent + rope] -> latent [T, latent] after its norm and rope key [T, rope], rotated.

    Args:
      kv_a: float [T, latent + rope].
      weight: [latent], of the RMSNorm.
      eps: of the RMSNorm.
      angles: cos and sin, float32 [T, rope / 2].
      quantize_latent: round the latent to what FP8 in groups of 128 can hold.
      scale_fmt: of that, see `quantize`.
      norm, rope: in place of the RMSNorm and of the rotation.
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
) -> jax.Array:
    """Raw index keys [T, dim] -> after LayerNorm, rotation of their first features, and Hadamard; arguments alike."""
    return rowwise.hadamard(rowwise.rope_leading(rowwise.layer_norm(index_key, weight, bias, eps), *angles, rope))


def cache_write(kv, index, layer, slots, kv_a, index_key, norms, angles, quantize_latent, scale_fmt):
    latent, rope_key = latents(kv_a, norms.latent_weight, norms.latent_eps, angles, quantize_latent, scale_fmt)
    index_key = index_keys(index_key, norms.index_weight, norms.index_bias, norms.index_eps, angles)
    return scatter(kv, index, layer, slots, latent, rope_key, index_key, scale_fmt)


def rows_of(latent, rope_key, dtype, scale_fmt):
    """[T, latent] and [T, rope] as the cache's rows of `dtype`."""
    if dtype == jnp.uint8:
        return pack_latents(latent, rope_key, scale_fmt)
    return jnp.concatenate([latent, rope_key], axis=-1).astype(dtype)


def scatter(
    kv: jax.Array,
    index: jax.Array,
    layer: int | jax.Array,
    slots: jax.Array,
    latent: jax.Array,
    rope_key: jax.Array,
    index_key: jax.Array,
    scale_fmt: str | None = "ue8m0",
) -> tuple[jax.Array, jax.Array]:
    """`cache_write` of finished values: latent [T, latent], rope key [T, rope] and index key [T, dim]."""
    block, offset = split_slots(slots, kv.shape[1])
    kv = kv.at[layer, block, offset].set(rows_of(latent, rope_key, kv.dtype, scale_fmt), mode="drop")
    if index.dtype != jnp.uint8:
        return kv, index.at[layer, block, offset].set(index_key.astype(index.dtype), mode="drop")
    dim = index_key.shape[-1]
    values, scales = quantize(index_key, scale_fmt, dim)
    where = offset[:, None]
    value_at = where * dim + jnp.arange(dim)
    scale_at = BLOCK_SIZE * dim + where * 4 + jnp.arange(4)
    index = index.at[layer, block[:, None], value_at].set(to_bytes(values), mode="drop")
    return kv, index.at[layer, block[:, None], scale_at].set(to_bytes(scales), mode="drop")


def read_latents(
    kv: jax.Array, layer: int, block_tables: jax.Array, rope_dim: int, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """One layer's rows of whole sequences: [S, N * 64, latent + rope] by block tables int32 [S, N]."""
    rows = unpack_latents(kv[layer, block_tables], rope_dim, dtype)
    return rows.reshape(block_tables.shape[0], -1, rows.shape[-1])


def read_index_keys(index: jax.Array, layer: int, block_tables: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """One layer's index keys [S, N * 64, dim] and, in the FP8 form, their scales float32 [S, N * 64]."""
    blocks = index[layer, block_tables]
    sequences = block_tables.shape[0]
    if index.dtype != jnp.uint8:
        return blocks.reshape(sequences, -1, blocks.shape[-1]), None
    dim = blocks.shape[-1] // BLOCK_SIZE - 4
    values, scales = jnp.split(blocks, [BLOCK_SIZE * dim], axis=-1)
    keys = from_bytes(values, jnp.float8_e4m3fn).reshape(sequences, -1, dim)
    return keys, from_bytes(scales, jnp.float32).reshape(sequences, -1)
