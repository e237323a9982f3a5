"""What a step of the model gets: how to compute, and on which tokens."""

import dataclasses
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from dsv32_jax.common.arguments import boolean, instance, integer
from dsv32_jax.config import ModelConfig
from dsv32_jax.errors import UserError
from dsv32_jax.model.cache import FORMS
from dsv32_jax.model.exchange import Exchange
from dsv32_jax.model.mesh import MeshShape
from dsv32_jax.model.numerics import Numerics
from dsv32_jax.model.parts import MODEL_PARTS, Parts
from dsv32_jax.model.rope import rope_angles
from dsv32_jax.model.seams import Seams
from dsv32_jax.model.taps import NO_PATCHES, Patches, Taps
from pallas_kernels.backend import BACKENDS, KERNEL, resolve
from pallas_kernels.paging import BLOCK_SIZE


@dataclasses.dataclass(frozen=True)
class Options:
    """What can be chosen at run time; hashable, a static argument of the jitted step.

    Attributes:
      compute_dtype: "float32" or "bfloat16", of activations.
      act_quant: quantise activations, index keys and latents to FP8 as the official code does.
      attention: "sparse" (DSA) or "dense".
      index_topk: keys a token attends to; the config's where None.
      index_topk_freq: the indexer chooses in every n-th layer, from layer 0 on, and the layers between attend to what
        the last one chose (IndexCache, arXiv 2603.12201; the schedule is that of transformers' `glm_moe_dsa`). The MTP
        layer always chooses for itself.
      backend: of every op, see `pallas_kernels`.
      absorb: attention in the latent space; False expands every head's keys and values (slow: the specification).
      prepare: rearrange some weights once as kernels take them, see `model.prepared`; False runs them as stored.
      cache_dtype: form of the cache's latent rows, "float32", "bfloat16" or "fp8"; the compute dtype where None.
      parts: the functions that a step calls, see `Parts`.
      check: check what replaced parts give (see `checks`); slow, for tests and notebooks.
      patches: functions of a step's values that give what it goes on with, see `Patches`.
      mesh: the devices that run a step together, see `dsv32_jax.model.sharding`; one where None.
    """

    compute_dtype: str = "float32"
    act_quant: bool = False
    attention: str = "sparse"
    index_topk: int | None = None
    index_topk_freq: int = 1
    backend: str = "auto"
    absorb: bool = True
    prepare: bool = True
    cache_dtype: str | None = None
    parts: Parts = MODEL_PARTS
    check: bool = False
    patches: Patches = NO_PATCHES
    mesh: MeshShape | None = None

    def __post_init__(self):
        for field, allowed in {
            "compute_dtype": ("float32", "bfloat16"),
            "attention": ("sparse", "dense"),
            "backend": BACKENDS,
            "cache_dtype": (None, *FORMS),
        }.items():
            if getattr(self, field) not in allowed:
                raise UserError(
                    f"{field} {getattr(self, field)!r} is unknown; it is one of {', '.join(map(str, allowed))}"
                )
        for field in ("act_quant", "absorb", "prepare", "check"):
            boolean(field, getattr(self, field))
        instance("parts", self.parts, Parts, "a Parts")
        instance("patches", self.patches, Patches, "a Patches")
        instance("mesh", self.mesh, (MeshShape, type(None)), "a MeshShape, see `MeshShape.parse`")
        if self.index_topk is not None:
            integer("index_topk", self.index_topk, 1)
        if integer("index_topk_freq", self.index_topk_freq, 1) > 1 and self.attention == "dense":
            raise UserError("index_topk_freq: attention is dense, so that no layer chooses; leave one of the two out")

    @property
    def runs_kernels(self) -> bool:
        """Whether ops run kernels, on a GPU."""
        return resolve(self.backend, "the model", KERNEL) == "mosaic_gpu"

    @staticmethod
    def default(config: ModelConfig, **chosen: Any) -> "Options":
        """float32 on a CPU, bfloat16 elsewhere; activations quantised where the checkpoint is FP8; then `chosen`."""
        defaults = {
            "compute_dtype": "float32" if jax.default_backend() == "cpu" else "bfloat16",
            "act_quant": config.quantization_config is not None,
        }
        return Options(**{**defaults, **{name: value for name, value in chosen.items() if value is not None}})

    def seams(self, taps: Taps | None = None) -> Seams:
        """The parts and the taps of one step that is to be traced."""
        return Seams(self.parts, taps, self.check, self.patches)

    @property
    def cache_form(self) -> str:
        """The form of the cache's latent rows."""
        return self.cache_dtype or self.compute_dtype


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["ids", "positions", "slots", "sequence", "block_tables", "logit_rows"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Batch:
    """The tokens of one step; all arrays int32.

    Attributes:
      ids: [T], token ids.
      positions: [T], position in the token's sequence; -1 for padding.
      slots: [T], where the token's keys are written, block * 64 + offset; -1 for padding.
      sequence: [T], row of `block_tables`.
      block_tables: [S, N], physical block of each logical block of each sequence; -1 where there is none.
      logit_rows: [R], rows of the flat batch whose logits are wanted; -1 gives a row of zeros.
    """

    ids: jax.Array
    positions: jax.Array
    slots: jax.Array
    sequence: jax.Array
    block_tables: jax.Array
    logit_rows: jax.Array


@dataclasses.dataclass(frozen=True)
class StepContext:
    """What every layer of a step needs to know.

    Attributes:
      config: the model's.
      options: of the run.
      batch: the step's tokens.
      seams: the step's parts and taps, see `Options.seams`.
    """

    config: ModelConfig
    options: Options
    batch: Batch
    seams: Seams

    def __post_init__(self):
        self.seams.details["positions"] = self.batch.positions

    @cached_property
    def angles(self) -> tuple[jax.Array, jax.Array]:
        """RoPE's cos and sin, float32 [T, rope / 2]."""
        return rope_angles(self.config, self.batch.positions)

    @cached_property
    def numerics(self) -> Numerics:
        """How products are computed."""
        quantization = self.config.quantization_config
        scale_fmt = quantization.scale_fmt if quantization else "ue8m0"
        return Numerics(self.options.act_quant, scale_fmt, self.options.backend, self.seams)

    @cached_property
    def exchange(self) -> Exchange | None:
        """How tokens reach the experts of other devices; None where one device runs the step."""
        mesh = self.options.mesh
        return None if mesh is None else Exchange(mesh, self.batch.positions)

    def chooses(self, layer: int) -> bool:
        """Whether a layer's own indexer chooses what it attends to, see `Options.index_topk_freq`."""
        return layer >= self.config.num_hidden_layers or layer % self.options.index_topk_freq == 0

    @property
    def dtype(self) -> jnp.dtype:
        """The compute dtype."""
        return jnp.dtype(self.options.compute_dtype)

    @property
    def context_length(self) -> int:
        """Positions that the block tables reach."""
        return self.batch.block_tables.shape[1] * BLOCK_SIZE

    def einsum(self, formula: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """A product accumulated in float32, in the compute dtype."""
        # Without preferred_element_type: XLA's CPU backend has no batched bfloat16 product with a float32 result.
        return jnp.einsum(formula, x, y, precision="highest").astype(self.dtype)
