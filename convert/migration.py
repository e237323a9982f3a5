"""SmoothQuant: moves outliers of activations into the weights, where eight bits a row lose less of them.

A channel of an input that is much larger than the others takes the range of its whole row. The parameter that produces
the channel is divided by a factor, and the weights that consume it are multiplied by it (Xiao et al., arXiv
2211.10438). The factors are powers of two, so that the model stays the same to the last bit, in bfloat16 too.
"""

from collections.abc import Mapping, Sequence
from functools import reduce

import jax
import jax.numpy as jnp

from dsv32_jax.config import ModelConfig
from dsv32_jax.convert.finite import check_all_finite, check_statistics
from dsv32_jax.convert.statistics import Statistics
from dsv32_jax.errors import UserError
from dsv32_jax.model.model import DeepseekV32
from dsv32_jax.model.params import is_linear, named_parameters, replace_parameters
from pallas_kernels.matmul import Weight, dense, is_qtensor

FOLDS = {
    "attn_norm": ("attn.q_a", "attn.kv_a", "attn.indexer.k", "attn.indexer.head_weights"),
    "attn.q_a_norm": ("attn.q_b", "attn.indexer.q_b"),
    "attn.kv_b": ("attn.o",),
    "ffn_norm": (
        *("ffn.gate", "ffn.up"),
        *("ffn.router", "ffn.experts.gate", "ffn.experts.up", "ffn.shared.gate", "ffn.shared.up"),
    ),
    "ffn.up": ("ffn.down",),
    "ffn.experts.up": ("ffn.experts.down",),
    "ffn.shared.up": ("ffn.shared.down",),
}
"""The parameter of a layer that produces an input, and all parameters that consume it; each layer has one kind of ffn.
An input is linear in the rows of its producer: of up (not of gate), and of kv_b's values. kv_a_norm is not among them,
since the cache stores its output."""


def migrate(
    model: DeepseekV32, statistics: Mapping[str, Statistics], strength: float = 0.5
) -> tuple[DeepseekV32, dict[str, Statistics]]:
    """Makes a model of the same function whose linears get smaller outliers, for schemes that quantise inputs.

    Args:
      model: concrete.
      statistics: of its linears' inputs, from `calibrate`.
      strength: from 0 to 1, how much of the inputs' differences the weights take; alpha in equation 4.

    Returns:
      The model, whose changed linears are plain arrays, float32 where they had a scheme and else of the dtype they had:
      quantise all of them anew. And the statistics that `calibrate` would compute for it, but for `histogram`, which is
      empty [..., 0] where inputs changed: it does not know which channel a magnitude belonged to.

    Raises:
      UserError: a strength out of range, a linear without statistics, or a weight or statistics that are NaN or
        infinite.
    """
    if not 0 <= strength <= 1:
        raise UserError(f"strength: {strength}; must be from 0 to 1")
    parameters, migrated = named_parameters(model), dict(statistics)
    check_statistics(statistics)
    check_all_finite(parameters, model.config)
    for layer in [path.removesuffix(".attn_norm") for path in parameters if path.endswith(".attn_norm")]:
        for producer_name, consumer_names in FOLDS.items():
            producer = f"{layer}.{producer_name}"
            consumers = [path for name in consumer_names if (path := f"{layer}.{name}") in parameters]
            if producer not in parameters:
                continue
            linears = [path for path in consumers if is_linear(path)]
            for path in linears:
                if path not in migrated:
                    raise UserError(f"{path}: no statistics of its inputs; take those of `calibrate` for this model")
            norm = not is_linear(producer)
            lead = 0 if norm else len(parameters[producer].shape) - 2  # a norm is shared by all experts
            columns = [_column_sizes(parameters[path]) for path in linears]
            factors = _factors(
                _largest([migrated[path].largest for path in linears], lead), _largest(columns, lead), strength
            )
            inverse = 1 / (_value_rows(factors, model.config) if producer_name == "attn.kv_b" else factors)
            parameters[producer] = _times(parameters[producer], inverse if norm else inverse[..., None])
            for path in consumers:
                parameters[path] = _times(parameters[path], factors[..., None, :])
            for path in linears:
                migrated[path] = _divided(migrated[path], factors)
    return replace_parameters(model, parameters), migrated


def _largest(sizes: Sequence[jax.Array], lead: int) -> jax.Array:
    """[E, K] (`lead` 1) or [K] (0), the largest of arrays [E, K] or [K], over experts too in the latter case."""
    return reduce(jnp.maximum, (size.max(range(size.ndim - 1 - lead)) for size in sizes))


@jax.jit
def _column_sizes(weight: Weight) -> jax.Array:
    """float32 [..., K], the largest magnitude in each column of a weight [..., N, K]."""
    return jnp.abs(dense(weight, jnp.float32)).max(-2)


def _factors(inputs: jax.Array, weights: jax.Array, strength: float) -> jax.Array:
    """Equation 4 to the nearest power of two, float32; 1 for a channel whose inputs or weights are all 0."""
    exponent = strength * jnp.log2(inputs) - (1 - strength) * jnp.log2(weights)
    has_range = (inputs > 0) & (weights > 0)
    return jnp.ldexp(jnp.ones_like(inputs), jnp.where(has_range, jnp.round(exponent), 0).astype(jnp.int32))


def _value_rows(factors: jax.Array, config: ModelConfig) -> jax.Array:
    """The factors of o's inputs [H * v], for the rows of kv_b [H * (nope + v)]; the rows of keys have 1."""
    by_head = factors.reshape(config.num_attention_heads, config.v_head_dim)
    return jnp.pad(by_head, ((0, 0), (config.qk_nope_head_dim, 0)), constant_values=1).reshape(-1)


@jax.jit
def _times(weight: Weight, factors: jax.Array) -> jax.Array:
    """The weight times factors; exact, since they are powers of two."""
    dtype = jnp.float32 if is_qtensor(weight) else weight.dtype
    return (dense(weight, jnp.float32) * factors).astype(dtype)


def _divided(statistics: Statistics, factors: jax.Array) -> Statistics:
    """The statistics of inputs whose channels were divided by factors [K] or [E, K]."""
    return Statistics(
        statistics.rows,
        statistics.largest / factors,
        statistics.moments / (factors[..., :, None] * factors[..., None, :]),
        statistics.histogram[..., :0],
    )
