"""The model as many steps take it: the same results, bit for bit, from weights that are rearranged once."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsv32_jax.config import ModelConfig
from dsv32_jax.model.context import Options, StepContext
from dsv32_jax.model.mla import MLA, HeadMaps
from dsv32_jax.model.model import DeepseekV32
from pallas_kernels.matmul import concatenated

__all__ = ["PreparedMLA", "prepared"]


def prepared(model: DeepseekV32, options: Options) -> DeepseekV32:
    """The form of a model that a run with these options uses: with `PreparedMLA` on kernels, else as it is.

    The price is memory for what is rearranged: `kv_b` in the compute dtype, and another copy of three small weights.
    """
    if not (options.prepare and options.absorb and options.runs_kernels):
        return model
    model = jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(model))  # other modules, the same arrays
    layers: list[Any] = [*model.layers, *([model.mtp.layer] if model.mtp else [])]
    # A function of one's own gets every linear by itself, and a patch may change the input of one.
    joins = "matmul" not in options.parts.replaced and not options.patches.requests
    for layer in layers:
        layer.attn = PreparedMLA(layer.attn, model.config, options.compute_dtype, joins)
    return model


class PreparedMLA(MLA):
    """`MLA` in the absorbed form, for many steps.

    `kv_b` is two plain arrays of the compute dtype: a step would make those anew, quantised or not, in more time than
    its products with them take. The three small products with x are one: alone, none has work for more than a third of
    the multiprocessors.
    """

    def __init__(self, mla: MLA, config: ModelConfig, dtype: jax.typing.DTypeLike, joins: bool):
        self.q_a_norm, self.kv_a_norm = nnx.data(mla.q_a_norm), nnx.data(mla.kv_a_norm)
        self.q_b, self.o = nnx.data(mla.q_b), nnx.data(mla.o)
        self.indexer = mla.indexer
        self.maps = nnx.data(mla.head_maps(config, dtype))
        apart = (mla.q_a, mla.indexer.k, mla.kv_a)
        joined = concatenated(*apart) if joins else None
        self.projections = nnx.data(apart if joined is None else (joined,))
        """q_a, the indexer's k and kv_a: in one, or apart where no weight of one scheme holds all three."""

    def project(self, x: jax.Array, ctx: StepContext) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See `MLA.project`."""
        config, numerics = ctx.config, ctx.numerics
        names = ("q_a", "indexer.k", "kv_a")
        if len(self.projections) > 1:
            products = (numerics.matmul(x, *pair) for pair in zip(self.projections, names, strict=True))
            q_a, index_key, kv_a = products
        else:
            rank, dim = config.q_lora_rank, config.index_head_dim
            joined = numerics.matmul(x, *self.projections, *names)
            q_a, index_key, kv_a = jnp.split(joined, [rank, rank + dim], axis=-1)
        return q_a, kv_a, index_key

    def head_maps(self, config: ModelConfig, dtype: jax.typing.DTypeLike) -> HeadMaps:
        """See `MLA.head_maps`."""
        del config, dtype
        return self.maps
