"""Makes random weights at the model's real widths, on the device, in the types that they are stored in.

`DeepseekV32(config, rngs)` makes each weight in float32 first and then quantises it; a GPU full of layers has no memory
for that.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dsv32_jax.config import ModelConfig
from dsv32_jax.convert.conversion import nbytes
from dsv32_jax.convert.quantization import UNQUANTISED
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.memory import available_bytes
from dsv32_jax.model.model import abstract_model
from dsv32_jax.model.params import named_parameters, replace_parameters
from pallas_kernels.matmul import BLOCK, FP8_BLOCK, INT8, QTensor, Weight, abstract_weight, pack_int4

LARGEST = 64.0
"""Standard deviation of FP8 values: far from both ends of the format's range."""
INT8_SIZE, INT4_SIZE, INT4_ZERO = 73.6, 4.32, 8
"""Root mean square of uniform int8 values, and of uniform four-bit values from 1 to 15 less their zero. The mean is 0;
another would make all tokens alike and send them to the same experts."""
MOST_LAYERS = 61


def layers_that_fit(share: float) -> int:
    """The number of layers of `ModelConfig.full_width` that take at most this share of the free memory, at least 4."""
    four_layers, five_layers = (
        stored_bytes(ModelConfig.full_width(n)) for n in (4, 5)
    )  # all further layers have equal sizes
    fitting = 4 + (share * available_bytes()[0] - four_layers) // (five_layers - four_layers)
    return int(min(max(fitting, 4), MOST_LAYERS))


def stored_bytes(config: ModelConfig) -> int:
    """Bytes of all parameters."""
    return nbytes(abstract_model(config))


def random_model(config: ModelConfig, seed: int = 0, schemes: Mapping[str, str] | None = None) -> LanguageModel:
    """A model whose matrices are normal with the config's standard deviation, and whose norms are 1.

    Args:
      config: of the model.
      seed: of the random numbers.
      schemes: names of `pallas_kernels.matmul.SCHEMES`, or "bf16", by path of a linear; others are stored as the
        config says. Integers are uniform instead of normal, with that standard deviation.

    Raises:
      KeyError: a path that is no parameter.
      ValueError: an unknown scheme, or a width that it does not take.
    """
    abstract = in_schemes(abstract_model(config), schemes or {})
    return LanguageModel(random_parameters(abstract, config.initializer_range, seed), config)


def in_schemes[Module](abstract: Module, schemes: Mapping[str, str]) -> Module:
    """An abstract module with some weights in other schemes, by path; takes no memory."""
    parameters = named_parameters(abstract)
    changed = {path: stored(parameters[path].shape, scheme) for path, scheme in schemes.items()}
    return replace_parameters(abstract, parameters | changed)


def stored(shape: tuple[int, ...], scheme: str) -> Any:
    """An abstract weight [..., N, K] in a scheme or in "bf16"."""
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16) if scheme == UNQUANTISED else abstract_weight(shape, scheme)


def random_parameters[Module](abstract: Module, size: float, seed: int = 0) -> Module:
    """The module with matrices of this standard deviation, norms of 1 and biases of 0."""
    parameters = named_parameters(abstract)
    keys = jax.random.split(jax.random.key(seed), len(parameters))

    def random_leaf(name: str, leaf: Any, key: jax.Array) -> Weight:
        if len(leaf.shape) == 1:
            return jnp.full(leaf.shape, 0.0 if name.endswith("bias") else 1.0, leaf.dtype)
        return random_weight(key, leaf, size)

    leaves = {name: random_leaf(name, leaf, key) for (name, leaf), key in zip(parameters.items(), keys, strict=True)}
    return replace_parameters(abstract, leaves)


def random_weight(key: jax.Array, leaf: Any, size: float) -> Weight:
    """Makes a random weight in the type of an abstract one [..., N, K], see `stored`."""
    if not isinstance(leaf, QTensor):
        return normal(key, leaf.shape, leaf.dtype, size)
    if leaf.scheme == FP8_BLOCK:
        values, scale = normal(key, leaf.shape, leaf.values.dtype, LARGEST), jnp.float32(size / LARGEST)
    else:
        values = integers(key, leaf.values.shape, leaf.values.dtype)
        scale = jnp.float32(size / INT8_SIZE) if leaf.scheme == INT8 else int4_word(size / INT4_SIZE)
    return QTensor(values, jnp.full(leaf.scales.shape, scale, leaf.scales.dtype), leaf.scheme)


def int4_word(scale: float) -> jax.Array:
    """uint32 []: the packed scale and zero of a group of a four-bit weight, for this scale and `INT4_ZERO`."""
    values, zeros = jnp.zeros((1, BLOCK), jnp.uint8), jnp.full((1, 1), INT4_ZERO, jnp.uint8)
    return pack_int4(values, jnp.full((1, 1), scale, jnp.bfloat16), zeros)[1][0, 0]


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, size: float) -> jax.Array:
    """Normal values."""

    def matrix(key: jax.Array) -> jax.Array:
        return (size * jax.random.normal(key, shape[-2:], jnp.bfloat16)).astype(dtype)

    return one_by_one(matrix, key, shape)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def integers(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Uniform values: int8 from -127 to 127, or uint8 that each hold two four-bit values from 1 to 15."""

    def matrix(key: jax.Array) -> jax.Array:
        if dtype == jnp.int8:
            return jnp.maximum(jax.lax.bitcast_convert_type(jax.random.bits(key, shape[-2:], jnp.uint8), dtype), -127)
        pairs = jax.random.randint(key, (2, *shape[-2:]), 1, 16).astype(dtype)
        return pairs[0] | (pairs[1] << 4)

    return one_by_one(matrix, key, shape)


def one_by_one(matrix: Callable[[jax.Array], jax.Array], key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Makes stacked matrices with `matrix(key)` one after another: all at once would take several times the memory."""
    return jax.lax.map(matrix, jax.random.split(key, math.prod(shape[:-2]))).reshape(shape)
