"""A planned step as the one flat array that the device is given. On the host.

A single element of an array costs the host as much as a hundred of a list: what differs from token to token is put into
lists first, and all that follows from it is computed for all tokens at once.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dsv32_jax.device_step import Shape
from dsv32_jax.scheduler import Sequence, Step
from dsv32_jax.speculation import set_after
from pallas_kernels.paging import slots_of

__all__ = ["Draw", "pack"]


class Draw(NamedTuple):
    """How a row draws its token: see `SamplingParams`; `number` is that of the continuation."""

    seed: int
    number: int
    temperature: float
    top_p: float


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
