"""The SwiGLU feed-forward block: dense layers, the shared expert."""

import jax
import jax.numpy as jnp
from flax import nnx

from dsv32_jax.params import Init
from dsv32_jax.quant import Numerics


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up in float32, rounded once to the inputs' dtype."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


class MLP(nnx.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, hidden: int, width: int, init: Init):
        self.gate = init.linear(width, hidden)
        self.up = init.linear(width, hidden)
        self.down = init.linear(hidden, width)

    def __call__(self, x: jax.Array, numerics: Numerics) -> jax.Array:
        """[T, D] -> [T, D]."""
        hidden = swiglu(numerics.matmul(x, self.gate), numerics.matmul(x, self.up))
        return numerics.matmul(hidden, self.down)
