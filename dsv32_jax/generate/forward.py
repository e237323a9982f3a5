"""Logits and log-likelihoods of whole rows, chunk by chunk."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv32_jax.common.arguments import instance
from dsv32_jax.config import ModelConfig
from dsv32_jax.errors import UserError
from dsv32_jax.generate import batching
from dsv32_jax.generate.flat_model import FlatModel
from dsv32_jax.generate.results import Score
from dsv32_jax.generate.sampling import not_finite

__all__ = ["logits", "output", "score"]


def logits(flat: FlatModel, rows: list[list[int]], out: np.ndarray) -> np.ndarray:
    """Writes the logits at every position into `out`, see `output`, and returns it."""
    for row, start, stop, logits in _chunk_logits(flat, rows):
        out[row, start:stop] = np.asarray(logits)[: stop - start]
    return out


def score(flat: FlatModel, rows: list[list[int]], out: np.ndarray | None) -> Score:
    """Log-likelihoods of rows of at least 2 tokens; with `out` the logits of the same pass are written, too.

    Raises:
      UserError: a log-likelihood is not finite.
    """
    log_likelihoods = np.zeros((len(rows), max(map(len, rows)) - 1), np.float32)
    for row, start, stop, logits in _chunk_logits(flat, rows):
        next_ids = rows[row][start + 1 : stop + 1]
        targets = np.zeros(logits.shape[0], np.int32)
        targets[: len(next_ids)] = next_ids
        values = np.asarray(_log_likelihood(logits, targets))[: len(next_ids)]
        if not np.isfinite(values).all():
            raise not_finite(row, start + int(np.argmin(np.isfinite(values))))
        log_likelihoods[row, start : start + len(next_ids)] = values
        if out is not None:
            out[row, start:stop] = np.asarray(logits)[: stop - start]
    return Score.of(log_likelihoods, sum(len(row) - 1 for row in rows))


def output(rows: list[list[int]], config: ModelConfig, out: np.ndarray | None) -> np.ndarray:
    """A zeroed float32 [B, T, V] for the logits of these rows: `out` where it is not None, or a new array.

    Raises:
      UserError: `out` is no such array, or is read-only.
    """
    shape = (len(rows), max(map(len, rows)), config.vocab_size)
    if out is None:
        return np.zeros(shape, np.float32)
    instance("out", out, np.ndarray, f"a NumPy array, float32 {list(shape)}")
    if out.ndim != 3 or out.dtype != np.float32 or out.shape[1] < shape[1] or out.shape[::2] != shape[::2]:
        raise UserError(f"out: {out.dtype} {list(out.shape)}; must be float32 {list(shape)}")
    if not out.flags.writeable:
        raise UserError("out: cannot be written; give an array that can")
    out[...] = 0
    return out


def _chunk_logits(flat: FlatModel, rows: list[list[int]]) -> Iterator[tuple[int, int, int, Array]]:
    """Yields (row, start, stop, logits [T >= stop - start, V]) for each chunk of each row, one row after the other.

    The next row uses the same cache: what an earlier row left lies at positions that causality hides until they are
    written anew.
    """
    tables = batching.block_tables(1, max(map(len, rows)), flat.config.max_position_embeddings)
    cache = flat.new_cache(tables)
    for number, row in enumerate(rows):
        for start, stop, size in batching.chunks(len(row), flat.options, all_logits=True):
            logit_rows = np.where(np.arange(size) < stop - start, np.arange(size), -1).astype(np.int32)
            logits, cache = flat.step(batching.prompt_batch(row, start, stop, size, tables[0], logit_rows), cache)
            yield number, start, stop, logits


@jax.jit
def _log_likelihood(logits: Array, targets: Array | np.ndarray) -> Array:
    """float32 [T]: log softmax of `logits` [T, V] at `targets` [T]."""
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=1)
