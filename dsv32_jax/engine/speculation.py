"""Speculative decoding with the checkpoint's MTP layer: it guesses the token after next, and the next step tries it.

A step runs the model, samples, and then runs the MTP layer, whose input at a position is the model's state there and
the next token: the known one, or the one that was just sampled. The layer's likeliest token is the draft. The next step
computes the last token and the draft after it, and samples behind both: a sample depends on seed, completion and
position only, so the first is what would have been sampled anyway, and the second too if the first equals the draft.
Tokens are therefore those of an engine without speculation, at any temperature. (As in any other company, a step of
another shape may round differently; that can only matter where two tokens are equally likely up to rounding.)

The next step overwrites the cache entries of a wrong draft, since it computes that position again, and no block with
such an entry can be found by others; see `Scheduler.receive`.

Two kinds of the MTP layer's own entries may belong to another continuation: that of a prompt's last token, which
siblings share, and that of the last position of a shared block, as it depends on the token after the block. They can
make a draft worse; the model itself never reads them, and so they never change a token.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv32_jax.engine.metrics import Metrics
from dsv32_jax.engine.scheduler import Step
from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.model import Batch, DeepseekV32, Options, StepContext

__all__ = ["NextTokens", "accept_drafts", "draft_tokens", "fill_next_tokens"]


class NextTokens(NamedTuple):
    """The token after each token of a step, int32 [T]: its id, or the row that samples it; -1 for known ids."""

    ids: Array
    rows: Array


def fill_next_tokens(step: Step, ids: np.ndarray, rows: np.ndarray) -> None:
    """Writes the `NextTokens` of a planned step into int32 [T] arrays; `rows` holds -1 everywhere before."""
    begin = row = 0
    for part in step.parts:
        known = part.sequence.tokens[part.start + 1 : part.stop + 1]
        ids[begin : begin + len(known)] = known
        # Backwards: where siblings begin, the first one's token counts.
        for n, position in reversed(list(enumerate(part.sample_positions))):
            rows[begin + position - 1 - part.start] = row + n
        begin += part.stop - part.start
        row += len(part.receivers)


def draft_tokens(
    model: DeepseekV32,
    states: Array,
    batch: Batch,
    next_tokens: NextTokens,
    sampled: Array,
    cache: KVCache,
    options: Options,
) -> tuple[Array, KVCache]:
    """Guesses the token after each sampled token with the MTP layer.

    Args:
      model: with that layer.
      states: [T, D], of `DeepseekV32.states`.
      batch: the step.
      next_tokens: of its tokens.
      sampled: int32 [R], from `batch.logit_rows`.
      cache: with the layer's own entries; this step's are added.
      options: of the model.

    Returns:
      Guesses int32 [R], -1 after a sibling's token that differs from the first sibling's, since the layer has not seen
      it; and the cache.
    """
    following = jnp.where(next_tokens.rows >= 0, sampled[next_tokens.rows], next_tokens.ids)
    ctx = StepContext(model.config, options, batch, options.seams())
    assert model.mtp is not None
    logits, cache = model.mtp(states, following, cache, ctx, batch.logit_rows)
    guesses = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jnp.where(sampled == following[batch.logit_rows], guesses, -1), cache


def accept_drafts(step: Step, tokens: list[int], drafts: np.ndarray, metrics: Metrics) -> list[int]:
    """Drops tokens behind wrong drafts, gives the step's sequences their next drafts, and counts.

    Args:
      step: that has run.
      tokens: that it sampled.
      drafts: int32, the guesses after them.
      metrics: takes the counts.

    Returns:
      The tokens that count; see `Step.settle`.
    """
    settled = step.settle(tokens)
    for sequence, token, guess in zip(step.receivers, settled, drafts[: len(settled)].tolist(), strict=True):
        if token >= 0:
            sequence.draft = guess
    tried = sum(part.draft >= 0 for part in step.parts)
    metrics.drafted_tokens += tried
    metrics.accepted_tokens += tried - settled.count(-1)
    return settled
