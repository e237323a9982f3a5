"""Multi-head latent attention over the keys that the indexer chose (DSA), or over all of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsv32_jax.config import ModelConfig
from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.context import StepContext
from dsv32_jax.model.indexer import LAYER_NORM_EPS, Indexer
from dsv32_jax.model.numerics import Numerics
from dsv32_jax.model.params import Init
from pallas_kernels.cache_format import read_latents, store_keys
from pallas_kernels.cache_write import KeyNorms, latents
from pallas_kernels.chunking import CHUNK_BYTES, map_tokens
from pallas_kernels.matmul import dense
from pallas_kernels.paging import physical_slots
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

    def __call__(
        self, x: jax.Array, layer: int, cache: KVCache, ctx: StepContext, chosen: jax.Array | None = None
    ) -> tuple[jax.Array, KVCache, jax.Array | None]:
        """Attention of the step's tokens, whose own keys enter the cache first.

        Args:
          x: [T, D], normalised.
          layer: index into the cache.
          cache: the block cache.
          ctx: batch, angles and options of the step.
          chosen: int32 [T, K], what the layer before attended to, for a layer that does not choose (`ctx.chooses`).

        Returns:
          [T, D], the cache, and what this layer attended to; None where that is everything.
        """
        q_a, kv_a, index_key = self.project(x, ctx)
        q_latent, q_nope, q_rope = self.queries(q_a, ctx.angles, ctx.config, ctx.numerics)
        cache = self.write(kv_a, index_key, layer, cache, ctx)

        def weights() -> jax.Array:
            queries = self.absorbed_queries(q_nope, q_rope, ctx)
            return self.attend_to_all(queries, layer, cache, ctx, mean_probabilities=True)

        def select() -> jax.Array:
            return self.select(x, q_latent, weights, layer, cache, ctx)

        if ctx.options.attention == "dense":
            chosen = None
        elif ctx.chooses(layer):
            chosen = select()
        else:
            ctx.seams.tap("index_scores", lambda: self.index_scores(x, q_latent, layer, cache, ctx))
        if chosen is None:
            ctx.seams.tap("topk", select)
        else:
            chosen = ctx.seams.value("topk", chosen)
        ctx.seams.tap("attention", weights)
        attend_in = self.absorbed if ctx.options.absorb else self.unabsorbed
        out = attend_in(q_nope, q_rope, chosen, layer, cache, ctx)
        return ctx.numerics.matmul(out.reshape(x.shape[0], -1), self.o, "o"), cache, chosen

    def project(self, x: jax.Array, ctx: StepContext) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [T, D], normalised, by q_a [T, q_lora_rank], by kv_a [T, latent + rope], by the indexer's k [T, dim]."""
        numerics = ctx.numerics
        q_a, kv_a = numerics.matmul(x, self.q_a, "q_a"), numerics.matmul(x, self.kv_a, "kv_a")
        return q_a, kv_a, numerics.matmul(x, self.indexer.k, "indexer.k")

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
        latent = numerics.rms_norm(q_a, self.q_a_norm, config.rms_norm_eps)
        q = numerics.matmul(latent, self.q_b, "q_b").reshape(-1, config.num_attention_heads, config.qk_head_dim)
        nope, rope = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
        return latent, nope, numerics.rope(rope, *angles)

    def latents(
        self, kv_a: jax.Array, angles: tuple[jax.Array, jax.Array], config: ModelConfig, numerics: Numerics
    ) -> tuple[jax.Array, jax.Array]:
        """What the cache holds of kv_a [T, latent + R]: latent, normalised, and rotated rope key [T, R]."""
        return latents(
            kv_a,
            self.kv_a_norm,
            config.rms_norm_eps,
            angles,
            numerics.act_quant,
            numerics.scale_fmt,
            norm=numerics.rms_norm,
            rope=numerics.rope,
        )

    def write(self, kv_a: jax.Array, index_key: jax.Array, layer: int, cache: KVCache, ctx: StepContext) -> KVCache:
        """Latents, rope keys and index keys of the step's tokens, into their slots; arguments are `project`'s."""
        numerics, indexer, slots = ctx.numerics, self.indexer, ctx.batch.slots
        if ctx.seams.composes("cache_write"):
            index_key = indexer.rotated(index_key, ctx.angles, numerics)
            latent, rope_key = self.latents(kv_a, ctx.angles, ctx.config, numerics)
            arrays = (cache.kv, cache.index, layer, slots, latent, rope_key, index_key)
            return KVCache(*store_keys(*arrays, scale_fmt=numerics.scale_fmt))
        kv, index = ctx.seams.call(
            "cache_write",
            cache.kv,
            cache.index,
            layer,
            slots,
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
        self,
        x: jax.Array,
        q_latent: jax.Array,
        weights: Callable[[], jax.Array],
        layer: int,
        cache: KVCache,
        ctx: StepContext,
    ) -> jax.Array:
        """Logical positions int32 [T, K] that each token attends to.

        In any order, but each at most once, none after the token's own, and -1 for none only behind all others: the
        first -1 ends a row. `Options(check=True)` checks that of a replaced part, see `checks.check_selection`.
        """
        batch, seams, backend = ctx.batch, ctx.seams, ctx.numerics.backend
        arrays = self.index_arrays(x, q_latent, layer, cache, ctx)
        k = min(ctx.options.index_topk or ctx.config.index_topk, ctx.context_length)

        def scores() -> jax.Array:
            return seams.call("indexer_logits", *arrays, backend=backend)

        if seams.composes("index_select", patched="index_scores"):
            scored = seams.value("index_scores", scores())
            return seams.call("top_k", scored, k, lengths=batch.positions + 1, backend=backend)
        seams.tap("index_scores", scores)
        extras = {"x": lambda: x, "attention": weights}
        return seams.call("index_select", *arrays, k=k, backend=backend, extras=extras)

    def index_arrays(
        self, x: jax.Array, q_latent: jax.Array, layer: int, cache: KVCache, ctx: StepContext
    ) -> tuple[Any, ...]:
        """The positional arguments of `indexer_logits` and `index_select`."""
        batch = ctx.batch
        with ctx.seams.scope("indexer"):
            queries, head_weights = self.indexer.queries(x, q_latent, ctx.angles, ctx.config, ctx.numerics)
        return queries, head_weights, cache.index, layer, batch.block_tables, batch.sequence, batch.positions

    def index_scores(
        self, x: jax.Array, q_latent: jax.Array, layer: int, cache: KVCache, ctx: StepContext
    ) -> jax.Array:
        """The indexer's scores, float32 [T, L]."""
        arrays = self.index_arrays(x, q_latent, layer, cache, ctx)
        return ctx.seams.call("indexer_logits", *arrays, backend=ctx.numerics.backend)

    def absorbed_queries(self, q_nope: jax.Array, q_rope: jax.Array, ctx: StepContext) -> jax.Array:
        """Queries in the latent space, [T, H, latent + rope], for which the cache's rows are keys and values."""
        to_latent, _ = self.head_maps(ctx.config, q_nope.dtype)
        return jnp.concatenate([ctx.einsum("thn,hnc->thc", q_nope, to_latent), q_rope], axis=-1)

    def attend_to_all(
        self, queries: jax.Array, layer: int, cache: KVCache, ctx: StepContext, mean_probabilities: bool = False
    ) -> jax.Array:
        """[T, H, latent] of absorbed queries over their whole sequences; or the probabilities' mean, float32 [T, L]."""
        config = ctx.config
        return ctx.seams.call(
            "dense_mla",
            queries,
            *self.context(layer, cache, ctx),
            scale=config.softmax_scale,
            rope_dim=config.qk_rope_head_dim,
            chunk_bytes=CHUNK_BYTES,
            mean_probabilities=mean_probabilities,
        )

    def absorbed(self, q_nope, q_rope, chosen, layer: int, cache: KVCache, ctx: StepContext) -> jax.Array:
        """Attention in the latent space: [T, H, v_head_dim]."""
        config, batch = ctx.config, ctx.batch
        queries = self.absorbed_queries(q_nope, q_rope, ctx)
        if chosen is None:
            out = self.attend_to_all(queries, layer, cache, ctx)
        else:
            slots = physical_slots(chosen, batch.sequence, batch.block_tables)
            out, _ = ctx.seams.call(
                "sparse_mla",
                queries,
                cache.kv,
                layer,
                slots,
                scale=config.softmax_scale,
                rope_dim=config.qk_rope_head_dim,
                lengths=(slots >= 0).sum(-1, dtype=jnp.int32),  # those come first, by the contract of `select`
                backend=ctx.numerics.backend,
            )
        _, to_value = self.head_maps(config, q_nope.dtype)
        return ctx.einsum("thc,hvc->thv", out, to_value)

    def unabsorbed(self, q_nope, q_rope, chosen, layer: int, cache: KVCache, ctx: StepContext) -> jax.Array:
        """Attention with every head's own keys and values, expanded from the latents: [T, H, v_head_dim]."""
        config = ctx.config
        rows, sequence, positions = self.context(layer, cache, ctx)
        latent, rope_key = jnp.split(rows, [config.kv_lora_rank], axis=-1)
        heads, length = config.num_attention_heads, rows.shape[1]
        expanded = ctx.numerics.matmul(latent.reshape(-1, config.kv_lora_rank), self.kv_b, "kv_b")
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
