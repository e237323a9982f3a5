"""DeepSeek-V3.2: embedding, decoder layers, head, and the one step that prefills and decodes.

The step takes a flat batch of tokens, each with its position, its slot in the block cache and its sequence. A prompt,
one new token of many sequences, and any mixture of the two are shapes of one function.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsv32_jax.config import ModelConfig
from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.context import Batch, Options, StepContext
from dsv32_jax.model.mla import MLA
from dsv32_jax.model.mlp import MLP
from dsv32_jax.model.moe import MoE
from dsv32_jax.model.mtp import MTP
from dsv32_jax.model.params import Init
from dsv32_jax.model.products import float32_matmul
from dsv32_jax.model.seams import Seams
from dsv32_jax.model.sharding import over_mesh
from dsv32_jax.model.taps import Taps

__all__ = [
    "Batch",
    "DecoderLayer",
    "DeepseekV32",
    "Options",
    "StepContext",
    "abstract_model",
    "step",
    "tapped_layer",
    "tapped_step",
]


class DecoderLayer(nnx.Module):
    """Attention and feed-forward, each behind a norm of the residual stream."""

    def __init__(self, config: ModelConfig, init: Init, moe: bool):
        self.attn_norm = init.constant(1.0, config.hidden_size)
        self.attn = MLA(config, init)
        self.ffn_norm = init.constant(1.0, config.hidden_size)
        self.ffn = MoE(config, init) if moe else MLP(config.hidden_size, config.intermediate_size, init)

    def __call__(
        self,
        residual: jax.Array,
        update: jax.Array | None,
        layer: int,
        cache: KVCache,
        ctx: StepContext,
        chosen: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None, KVCache, jax.Array | None]:
        """One layer over the residual stream.

        Args:
          residual: [T, D].
          update: [T, D], still to be added to it: what the layer before computed; None before the first.
          layer: index into the cache.
          cache: the block cache.
          ctx: of the step.
          chosen: int32 [T, K], what the layer before attended to, see `MLA.__call__`.

        Returns:
          residual [T, D], this layer's own update [T, D] (None where their sum is patched), the cache, and what this
          layer attended to.
        """
        numerics, seams, eps = ctx.numerics, ctx.seams, ctx.config.rms_norm_eps
        residual, x = numerics.add_rms_norm(residual, update, self.attn_norm, eps)
        x = seams.value("attn.input", x)
        with seams.scope("attn"):
            update, cache, chosen = self.attn(x, layer, cache, ctx, chosen)
        residual, x = numerics.add_rms_norm(residual, update, self.ffn_norm, eps)
        x = seams.value("ffn.input", x)
        with seams.scope("ffn"):
            if isinstance(self.ffn, MoE):
                update = self.ffn(x, ctx.batch.positions, ctx.config, numerics, ctx.exchange)
            else:
                update = self.ffn(x, numerics)
        hidden = seams.value("hidden", lambda: residual + update)
        if seams.is_patched("hidden"):
            residual, update = hidden, None
        return residual, update, cache, chosen


class DeepseekV32(nnx.Module):
    """The parameters of the whole model; a pytree without other state.

    Paths are attribute paths ("layers.3.attn.q_a"); linear weights are [out, in], arrays or `QTensor`s.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        init = Init(config, rngs)
        self.config = config
        self.embed = init.matrix(config.vocab_size, config.hidden_size)
        self.layers = nnx.List(
            [DecoderLayer(config, init, config.is_moe(layer)) for layer in range(config.num_hidden_layers)]
        )
        self.norm = init.constant(1.0, config.hidden_size)
        self.head = init.matrix(config.vocab_size, config.hidden_size)
        self.mtp = MTP(config, init, DecoderLayer(config, init, moe=True)) if config.has_mtp else nnx.data(None)

    def __call__(
        self, batch: Batch, cache: KVCache, options: Options, seams: Seams | None = None
    ) -> tuple[jax.Array, KVCache]:
        """Logits float32 [R, V] of `batch.logit_rows`, and the cache; arguments are those of `states`."""
        seams = seams or options.seams()
        states, cache = self.states(batch, cache, options, seams)
        logits = self.logits(states, batch.logit_rows)
        seams.tap("logits", logits)
        return logits, cache

    def states(
        self, batch: Batch, cache: KVCache, options: Options, seams: Seams | None = None
    ) -> tuple[jax.Array, KVCache]:
        """[T, D] of all tokens after the final norm, from which logits come and MTP goes on; and the cache.

        Args:
          batch: the step's tokens.
          cache: of all layers.
          options: of the run.
          seams: parts of the options, and taps; without taps where None.

        Raises:
          UserError: a replaced part or a patch gives what it must not, or is not called.
        """
        ctx = StepContext(self.config, options, batch, seams or options.seams())
        with jax.named_scope("embedding"):
            residual, update, chosen = self.embed[batch.ids].astype(ctx.dtype), None, None
        residual = ctx.seams.value("embedded", residual)
        for index, layer in enumerate(self.layers):
            with ctx.seams.scope(f"layers.{index}"):
                residual, update, cache, chosen = layer(residual, update, index, cache, ctx, chosen)
        _, states = ctx.numerics.add_rms_norm(residual, update, self.norm, self.config.rms_norm_eps)
        states = ctx.seams.value("states", states)
        ctx.seams.check_all_called()
        return states, cache

    def logits(self, states: jax.Array, rows: jax.Array) -> jax.Array:
        """Logits float32 [R, V] of rows int32 [R] of `states`; -1 gives a row of zeros."""
        with jax.named_scope("head"):
            return float32_matmul(jnp.where(rows[:, None] >= 0, states[rows], 0), self.head)


def abstract_model(config: ModelConfig) -> DeepseekV32:
    """The model with `jax.ShapeDtypeStruct`s for parameters, in the checkpoint's storage types; takes no memory."""
    return jax.eval_shape(lambda: DeepseekV32(config, nnx.Rngs(0)))


@partial(jax.jit, static_argnames="options", donate_argnames="cache")
def step(model: DeepseekV32, batch: Batch, cache: KVCache, options: Options) -> tuple[jax.Array, KVCache]:
    """One step of the model, jitted; the cache is donated, that is updated in place.

    With `options.mesh` the batch and the cache are those of all devices, see `sharding.over_mesh`.

    Returns:
      logits float32 [R, V] of `batch.logit_rows`, and the cache.
    """

    def one_device(model: DeepseekV32, batch: Batch, cache: KVCache) -> tuple[jax.Array, KVCache]:
        return model(batch, cache, options)

    return over_mesh(one_device, options, model, batch, cache)


@partial(jax.jit, static_argnames=("options", "taps"), donate_argnames="cache")
def tapped_step(
    model: DeepseekV32,
    batch: Batch,
    cache: KVCache,
    options: Options,
    taps: Taps,
    operands: Mapping[str, jax.Array] | None = None,
) -> tuple[jax.Array, KVCache, dict[str, Any]]:
    """`step` that also returns what the taps ask for, by the values' names; operands are details of every value."""
    seams = options.seams(taps)
    seams.details.update(operands or {})
    logits, cache = model(batch, cache, options, seams)
    taps.check_all_met(seams.names)
    return logits, cache, seams.values


@partial(jax.jit, static_argnames=("layer", "options", "taps"), donate_argnames="cache")
def tapped_layer(
    model: DeepseekV32, layer: int, hidden: jax.Array, batch: Batch, cache: KVCache, options: Options, taps: Taps
) -> dict[str, Any]:
    """What the taps ask for of one layer alone, on a residual stream [T, D]."""
    ctx = StepContext(model.config, options, batch, options.seams(taps))
    with ctx.seams.scope(f"layers.{layer}"):
        model.layers[layer](hidden.astype(ctx.dtype), None, layer, cache, ctx)
    return ctx.seams.values
