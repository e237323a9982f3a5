"""What each part of a step must do at least: bytes that cross the device's memory, and operations of products.

Both come from the parameters' shapes and types, the config and the step's tokens. A part's bytes are its weights (of
the experts those that some token chose), what it reads from the cache, and the rows that go in and come out, once each.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from dsv32_jax.convert.conversion import nbytes
from dsv32_jax.experiments.workbench.scopes import OTHER
from dsv32_jax.experiments.workbench.steps import StepShape
from dsv32_jax.model.cache import BLOCK_SIZE, KVCache
from dsv32_jax.model.context import Options
from dsv32_jax.model.model import DeepseekV32
from dsv32_jax.model.params import named_parameters
from dsv32_jax.model.products import all_fp8
from pallas_kernels.matmul import FP8_BLOCK, INT8, scheme_of

__all__ = ["LeastWork", "least_work"]

KINDS = {"float32": "float32", "bfloat16": "bf16"}
"""The ceiling of products in a dtype, see `bench.roofline`."""


@dataclasses.dataclass
class LeastWork:
    """What a part does at least.

    Attributes:
      bytes: that cross the device's memory.
      operations: by the kind of product ("float32", "bf16", "fp8", also for int8); an addition counts as one, a
        multiplication as another.
    """

    bytes: int = 0
    operations: Counter[str] = dataclasses.field(default_factory=Counter)


def least_work(
    model: DeepseekV32, options: Options, shape: StepShape, kernels: bool, experts_used: Sequence[int]
) -> dict[str, LeastWork]:
    """The work of each part of `scopes.PARTS` in one step.

    Args:
      model: prepared, abstract or not.
      options: of the run.
      shape: the step's tokens.
      kernels: whether products of quantised rows run in FP8 and INT8; references compute in the compute dtype.
      experts_used: experts that some token chose, of each layer with experts.
    """
    counted = _Counted(model, options, shape, kernels)
    counted.linears(experts_used)
    counted.attention()
    counted.routing()
    counted.rest()
    return {part: work for part, work in counted.parts.items() if work.bytes or work.operations}


class _Counted:
    """The parts' work as it is added up."""

    def __init__(self, model: DeepseekV32, options: Options, shape: StepShape, kernels: bool):
        self.model, self.config, self.options, self.shape, self.kernels = model, model.config, options, shape, kernels
        self.parameters = named_parameters(model)
        self.dtype = KINDS[options.compute_dtype]
        self.itemsize = jnp.dtype(options.compute_dtype).itemsize
        self.layers = self.config.num_hidden_layers
        sparse = options.attention == "sparse"
        self.choosing = range(0, self.layers, options.index_topk_freq) if sparse else range(0)
        """The layers whose indexers choose."""
        self.moe_layers = sum(self.config.is_moe(layer) for layer in range(self.layers))
        self.parts: dict[str, LeastWork] = {}
        before = shape.context - shape.tokens
        self.visible = [before + n + 1 for n in range(shape.tokens)]
        """Keys that each of a sequence's tokens sees."""

    def add(self, part: str, size: float, operations: int = 0, kind: str | None = None) -> None:
        """Adds bytes and operations of a kind to a part."""
        work = self.parts.setdefault(part, LeastWork())
        work.bytes += int(size)
        if operations:
            work.operations[kind or self.dtype] += operations

    def kind(self, weight: Any) -> str:
        """The kind of a product with this weight of a linear."""
        quantised = self.options.act_quant and self.kernels and scheme_of(weight) in (FP8_BLOCK, INT8)
        return "fp8" if quantised else self.dtype

    def linears(self, experts_used: Sequence[int]) -> None:
        """Every product with a weight."""
        rows, layers_used = self.shape.rows, iter(experts_used)
        used = {f"layers.{layer}": next(layers_used) for layer in range(self.layers) if self.config.is_moe(layer)}
        choosing = {f"layers.{layer}" for layer in self.choosing}
        for path, weight in self.parameters.items():
            if len(weight.shape) < 2 or path.startswith(("mtp.", "embed")):
                continue
            if path.endswith("indexer.k") and path.replace("indexer.k", "projections.0") in self.parameters:
                continue  # lies in the joined projections
            layer = ".".join(path.split(".")[:2])
            if ".indexer." in path and not path.endswith(".k") and layer not in choosing:
                continue
            if ".experts." in path:
                count, *matrix = weight.shape
                choices = rows * self.config.num_experts_per_tok
                size = nbytes(weight) // count * used[layer] + self.of_rows(choices, sum(matrix))
                self.add("experts", size, 2 * choices * math.prod(matrix), self.kind(weight))
                continue
            tokens = self.shape.sequences if path == "head" else rows
            size = nbytes(weight) + self.of_rows(tokens, sum(weight.shape[-2:]))
            kind = self.dtype if path == "head" or ".maps." in path or "kv_b" in path else self.kind(weight)
            self.add(part_of_weight(path), size, 2 * tokens * math.prod(weight.shape), kind)

    def of_rows(self, tokens: int, width: int) -> int:
        """Bytes of activations."""
        return tokens * width * self.itemsize

    def attention(self) -> None:
        """The indexer's scores, the selection, the attention and the cache's writes, of all layers."""
        config, shape, layers = self.config, self.shape, self.layers
        forms = KVCache.shapes(config, 1, self.options.cache_form, self.options.act_quant, layers=1)
        latent_row, index_row = (math.prod(x.shape) * x.dtype.itemsize / BLOCK_SIZE for x in (forms.kv, forms.index))
        keys, rows = shape.sequences * sum(self.visible), shape.rows
        cached = shape.sequences * shape.context
        inputs = self.of_rows(rows, config.latent_dim + config.index_head_dim)
        self.add("cache write", layers * (inputs + rows * (latent_row + index_row)))
        sparse, choosing = self.options.attention == "sparse", len(self.choosing)
        k = min(self.options.index_topk or config.index_topk, shape.context) if sparse else shape.context
        attended = shape.sequences * sum(min(k, visible) for visible in self.visible)
        if sparse:
            heads, dim = config.index_n_heads, config.index_head_dim
            quantised = self.options.act_quant
            size = cached * index_row + rows * heads * dim * (1 if quantised else self.itemsize) + 4 * keys
            kind = "fp8" if quantised and self.kernels else self.dtype
            self.add("indexer scores", choosing * size, choosing * 2 * keys * heads * dim, kind)
            self.add("top-k", choosing * 4 * (keys + rows * k))
        width = 2 * config.kv_lora_rank + config.qk_rope_head_dim  # of a query's head: scores, and the sum of values
        size = min(attended, cached) * latent_row + self.of_rows(rows * config.num_attention_heads, width)
        part = "sparse MLA" if sparse else "dense MLA"
        self.add(part, layers * size, layers * 2 * attended * config.num_attention_heads * width)

    def routing(self) -> None:
        """The rows that go to the experts and come back, and the choice itself."""
        config, rows, layers = self.config, self.shape.rows, self.moe_layers
        if not layers:
            return
        choices, hidden = rows * config.num_experts_per_tok, config.hidden_size
        weights = [leaf for path, leaf in self.parameters.items() if ".experts." in path]
        narrow = self.kernels and self.options.act_quant and self.dtype == "bf16" and all_fp8(*weights)
        there = self.of_rows(rows, hidden) + choices * hidden * (1 if narrow else self.itemsize)
        back = self.of_rows(choices, hidden) + 4 * rows * hidden
        self.add("dispatch", layers * (there + back))
        self.add("routing", layers * 4 * (rows * config.n_routed_experts + 2 * choices))

    def rest(self) -> None:
        """The embedding's rows, the sampling's logits, and the residual stream, read and written at each norm."""
        config, rows = self.config, self.shape.rows
        of_row = nbytes(self.model.embed) // config.vocab_size
        self.add("embedding", rows * of_row + self.of_rows(rows, config.hidden_size))
        self.add("sampling", 4 * self.shape.sequences * config.vocab_size)
        norms = 2 * self.layers + 1
        self.add(OTHER, norms * 4 * self.of_rows(rows, config.hidden_size))


def part_of_weight(path: str) -> str:
    """The part whose product reads a weight that is no routed expert's."""
    table: Mapping[str, str] = {
        ".indexer.k": "projections",
        ".indexer.": "indexer queries",
        ".attn.": "projections",
        ".shared.": "shared expert",
        ".router": "routing",
        ".ffn.": "dense feed-forward",
    }
    return next((part for piece, part in table.items() if piece in f".{path}"), path)
