"""The lightning indexer: which keys each token attends to."""

import jax
from flax import nnx

from dsv32_jax.config import ModelConfig
from dsv32_jax.model.numerics import Numerics
from dsv32_jax.model.params import Init
from dsv32_jax.model.products import float32_matmul
from pallas_kernels import rowwise
from pallas_kernels.cache_write import index_keys
from pallas_kernels.quantize import quantize

LAYER_NORM_EPS = 1e-6


class Indexer(nnx.Module):
    """Projections of the indexer (official `Indexer`; DeepSeek-V3.2-Exp report, equation 1)."""

    def __init__(self, config: ModelConfig, init: Init):
        heads, dim = config.index_n_heads, config.index_head_dim
        self.q_b = init.linear(heads * dim, config.q_lora_rank)
        self.k = init.linear(dim, config.hidden_size)
        self.k_norm_weight = init.constant(1.0, dim)
        self.k_norm_bias = init.constant(0.0, dim)
        self.head_weights = init.matrix(heads, config.hidden_size)

    def queries(
        self,
        x: jax.Array,
        q_latent: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        config: ModelConfig,
        numerics: Numerics,
    ) -> tuple[jax.Array, jax.Array]:
        """Queries and head weights.

        Args:
          x: [T, D], the attention's input.
          q_latent: [T, q_lora_rank], normalised.
          angles: cos and sin of the tokens' positions.
          config: the model's.
          numerics: FP8 queries where activations are quantised.

        Returns:
          queries [T, heads, dim] (e4m3 values if quantised) and head weights float32 [T, heads] with every factor of
          the query side: heads^-0.5, dim^-0.5 and the queries' FP8 scales. YaRN's factor has no place here.
        """
        heads, dim = config.index_n_heads, config.index_head_dim
        q = numerics.matmul(q_latent, self.q_b, "q_b").reshape(-1, heads, dim)
        q = rowwise.hadamard(rowwise.rope_leading(q, *angles, numerics.index_rope))
        weights = float32_matmul(x, self.head_weights) * (heads**-0.5 * dim**-0.5)
        if not numerics.act_quant:
            return q, weights
        values, scales = quantize(q, numerics.scale_fmt, group=dim, backend=numerics.backend)
        return values, weights * scales[..., 0]

    def keys(self, x: jax.Array, angles: tuple[jax.Array, jax.Array], numerics: Numerics) -> jax.Array:
        """Index keys [T, dim], one for all heads, before the cache quantises them."""
        return self.rotated(numerics.matmul(x, self.k, "k"), angles, numerics)

    def rotated(self, index_key: jax.Array, angles: tuple[jax.Array, jax.Array], numerics: Numerics) -> jax.Array:
        """Index keys [T, dim] from x by `k`: normalised, rotated, and transformed."""
        norm = (self.k_norm_weight, self.k_norm_bias, LAYER_NORM_EPS)
        return index_keys(index_key, *norm, angles, rope=numerics.index_rope)
