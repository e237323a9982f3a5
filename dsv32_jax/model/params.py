"""Parameters by path: the one description that loading, sharding and conversion read."""

from typing import Any

import jax
from flax import nnx

from dsv32_jax.config import ModelConfig
from dsv32_jax.config.quantization_config import QuantizationConfig
from pallas_kernels.matmul import is_qtensor, quantize_weight


def path_name(path: tuple) -> str:
    """A key path of `jax.tree_util` as attribute names: "layers.3.attn.q_a"."""
    return ".".join(str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in path)


def named_parameters(model: Any) -> dict[str, Any]:
    """Every parameter of a module by its path: arrays, QTensors, or their abstract descriptions."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_qtensor)
    return {path_name(path): leaf for path, leaf in leaves}


PLAIN = ("router", "head_weights", "norm", "bias")
"""In the names of a layer's parameters that no scheme takes: choices hang on them, or they are small."""


def is_linear(path: str) -> bool:
    """Whether a parameter is one that schemes are for: what the released checkpoint has in FP8."""
    return path.startswith(("layers.", "mtp.layer.")) and not any(part in path for part in PLAIN)


def is_choosing(path: str) -> bool:
    """Whether a parameter only chooses keys or experts: where it is NaN, others are chosen, and logits stay finite."""
    return ".indexer." in path or ".router" in path


def replace_parameters[Model](model: Model, parameters: dict[str, Any]) -> Model:
    """`model` with other leaves; `parameters` must name exactly the parameters it has.

    Raises:
      KeyError: a path is missing or unknown.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_qtensor)
    names = [path_name(path) for path, _ in leaves]
    if different := set(names) ^ set(parameters):
        raise KeyError(f"parameters missing or unknown: {', '.join(sorted(different)[:10])}")
    return jax.tree.unflatten(treedef, [parameters[name] for name in names])


class Init:
    """Random parameters of a model in the checkpoint's storage types (norms float32, matrices bfloat16 or FP8)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.fp8 = isinstance(config.quantization_config, QuantizationConfig)
        self.std = config.initializer_range
        self.rngs = rngs

    def normal(self, shape: tuple[int, ...]) -> jax.Array:
        """bfloat16 normal values of the config's standard deviation."""
        return (self.std * jax.random.normal(self.rngs.params(), shape)).astype("bfloat16")

    def matrix(self, *shape: int):
        """bfloat16 [..., N, K], never quantised: embedding, head, router."""
        return nnx.data(self.normal(shape))

    def linear(self, *shape: int):
        """[..., N, K]: a QTensor where the checkpoint is in its own FP8; for others see `dsv32_jax.convert.stored`."""
        weight = self.normal(shape)
        return nnx.data(quantize_weight(weight) if self.fp8 else weight)

    def constant(self, value: float, *shape: int):
        """float32: norms and biases."""
        return nnx.data(jax.numpy.full(shape, value, jax.numpy.float32))
