"""Speculative decoding with the checkpoint's MTP layer: a draft of the token after the next, tried in the next step.

A step runs the model, draws, and then runs the MTP layer, whose input at a position is the model's state there and the
token behind it: the known one, or the one that was just drawn. Its likeliest token is the draft. The next step feeds
the last token and the draft behind it, and draws from both: a draw depends on seed, continuation and position only, so
the first is what would have been drawn anyway, and the second too if the first equals the draft. Tokens are therefore
those of an engine without speculation, at any temperature. (As in any other company, a step of another shape may round
otherwise; that can only matter where two tokens are equally likely up to rounding.)

A wrong draft's entries in the cache are written over in the next step, which computes that position again, and no block
with such an entry can be found by others; see `Scheduler.receive`.

Two kinds of the MTP layer's own entries may belong to another continuation: that of a prompt's last token, which
siblings share, and that of the last place of a shared block, as it depends on the token behind the block. They can make
a draft worse; they are never read by the model itself, and so never change a token.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv32_jax.engine.metrics import Metrics
from dsv32_jax.engine.scheduler import Step
from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.model import Batch, DeepseekV32, Options, StepContext

__all__ = ["After", "draft", "set_after", "take"]


class After(NamedTuple):
    """The token behind each token of a step, int32 [T]: its id, or the row that draws it; -1 for known ids."""

    ids: Array
    rows: Array


def set_after(planned: Step, ids: np.ndarray, rows: np.ndarray) -> None:
    """Writes a plan's `After` into arrays int32 [T], which hold -1 for a row that draws."""
    begin = row = 0
    for part in planned.parts:
        known = part.sequence.tokens[part.start + 1 : part.stop + 1]
        ids[begin : begin + len(known)] = known
        # Backwards: where siblings begin, the first one's token counts.
        for n, place in reversed(list(enumerate(part.places))):
            rows[begin + place - 1 - part.start] = row + n
        begin += part.stop - part.start
        row += len(part.samples)


def draft(
    model: DeepseekV32, states: Array, batch: Batch, after: After, drawn: Array, cache: KVCache, options: Options
) -> tuple[Array, KVCache]:
    """What may come behind each drawn token, by the MTP layer.

    Args:
      model: with that layer.
      states: [T, D], of `DeepseekV32.states`.
      batch: the step.
      after: of its tokens.
      drawn: int32 [R], from `batch.logit_rows`.
      cache: with the layer's own entries, which this step's tokens join.
      options: of the model.

    Returns:
      int32 [R], -1 behind a sibling's token that is not the first one's: the layer has not seen it; and the cache.
    """
    following = jnp.where(after.rows >= 0, drawn[after.rows], after.ids)
    ctx = StepContext(model.config, options, batch, options.seams())
    assert model.mtp is not None
    logits, cache = model.mtp(states, following, cache, ctx, batch.logit_rows)
    guessed = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jnp.where(drawn == following[batch.logit_rows], guessed, -1), cache


def take(planned: Step, tokens: list[int], drafts: np.ndarray, metrics: Metrics) -> list[int]:
    """Gives a step's sequences their next drafts, and counts which of its own were right.

    Args:
      planned: the step.
      tokens: that it drew.
      drafts: int32, behind them.
      metrics: take the counts.

    Returns:
      The tokens that count; see `Step.settle`.
    """
    settled = planned.settle(tokens)
    for sequence, token, guess in zip(planned.samples, settled, drafts[: len(settled)].tolist(), strict=True):
        if token >= 0:
            sequence.draft = guess
    tried = sum(part.draft >= 0 for part in planned.parts)
    metrics.drafted_tokens += tried
    metrics.accepted_tokens += tried - settled.count(-1)
    return settled
