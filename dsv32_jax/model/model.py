"""DeepSeek-V3.2: embedding, decoder layers, head, and the one step that prefills and decodes.

The step takes a flat batch of tokens, each with its position, its slot in the block cache and its sequence. A prompt,
one new token of many sequences, and any mixture of the two are shapes of one function.
"""

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
from dsv32_jax.model.norm import add_rms_norm
from dsv32_jax.model.numerics import float32_matmul
from dsv32_jax.model.params import Init

__all__ = [
    "Batch",
    "DecoderLayer",
    "DeepseekV32",
    "Options",
    "StepContext",
    "abstract_model",
    "prepared",
    "run_layer",
    "step",
    "step_with_trace",
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
        record: dict | None = None,
    ) -> tuple[jax.Array, jax.Array, KVCache]:
        """One layer over the residual stream.

        Args:
          residual: [T, D].
          update: [T, D], still to be added to it: what the layer before computed; None before the first.
          layer: index into the cache.
          cache: the block cache.
          ctx: of the step.
          record: takes what a trace holds of this layer.

        Returns:
          residual [T, D], this layer's own update [T, D], and the cache.
        """
        eps = ctx.config.rms_norm_eps
        residual, x = add_rms_norm(residual, update, self.attn_norm, eps)
        update, cache = self.attn(x, layer, cache, ctx, record)
        residual, x = add_rms_norm(residual, update, self.ffn_norm, eps)
        if isinstance(self.ffn, MoE):
            return residual, self.ffn(x, ctx.batch.positions >= 0, ctx.config, ctx.numerics, record), cache
        return residual, self.ffn(x, ctx.numerics), cache


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
        self, batch: Batch, cache: KVCache, options: Options, trace: dict | None = None
    ) -> tuple[jax.Array, KVCache]:
        """Logits float32 [R, V] of `batch.logit_rows`, and the cache. `trace` takes a list of records, one a layer."""
        states, cache = self.states(batch, cache, options, trace)
        return self.logits(states, batch.logit_rows), cache

    def states(
        self, batch: Batch, cache: KVCache, options: Options, trace: dict | None = None
    ) -> tuple[jax.Array, KVCache]:
        """[T, D] of all tokens after the final norm, from which logits come and MTP goes on; and the cache."""
        ctx = StepContext(self.config, options, batch)
        residual, update = self.embed[batch.ids].astype(ctx.dtype), None
        records = []
        for index, layer in enumerate(self.layers):
            record: dict | None = None if trace is None else {}
            residual, update, cache = layer(residual, update, index, cache, ctx, record)
            if record is not None:
                records.append(record | {"hidden": residual + update})
        if trace is not None:
            trace.update(embedded=self.embed[batch.ids].astype(ctx.dtype), layers=records)
        return add_rms_norm(residual, update, self.norm, self.config.rms_norm_eps)[1], cache

    def logits(self, states: jax.Array, rows: jax.Array) -> jax.Array:
        """Logits float32 [R, V] of rows int32 [R] of `states`; -1 gives a row of zeros."""
        return float32_matmul(jnp.where(rows[:, None] >= 0, states[rows], 0), self.head)


def abstract_model(config: ModelConfig) -> DeepseekV32:
    """The model with `jax.ShapeDtypeStruct`s for parameters, in the checkpoint's storage types; takes no memory."""
    return jax.eval_shape(lambda: DeepseekV32(config, nnx.Rngs(0)))


def prepared(model: DeepseekV32, options: Options) -> DeepseekV32:
    """The model as many steps with these options take it: with kernels, after `MLA.prepare`; else as it is.

    The price is memory for what is rearranged: `kv_b` in the compute dtype, and another copy of three small weights.
    """
    if not (options.absorb and options.runs_kernels):
        return model
    model = jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(model))  # other modules, the same arrays
    layers: list[Any] = [*model.layers, *([model.mtp.layer] if model.mtp else [])]
    for layer in layers:
        layer.attn.prepare(model.config, options.compute_dtype)
    return model


@partial(jax.jit, static_argnames="options", donate_argnames="cache")
def step(model: DeepseekV32, batch: Batch, cache: KVCache, options: Options) -> tuple[jax.Array, KVCache]:
    """One step of the model, jitted; the cache is donated, that is updated in place.

    Returns:
      logits float32 [R, V] of `batch.logit_rows`, and the cache.
    """
    return model(batch, cache, options)


@partial(jax.jit, static_argnames="options", donate_argnames="cache")
def step_with_trace(
    model: DeepseekV32, batch: Batch, cache: KVCache, options: Options
) -> tuple[jax.Array, KVCache, dict]:
    """`step` that also returns what every layer did: see `dsv32_jax.fidelity`."""
    trace: dict = {}
    logits, cache = model(batch, cache, options, trace)
    return logits, cache, trace


@partial(jax.jit, static_argnames=("layer", "options"), donate_argnames="cache")
def run_layer(
    model: DeepseekV32, layer: int, hidden: jax.Array, batch: Batch, cache: KVCache, options: Options
) -> tuple[jax.Array, KVCache, dict]:
    """One layer alone, on a given residual stream [T, D]: the stream after it, the cache, the layer's record."""
    ctx = StepContext(model.config, options, batch)
    record: dict = {}
    residual, update, cache = model.layers[layer](hidden.astype(ctx.dtype), None, layer, cache, ctx, record)
    return residual + update, cache, record | {"hidden": residual + update}
