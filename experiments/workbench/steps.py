"""One step of a model as a compiled program on a full cache: what the workbench times, profiles and weighs.

The cache holds random keys and latents in blocks that lie in random order, so a step can be measured at a context of
128k tokens without reading a prompt of that length first. What the tokens are does not change the time of a step; that
they choose different experts and positions does, and random rows give that.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.config import ModelConfig
from dsv32_jax.convert.conversion import nbytes
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.bench.cases import LAYERS, index_cache, latent_cache, normal
from dsv32_jax.generate.batching import batch_of
from dsv32_jax.generate.flat_model import user_errors
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.sampling import sample
from dsv32_jax.model.cache import BLOCK_SIZE, KVCache
from dsv32_jax.model.model import Batch, Options
from dsv32_jax.model.taps import Taps

__all__ = ["PHASES", "Step", "StepShape", "random_cache"]

PHASES = ("decode", "prefill")
SAMPLING = "sampling"
"""The scope of the choice of the next token in a step's program."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepShape:
    """The tokens of a step.

    Attributes:
      phase: "decode", one token of each sequence, or "prefill", a piece of each sequence's prompt.
      sequences: their number.
      context: tokens of each sequence when the step is done, a multiple of 64.
      tokens: of each sequence in this step, its last ones; 1 in a decode step.
      contiguous: each sequence's blocks lie one after the other, as in a cache that is no block cache.
    """

    phase: str = "decode"
    sequences: int = 1
    context: int
    tokens: int = 1
    contiguous: bool = False

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise UserError(f"phase {self.phase!r} is unknown; it is one of {', '.join(PHASES)}")
        if self.context < BLOCK_SIZE or self.context % BLOCK_SIZE:
            raise UserError(f"context {self.context}: must be a multiple of {BLOCK_SIZE}, the size of a cache's block")
        if self.sequences < 1:
            raise UserError(f"sequences {self.sequences}: must be at least 1")
        if not 1 <= self.tokens <= self.context:
            raise UserError(f"tokens {self.tokens}: must be from 1 to the context, {self.context}")
        if self.phase == "decode" and self.tokens != 1:
            raise UserError(f"tokens {self.tokens}: a decode step has one token of each sequence")

    @property
    def rows(self) -> int:
        """Tokens of the whole step."""
        return self.sequences * self.tokens

    @property
    def blocks(self) -> int:
        """Blocks of the cache."""
        return self.sequences * self.context // BLOCK_SIZE

    def batch(self, config: ModelConfig, seed: int = 0) -> Batch:
        """The step's tokens, chosen at random; the logits of each sequence's last one are wanted."""
        rng = np.random.default_rng(seed)
        blocks = np.arange(self.blocks) if self.contiguous else rng.permutation(self.blocks)
        tables = blocks.reshape(self.sequences, -1)
        sequence = np.repeat(np.arange(self.sequences), self.tokens)
        positions = np.tile(np.arange(self.context - self.tokens, self.context), self.sequences)
        ids = rng.integers(0, config.vocab_size, self.rows)
        return batch_of(ids, positions, sequence, tables, np.arange(self.tokens - 1, self.rows, self.tokens))


class Step:
    """A compiled step of a model, greedy sampling included, that can be called again and again on its own cache.

    The cache is made when the step is first called, so that the memory of a step that does not fit can be told too.

    Args:
      lm: the model, with its options and parts.
      shape: the step's tokens.
      compiler_options: of XLA, for this program alone.
      taps: what is to be seen of the step.

    Attributes:
      shape: the step's tokens.
      values: what the taps asked for in the last call, by name.
      compiled: the program; `compiled.as_text()` has the scope of each operation.
      kernels: whether Mosaic GPU kernels are in it.
      memory: bytes by purpose: "weights" and "cache", which are arguments, and "temporary", XLA's for the step.

    Raises:
      UserError: the context is longer than the model's, or a part cannot run.
    """

    def __init__(
        self,
        lm: LanguageModel,
        shape: StepShape,
        compiler_options: dict[str, Any] | None = None,
        taps: Taps | None = None,
    ):
        longest = lm.config.max_position_embeddings
        if shape.context > longest:
            raise UserError(f"context {shape.context}: the model takes at most max_position_embeddings = {longest}")
        self.shape = shape
        self._leaves, structure = lm.flat_model()
        self._batch = shape.batch(lm.config)
        run = functools.partial(_sampled_step, structure=structure, options=lm.options, taps=taps)
        abstract_cache = KVCache.shapes(lm.config, shape.blocks, lm.options.cache_form, lm.options.act_quant)
        with user_errors():
            lowered = jax.jit(run, donate_argnums=2).lower(self._leaves, self._batch, abstract_cache)
            self.compiled = lowered.compile(compiler_options)
        self.kernels = "mosaic_gpu" in lowered.as_text()
        analysis: Any = self.compiled.memory_analysis()
        self.memory = {
            "weights": nbytes(self._leaves),
            "cache": nbytes(abstract_cache),
            "temporary": analysis.temp_size_in_bytes,
        }
        self.values: dict[str, Any] = {}
        self._new_cache = functools.partial(random_cache, lm.config, shape.blocks, lm.options)
        self._cache: KVCache | None = None

    def __call__(self) -> jax.Array:
        """Starts the step and returns the sampled tokens, int32 [sequences], which may not be computed yet."""
        if self._cache is None:
            self._cache = self._new_cache()
        tokens, self.values, self._cache = self.compiled(self._leaves, self._batch, self._cache)
        return tokens


def _sampled_step(
    leaves: list[Any], batch: Batch, cache: KVCache, *, structure: Any, options: Options, taps: Taps | None
) -> tuple[jax.Array, dict[str, Any], KVCache]:
    """The likeliest next token of each sequence, what the taps ask for, and the cache."""
    seams = options.seams(taps)
    logits, cache = jax.tree.unflatten(structure, leaves)(batch, cache, options, seams)
    with jax.named_scope(SAMPLING):
        return sample(logits, None, 0.0, 1.0, greedy=True), seams.values, cache


def random_cache(config: ModelConfig, blocks: int, options: Options, seed: int = 0) -> KVCache:
    """A cache of random latents and index keys, in the forms that the options ask for.

    Equal keys would change the work of the selection.
    """
    shapes = KVCache.shapes(config, blocks, options.cache_form, options.act_quant)
    kv_key, index_key = jax.random.split(jax.random.key(seed))
    needed = -(-config.num_hidden_layers * blocks // LAYERS)  # blocks of each layer of `latent_cache`

    def of_shape(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        flat = array.reshape(-1, *array.shape[2:])
        return flat[: shape[0] * shape[1]].reshape(shape)

    if options.cache_form == "fp8":
        latents = latent_cache(kv_key, needed, config.kv_lora_rank, config.qk_rope_head_dim, "fp8")
        kv = of_shape(latents, shapes.kv.shape)
    else:
        kv = normal(kv_key, shapes.kv.shape).astype(shapes.kv.dtype) / 8
    if options.act_quant:
        index = of_shape(index_cache(index_key, needed, config.index_head_dim), shapes.index.shape)
    else:
        index = normal(index_key, shapes.index.shape).astype(shapes.index.dtype)
    return KVCache(kv, jnp.asarray(index))
