"""A planned step as the one flat array that the device is given. On the host.

A single element of an array costs the host as much as a hundred of a list: what differs from token to token is put into
lists first, and all that follows from it is computed for all tokens at once.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dsv32_jax.engine.device_step import Shape
from dsv32_jax.engine.scheduler import Sequence, Step
from dsv32_jax.engine.speculation import set_after
from pallas_kernels.paging import slots_of

__all__ = ["Draw", "pack", "step_sizes", "table_widths"]

SMALLEST_STEP = 8
"""Tokens that the smallest step is padded to; each larger one has twice as many."""
LARGER_FOR_KERNELS = 4
"""With kernels four times as many: a few hundred tokens take little longer than one, since weights are read for either,
and each shape costs some ten seconds of compiling."""
NARROWEST_TABLE = 4
"""Blocks of the narrowest block tables; each wider one is `WIDER` times as wide."""
NARROWEST_FOR_KERNELS = 128
"""The same with kernels: they stop at a token's position, where references compute on the whole width."""
WIDER = 4


class Draw(NamedTuple):
    """How a row draws its token: see `SamplingParams`; `number` is that of the continuation."""

    seed: int
    number: int
    temperature: float
    top_p: float


def step_sizes(most: int, most_of_prompts: int, kernels: bool) -> list[int]:
    """Tokens that steps are padded to: of `Limits.tokens`, and of `Limits.prompt_tokens`."""
    sizes = multiplied(SMALLEST_STEP, most, LARGER_FOR_KERNELS if kernels else 2)
    return sorted({*sizes, max(sizes[-1], most_of_prompts)})


def table_widths(widest: int, kernels: bool) -> list[int]:
    """Blocks that block tables are padded to, up to those of the longest sequence."""
    return multiplied(min(NARROWEST_FOR_KERNELS if kernels else NARROWEST_TABLE, widest), widest, WIDER)


def multiplied(first: int, last: int, factor: int) -> list[int]:
    """first, first * factor, ... up to the first that is not less than `last`, which then takes its place."""
    found = [first]
    while found[-1] < last:
        found.append(found[-1] * factor)
    return [*found[:-1], max(last, first)]


def pack(planned: Step, shape: Shape, row_of: Mapping[Sequence, int], draws: list[Draw], speculate: bool) -> np.ndarray:
    """int32 [shape.size].

    Args:
      planned: the step; its sequences' tables have places for what it computes.
      shape: what it is padded to.
      row_of: where the step before draws a token that a sequence does not have yet.
      draws: of each row that draws; empty where all take the likeliest token.
      speculate: the step is followed by a draft.
    """
    flat = np.zeros(shape.size, np.int32)
    given = shape.parts(flat)
    for name in ("feed", "positions", "slots", "block_tables", "logit_rows", "after_rows"):
        given[name].fill(-1)
    ids: list[int] = []
    fed, feed, logit_rows, places = [], [], [], []
    for part, table in zip(planned.parts, given["block_tables"], strict=False):
        sequence = part.sequence
        assert sequence.table is not None
        table[: len(sequence.table.blocks)] = sequence.table.blocks
        ids += sequence.tokens[part.start : part.stop]
        if part.draft >= 0:
            ids.append(part.draft)
        elif part.stop > len(sequence.tokens):  # the last token is one that the step before draws
            fed.append(len(ids))
            feed.append(row_of[sequence])
            ids.append(0)
        for place in part.places:
            logit_rows.append(len(ids) - 1 + place - part.stop)
            places.append(place)
    sizes = [part.stop - part.start for part in planned.parts]
    sequence_of = np.repeat(np.arange(len(sizes)), sizes)
    behind = np.array([part.stop for part in planned.parts], np.int64) - np.cumsum(sizes, dtype=np.int64)
    positions = np.arange(len(ids)) + behind[sequence_of]
    slots = slots_of(positions, sequence_of, given["block_tables"])
    of_tokens = {"ids": ids, "sequence": sequence_of, "positions": positions, "slots": slots}
    for name, values in of_tokens.items():
        given[name][: len(ids)] = values
    given["feed"][fed] = feed
    for name, values in {"logit_rows": logit_rows, "places": places}.items():
        given[name][: len(places)] = values
    for name, values in zip(("seeds", "numbers", "temperature", "top_p"), zip(*draws, strict=True), strict=False):
        kind = np.float32 if name in ("temperature", "top_p") else np.int32
        given[name].view(kind)[: len(places)] = values
    if speculate:
        set_after(planned, given["after_ids"], given["after_rows"])
    return flat
