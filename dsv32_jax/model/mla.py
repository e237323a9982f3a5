"""Multi-head latent attention over the keys that the indexer chose (DSA), or over all of them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsv32_jax.config import ModelConfig
from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.checks import check_selection
from dsv32_jax.model.context import StepContext
from dsv32_jax.model.indexer import LAYER_NORM_EPS, Indexer
from dsv32_jax.model.numerics import Numerics
from dsv32_jax.model.params import Init
from pallas_kernels import rowwise
from pallas_kernels.cache_write import KeyNorms, cache_write, latents, read_latents
from pallas_kernels.chunking import CHUNK_BYTES, map_tokens
from pallas_kernels.index_select import index_select
from pallas_kernels.indexer_logits import indexer_logits
from pallas_kernels.matmul import Weight, concatenated, dense
from pallas_kernels.paging import physical_slots
from pallas_kernels.sparse_mla import dense_mla, sparse_mla
from pallas_kernels.sparse_mla.reference import attend


class HeadMaps(NamedTuple):
    """`kv_b` as the absorbed form takes it.

    Attributes:
      to_latent: [H, nope, latent], of queries.
      to_value: [H, v, latent], of what attention gives.
    """

    to_latent: jax.Array
    to_value: jax.Array


class MLA(nnx.Module):
    """Attention with a latent cache (official `MLA`; V2 report, section 2.1; V3.2-Exp report, section 1).

    The cache holds one latent row and one rotated rope key a token, shared by all heads. In the absorbed form queries
    are mapped into the latent space, so that the rows themselves are keys and values; the unabsorbed form expands keys
    and values of every head, and is the specification.
    """

    def __init__(self, config: ModelConfig, init: Init):
        heads, rank = config.num_attention_heads, config.q_lora_rank
        self.q_a = init.linear(rank, config.hidden_size)
        self.q_a_norm = init.constant(1.0, rank)
        self.q_b = init.linear(heads * config.qk_head_dim, rank)
        self.kv_a = init.linear(config.latent_dim, config.hidden_size)
        self.kv_a_norm = init.constant(1.0, config.kv_lora_rank)
        self.kv_b = init.linear(heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank)
        self.o = init.linear(config.hidden_size, heads * config.v_head_dim)
        self.indexer = Indexer(config, init)
        self.joined: Weight | None = nnx.data(None)
        """q_a, the indexer's k and kv_a in one, which then are None: see `prepare`."""

    def prepare(self, config: ModelConfig, dtype: jax.typing.DTypeLike) -> None:
        """Rearranges weights for many steps in the absorbed form; results stay the same, bit for bit.

        `kv_b` becomes two plain arrays of `dtype`: a step would make those anew, quantised or not, in more time than
        its products with them take. The three small products with x become one: alone, none has work for more than a
        third of the multiprocessors.
        """
        self.kv_b = nnx.data(self.head_maps(config, dtype))
        joined = concatenated(self.q_a, self.indexer.k, self.kv_a)
        if joined is not None:
            self.joined = nnx.data(joined)
            self.q_a = self.kv_a = self.indexer.k = nnx.data(None)

    def __call__(
        self, x: jax.Array, layer: int, cache: KVCache, ctx: StepContext, record: dict | None = None
    ) -> tuple[jax.Array, KVCache]:
        """Attention of the step's tokens, whose own keys enter the cache first.

        Args:
          x: [T, D], normalised.
          layer: index into the cache.
          cache: the block cache.
          ctx: batch, angles and options of the step.
          record: where a trace is wanted, takes `topk` and what `fidelity` needs.

        Returns:
          [T, D] and the cache.
        """
        q_a, kv_a, index_key = self.project(x, ctx.config, ctx.numerics)
        q_latent, q_nope, q_rope = self.queries(q_a, ctx.angles, ctx.config, ctx.numerics)
        cache = self.write(kv_a, index_key, layer, cache, ctx)
        chosen = self.select(x, q_latent, layer, cache, ctx, record)
        if chosen is not None:
            check_selection(chosen, ctx.batch.positions, layer, ctx.options.debug)
        attend_in = self.absorbed if ctx.options.absorb else self.unabsorbed
        out = attend_in(q_nope, q_rope, chosen, layer, cache, ctx, record)
        return ctx.numerics.matmul(out.reshape(x.shape[0], -1), self.o), cache

    def project(self, x: jax.Array, config: ModelConfig, numerics: Numerics) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [T, D], normalised, by q_a [T, q_lora_rank], by kv_a [T, latent + rope], by the indexer's k [T, dim]."""
        if self.joined is None:
            q_a, kv_a, index_key = (numerics.matmul(x, weight) for weight in (self.q_a, self.kv_a, self.indexer.k))
            return q_a, kv_a, index_key
        rank = config.q_lora_rank
        q_a, index_key, kv_a = jnp.split(numerics.matmul(x, self.joined), [rank, rank + config.index_head_dim], axis=-1)
        return q_a, kv_a, index_key

    def queries(
        self, q_a: jax.Array, angles: tuple[jax.Array, jax.Array], config: ModelConfig, numerics: Numerics
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The query latent [T, q_lora_rank], normalised; every head's query, nope [T, H, N] and rotated rope [T, H, R].

        Args:
          q_a: [T, q_lora_rank], see `project`.
          angles: cos and sin of the tokens' positions.
          config: the model's.
          numerics: of the products.
        """
        latent = rowwise.rms_norm(q_a, self.q_a_norm, config.rms_norm_eps)
        q = numerics.matmul(latent, self.q_b).reshape(-1, config.num_attention_heads, config.qk_head_dim)
        nope, rope = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
        return latent, nope, rowwise.rope_interleaved(rope, *angles)

    def latents(
        self, kv_a: jax.Array, angles: tuple[jax.Array, jax.Array], config: ModelConfig, numerics: Numerics
    ) -> tuple[jax.Array, jax.Array]:
        """What the cache holds of kv_a [T, latent + R]: latent, normalised, and rotated rope key [T, R]."""
        eps = config.rms_norm_eps
        return latents(kv_a, self.kv_a_norm, eps, angles, numerics.act_quant, numerics.scale_fmt)

    def write(self, kv_a: jax.Array, index_key: jax.Array, layer: int, cache: KVCache, ctx: StepContext) -> KVCache:
        """Latents, rope keys and index keys of the step's tokens, into their slots; arguments are `project`'s."""
        numerics, indexer = ctx.numerics, self.indexer
        kv, index = cache_write(
            cache.kv,
            cache.index,
            layer,
            ctx.batch.slots,
            kv_a,
            index_key,
            KeyNorms(
                self.kv_a_norm, indexer.k_norm_weight, indexer.k_norm_bias, ctx.config.rms_norm_eps, LAYER_NORM_EPS
            ),
            ctx.angles,
            quantize_latent=numerics.act_quant,
            scale_fmt=numerics.scale_fmt,
            backend=numerics.backend,
        )
        return KVCache(kv, index)

    def select(
        self, x: jax.Array, q_latent: jax.Array, layer: int, cache: KVCache, ctx: StepContext, record: dict | None
    ) -> jax.Array | None:
        """Logical positions int32 [T, K] that each token attends to; None for dense attention.

        In any order, but each at most once, none after the token's own, and -1 for none only behind all others: the
        first -1 ends a row. `Options(debug=True)` checks that, see `checks.check_selection`.
        """
        if ctx.options.attention == "dense" and record is None:
            return None
        batch, numerics = ctx.batch, ctx.numerics
        queries, weights = self.indexer.queries(x, q_latent, ctx.angles, ctx.config, numerics)
        where = (queries, weights, cache.index, layer, batch.block_tables, batch.sequence, batch.positions)
        k = min(ctx.options.index_topk or ctx.config.index_topk, ctx.context_length)
        chosen = index_select(*where, k=k, backend=numerics.backend)
        if record is not None:
            record["topk"] = chosen
            record["index_scores"] = indexer_logits(*where, backend=numerics.backend)
        return chosen if ctx.options.attention == "sparse" else None

    def absorbed(self, q_nope, q_rope, chosen, layer: int, cache: KVCache, ctx: StepContext, record) -> jax.Array:
        """Attention in the latent space: [T, H, v_head_dim]."""
        config, batch = ctx.config, ctx.batch
        to_latent, to_value = self.head_maps(config, q_nope.dtype)
        q_latent = ctx.einsum("thn,hnc->thc", q_nope, to_latent)
        queries = jnp.concatenate([q_latent, q_rope], axis=-1)
        how = {"scale": config.softmax_scale, "rope_dim": config.qk_rope_head_dim}
        if record is not None:
            record["attention"] = dense_mla(
                queries, *self.context(layer, cache, ctx), **how, chunk_bytes=CHUNK_BYTES, mean_probabilities=True
            )
        if chosen is None:
            out = dense_mla(queries, *self.context(layer, cache, ctx), **how, chunk_bytes=CHUNK_BYTES)
        else:
            slots = physical_slots(chosen, batch.sequence, batch.block_tables)
            present = (slots >= 0).sum(-1, dtype=jnp.int32)  # those come first, by the contract of `select`
            out, _ = sparse_mla(queries, cache.kv, layer, slots, **how, lengths=present, backend=ctx.numerics.backend)
        return ctx.einsum("thc,hvc->thv", out, to_value)

    def unabsorbed(self, q_nope, q_rope, chosen, layer: int, cache: KVCache, ctx: StepContext, record) -> jax.Array:
        """Attention with every head's own keys and values, expanded from the latents: [T, H, v_head_dim]."""
        config = ctx.config
        rows, sequence, positions = self.context(layer, cache, ctx)
        latent, rope_key = jnp.split(rows, [config.kv_lora_rank], axis=-1)
        heads, length = config.num_attention_heads, rows.shape[1]
        expanded = ctx.numerics.matmul(latent.reshape(-1, config.kv_lora_rank), self.kv_b)
        expanded = expanded.reshape(-1, length, heads, config.qk_nope_head_dim + config.v_head_dim)
        k_nope, values = jnp.split(expanded, [config.qk_nope_head_dim], axis=-1)
        rope_key = jnp.broadcast_to(rope_key[:, :, None], (*k_nope.shape[:3], rope_key.shape[-1]))
        keys = jnp.concatenate([k_nope, rope_key], axis=-1)
        queries = jnp.concatenate([q_nope, q_rope], axis=-1)

        def one_token(token):
            query, row, position, allowed = token
            seen = jnp.arange(length) <= position
            if chosen is not None:
                mask = jnp.zeros(length, bool).at[jnp.where(allowed < 0, length, allowed)].set(True, mode="drop")
                seen = seen & mask

            def one_head(q, k, v):
                return attend(q[None], k, v, seen, config.softmax_scale)[0][0]

            return jax.vmap(one_head, in_axes=(0, 1, 1))(query, keys[row], values[row])

        tokens = (queries, sequence, positions, positions if chosen is None else chosen)
        return map_tokens(one_token, tokens, bytes_per_token=4 * length * heads * expanded.shape[-1])

    def head_maps(self, config: ModelConfig, dtype: jax.typing.DTypeLike) -> HeadMaps:
        """`kv_b` by heads, in `dtype`."""
        if isinstance(self.kv_b, HeadMaps):
            return self.kv_b
        kv_b = dense(self.kv_b, dtype).reshape(config.num_attention_heads, -1, config.kv_lora_rank)
        return HeadMaps(kv_b[:, : config.qk_nope_head_dim], kv_b[:, config.qk_nope_head_dim :])

    @staticmethod
    def context(layer: int, cache: KVCache, ctx: StepContext) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rows [S, L, latent + rope] of whole sequences, and each token's sequence and position.

        Rows past a sequence's end are zeroed: unused slots may hold anything, and 0 * NaN is NaN.
        """
        batch, config = ctx.batch, ctx.config
        rows = read_latents(cache.kv, layer, batch.block_tables, config.qk_rope_head_dim, ctx.dtype)
        lengths = jnp.zeros(rows.shape[0], jnp.int32).at[batch.sequence].max(batch.positions + 1)
        written = jnp.arange(rows.shape[1]) < lengths[:, None]
        return jnp.where(written[..., None], rows, 0), batch.sequence, batch.positions
