"""The baseline that every optimisation is compared with, end to end.

It is what a port of the official demo does before anybody makes it fast: stored weights dequantised in each product,
dense attention whose scores are computed all at once and masked, a loop over experts, a contiguous cache with room for
the longest of a batch, static batches, prompts read whole. (`jax.lax.ragged_dot` in place of the loop is no baseline at
full width: XLA's GPU backend multiplies every row by every expert, in more memory than a GPU has.)
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.convert.conversion import nbytes
from dsv32_jax.experiments.studies.serving import Work
from dsv32_jax.experiments.workbench.settings import Setting
from dsv32_jax.generate.batching import batch_of, padded, prompt_batch
from dsv32_jax.generate.compiling import all_at_once
from dsv32_jax.generate.flat_model import FlatModel, flat_step
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.sampling import sample
from dsv32_jax.model import variants
from dsv32_jax.model.cache import BLOCK_SIZE, KVCache
from dsv32_jax.model.model import Batch

__all__ = ["StaticBatches", "baseline"]


def baseline(lm: LanguageModel) -> LanguageModel:
    """The model before every optimisation, with the same stored weights."""
    options = {
        "attention": "dense",
        "act_quant": False,
        "backend": "reference",
        "cache_dtype": None,
        "index_topk_freq": 1,
    }
    parts: dict[str, Any] = {"dense_mla": variants.materialised, "experts": variants.tile_by_tile}
    return Setting(options=options, parts=parts).apply(lm)


class BatchResult(NamedTuple):
    """What a static batch gave.

    Attributes:
      tokens: int32 [B, N], of every row as many as the longest request wants.
      times: seconds after which each step's tokens were on the host.
    """

    tokens: np.ndarray
    times: list[float]


class StaticBatches:
    """Serves requests in batches: prompts one after another and whole, then all rows until the longest has ended.

    Args:
      lm: the model.
      batch: rows; a smaller batch leaves some empty.
      longest: tokens of the longest prompt with its continuation, for which every row has room.
      prompts: tokens of the prompts that will come; they are padded to powers of two.
    """

    def __init__(self, lm: LanguageModel, batch: int, longest: int, prompts: Sequence[int]):
        self._flat = FlatModel(*lm.flat_model(), lm.config, lm.options)
        blocks = -(-longest // BLOCK_SIZE)
        self.tables = np.arange(batch * blocks, dtype=np.int32).reshape(batch, blocks)
        self._sizes = sorted({padded(length, BLOCK_SIZE) for length in prompts})
        cache = jax.eval_shape(self.new_cache)
        self.cache_bytes = nbytes(cache)

        def compile_step(batch: Batch) -> Any:
            flat = self._flat
            return flat_step.lower(flat.leaves, flat.structure, batch, cache, flat.options).compile()

        batches = [self._prompt([0] * size, 0) for size in self._sizes] + [self._next(self._ids(), self._ids())]
        self._programs = dict(
            zip([*self._sizes, 0], all_at_once([partial(compile_step, item) for item in batches]), strict=True)
        )
        self.temporary_bytes = max(item.memory_analysis().temp_size_in_bytes for item in self._programs.values())

    def new_cache(self) -> KVCache:
        """The contiguous cache of a batch."""
        return self._flat.new_cache(self.tables)

    def _ids(self) -> np.ndarray:
        return np.zeros(len(self.tables), np.int32)

    def _prompt(self, row: list[int], number: int) -> Batch:
        size = padded(len(row), BLOCK_SIZE)
        return prompt_batch(row, 0, len(row), size, self.tables[number], np.array([len(row) - 1]))

    def _next(self, ids: Any, positions: np.ndarray) -> Batch:
        rows = np.arange(len(self.tables))
        return batch_of(ids, positions, rows, self.tables, rows)

    def run(self, work: Sequence[Work]) -> BatchResult:
        """Serves a batch of requests, which all come at its start."""
        start, leaves = time.monotonic(), self._flat.leaves
        cache, last = self.new_cache(), []
        for number, item in enumerate(work):
            batch = self._prompt(item.prompt, number)
            logits, cache = self._programs[len(batch.ids)](leaves, batch, cache)
            last.append(logits)
        absent = len(self.tables) - len(work)
        ids: Any = _likeliest(jnp.concatenate(last + absent * last[:1]))
        lengths = np.array([len(item.prompt) for item in work] + absent * [1])
        new, tokens, times = max(item.new for item in work), [], []
        for step in range(new):
            following = None
            if step + 1 < new:  # started before this step's tokens are fetched, so that the device does not wait
                logits, cache = self._programs[0](leaves, self._next(ids, lengths + step), cache)
                following = _likeliest(logits)
            tokens.append(np.asarray(ids)[: len(work)])
            times.append(time.monotonic() - start)
            ids = following
        return BatchResult(np.stack(tokens, 1), times)


def _likeliest(logits: jax.Array) -> jax.Array:
    return sample(logits, None, 0.0, 1.0, greedy=True)
