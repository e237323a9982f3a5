"""Random weights at the model's real widths, made on the device in the types that they are stored in.

`DeepseekV32(config, rngs)` makes each weight in float32 first and quantises it, for which a GPU full of layers has no
room.
"""

import functools
import math

import jax
import jax.numpy as jnp

from dsv32_jax.config import ModelConfig
from dsv32_jax.language_model import LanguageModel
from dsv32_jax.memory import available_bytes
from dsv32_jax.model import abstract_model
from dsv32_jax.params import named_parameters, replace_parameters
from dsv32_jax.quant import QTensor

LARGEST = 64.0
"""Standard deviation of FP8 values: far from both ends of what the format holds."""
MOST_LAYERS = 61


def layers_that_fit(share: float) -> int:
    """How many layers of `ModelConfig.full_width` take at most this share of the device's free memory, at least 4."""
    least, more = (stored_bytes(ModelConfig.full_width(n)) for n in (4, 5))  # all further layers are alike
    fitting = 4 + (share * available_bytes()[0] - least) // (more - least)
    return int(min(max(fitting, 4), MOST_LAYERS))


def stored_bytes(config: ModelConfig) -> int:
    """Bytes of all parameters."""
    leaves = jax.tree.leaves(abstract_model(config))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def random_model(config: ModelConfig, seed: int = 0) -> LanguageModel:
    """A model whose matrices are normal with the config's standard deviation, and whose norms are 1."""
    abstract = abstract_model(config)
    keys = jax.random.split(jax.random.key(seed), len(named_parameters(abstract)))

    def made(name: str, leaf: jax.ShapeDtypeStruct | QTensor, key: jax.Array) -> jax.Array | QTensor:
        if isinstance(leaf, QTensor):
            values = normal(key, leaf.shape, leaf.values.dtype, LARGEST)
            scales = jnp.full(leaf.scales.shape, config.initializer_range / LARGEST, leaf.scales.dtype)
            return QTensor(values, scales, leaf.scheme)
        if len(leaf.shape) == 1:
            return jnp.full(leaf.shape, 0.0 if name.endswith("bias") else 1.0, leaf.dtype)
        return normal(key, leaf.shape, leaf.dtype, config.initializer_range)

    leaves = {
        name: made(name, leaf, key) for (name, leaf), key in zip(named_parameters(abstract).items(), keys, strict=True)
    }
    return LanguageModel(replace_parameters(abstract, leaves), config)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, size: float) -> jax.Array:
    """Normal values; of stacked matrices one after another, since random numbers of all would need several times the
    room."""

    def matrix(key: jax.Array) -> jax.Array:
        return (size * jax.random.normal(key, shape[-2:], jnp.bfloat16)).astype(dtype)

    return jax.lax.map(matrix, jax.random.split(key, math.prod(shape[:-2]))).reshape(shape)
