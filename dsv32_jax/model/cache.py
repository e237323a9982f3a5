"""The block cache: preallocated arrays of all layers, updated in place by the donated step."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dsv32_jax.config import ModelConfig
from pallas_kernels.cache_format import index_block_bytes, record_bytes
from pallas_kernels.paging import BLOCK_SIZE

__all__ = ["BLOCK_SIZE", "FORMS", "KVCache"]

FORMS = ("float32", "bfloat16", "fp8")
"""Forms of the latent rows: plain, or the FP8 record (656 bytes for the real widths)."""


@partial(jax.tree_util.register_dataclass, data_fields=["kv", "index"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Latent rows and index keys of every layer and block; formats in `pallas_kernels.cache_format`.

    Attributes:
      kv: [layers, blocks, 64, latent + rope], or uint8 [layers, blocks, 64, record bytes].
      index: [layers, blocks, 64, index dim], or uint8 [layers, blocks, 64 * (index dim + 4)].
    """

    kv: jax.Array
    index: jax.Array

    @staticmethod
    def shapes(
        config: ModelConfig, num_blocks: int, form: str, fp8_index: bool, layers: int | None = None
    ) -> "KVCache":
        """The abstract cache, before any memory is taken.

        Args:
          config: the model's.
          num_blocks: blocks of 64 tokens.
          form: one of `FORMS`, for the latent rows; index keys that are not FP8 take it too ("fp8": bfloat16).
          fp8_index: index keys in FP8, as the official code has them; else in the rows' dtype.
          layers: how many; the model's without its MTP layer where None.

        Raises:
          ValueError: unknown form.
        """
        if form not in FORMS:
            raise ValueError(f"cache form {form!r} is unknown; it is one of {', '.join(FORMS)}")
        lead = (config.num_hidden_layers if layers is None else layers, num_blocks)
        dtype = jnp.bfloat16 if form == "fp8" else jnp.dtype(form)
        if form == "fp8":
            record = record_bytes(config.kv_lora_rank, config.qk_rope_head_dim)
            kv = jax.ShapeDtypeStruct((*lead, BLOCK_SIZE, record), jnp.uint8)
        else:
            kv = jax.ShapeDtypeStruct((*lead, BLOCK_SIZE, config.latent_dim), dtype)
        if fp8_index:
            index = jax.ShapeDtypeStruct((*lead, index_block_bytes(config.index_head_dim)), jnp.uint8)
        else:
            index = jax.ShapeDtypeStruct((*lead, BLOCK_SIZE, config.index_head_dim), dtype)
        return KVCache(kv, index)  # type: ignore[arg-type]

    @staticmethod
    def create(config: ModelConfig, num_blocks: int, options: Any, layers: int | None = None) -> "KVCache":
        """A cache of zeros in the form that `options` (a `dsv32_jax.model.context.Options`) asks for."""
        shapes = KVCache.shapes(config, num_blocks, options.cache_form, options.act_quant, layers)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    @staticmethod
    def bytes_per_token(config: ModelConfig, form: str, fp8_index: bool, layers: int | None = None) -> int:
        """Bytes of one token in all layers: 48,068 for the 671B model in FP8, 78,324 in bfloat16; see `shapes`."""
        shapes = KVCache.shapes(config, 1, form, fp8_index, layers)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)) // BLOCK_SIZE

    def copy_blocks(self, sources: jax.Array, targets: jax.Array) -> "KVCache":
        """The cache with some blocks, of all layers, written over with others.

        Args:
          sources: int32 [C], blocks to be read.
          targets: int32 [C], different blocks to be written, none of them a source; -1 where there is none.
        """
        written = jnp.where(targets < 0, self.num_blocks, targets)  # past the end: dropped

        def copy(array: jax.Array) -> jax.Array:
            return array.at[:, written].set(array[:, jnp.maximum(sources, 0)], mode="drop")

        return jax.tree.map(copy, self)

    @property
    def num_blocks(self) -> int:
        """Blocks of 64 tokens."""
        return self.kv.shape[1]
