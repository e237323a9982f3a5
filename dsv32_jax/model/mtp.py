"""Multi-token prediction: one more decoder layer that predicts the token after the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from dsv32_jax.config import ModelConfig
from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.context import StepContext
from dsv32_jax.model.params import Init
from dsv32_jax.model.products import float32_matmul

if TYPE_CHECKING:
    from dsv32_jax.model.model import DecoderLayer


class MTP(nnx.Module):
    """V3 report, section 2.2, as V3's README_WEIGHTS lays it out (HF layer `num_hidden_layers`)."""

    def __init__(self, config: ModelConfig, init: Init, layer: DecoderLayer):
        hidden = config.hidden_size
        self.embed = init.matrix(config.vocab_size, hidden)
        self.enorm = init.constant(1.0, hidden)
        self.hnorm = init.constant(1.0, hidden)
        self.eh_proj = init.matrix(hidden, 2 * hidden)
        self.layer = layer
        self.norm = init.constant(1.0, hidden)
        self.head = init.matrix(config.vocab_size, hidden)

    def __call__(
        self,
        hidden: jax.Array,
        next_ids: jax.Array,
        cache: KVCache,
        ctx: StepContext,
        rows: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Logits float32 [T, V] of token t + 2, or [R, V] of some rows, and the cache.

        Args:
          hidden: [T, D], the main model's state after its final norm.
          next_ids: int32 [T], token t + 1.
          cache: with one layer more than the model has; the module's own keys are in the last.
          ctx: of the step.
          rows: int32 [R], of those logits that are wanted; None for all.
        """
        numerics, eps = ctx.numerics, ctx.config.rms_norm_eps
        with ctx.seams.scope("mtp"):
            embedded = numerics.rms_norm(self.embed[next_ids].astype(ctx.dtype), self.enorm, eps)
            state = numerics.rms_norm(hidden, self.hnorm, eps)
            # The embedding's half comes first in the released eh_proj, whatever the report's formula says.
            joined = numerics.matmul(jnp.concatenate([embedded, state], axis=-1), self.eh_proj, "eh_proj")
            with ctx.seams.scope("layer"):
                residual, update, cache, _ = self.layer(joined, None, ctx.config.num_hidden_layers, cache, ctx)
            _, x = numerics.add_rms_norm(residual, update, self.norm, eps)
            return float32_matmul(x if rows is None else x[rows], self.head), cache
