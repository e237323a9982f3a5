"""The SwiGLU feed-forward block: dense layers, the shared expert."""

import jax
from flax import nnx

from dsv32_jax.model.numerics import Numerics
from dsv32_jax.model.params import Init


class MLP(nnx.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, hidden: int, width: int, init: Init):
        self.gate = init.linear(width, hidden)
        self.up = init.linear(width, hidden)
        self.down = init.linear(hidden, width)

    def __call__(self, x: jax.Array, numerics: Numerics) -> jax.Array:
        """[T, D] -> [T, D]."""
        return numerics.matmul(numerics.swiglu(x, self.gate, self.up), self.down, "down")
