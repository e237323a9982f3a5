"""Packs a planned step into the one flat array that the device is given. On the host.

A single element of an array costs the host as much as a hundred of a list: what differs from token to token is put into
lists first, and all that follows from it is computed for all tokens at once.
"""

from collections.abc import Mapping

import numpy as np

from dsv32_jax.engine.device_step import Shape
from dsv32_jax.engine.request import SamplingParams
from dsv32_jax.engine.scheduler import Sequence, Step
from dsv32_jax.engine.speculation import fill_next_tokens
from pallas_kernels.paging import slots_of

__all__ = ["pack", "step_sizes", "table_widths"]

SMALLEST_STEP = 8
"""Tokens that the smallest step is padded to."""
STEP_FACTOR = 2
"""From one size of a step to the next."""
STEP_FACTOR_FOR_KERNELS = 4
"""The same with kernels: a few hundred tokens take little longer than one, since weights are read for either, and each
shape costs some ten seconds of compiling."""
NARROWEST_TABLE = 4
"""Blocks of the narrowest block tables."""
NARROWEST_TABLE_FOR_KERNELS = 128
"""The same with kernels: they stop at a token's position, where references compute on the whole width."""
TABLE_FACTOR = 4
"""From one width of the block tables to the next."""


def step_sizes(max_tokens: int, max_prompt_tokens: int, kernels: bool) -> list[int]:
    """Tokens that steps are padded to, up to `Limits.tokens` and `Limits.prompt_tokens`."""
    sizes = geometric(SMALLEST_STEP, max_tokens, STEP_FACTOR_FOR_KERNELS if kernels else STEP_FACTOR)
    return sorted({*sizes, max(sizes[-1], max_prompt_tokens)})


def table_widths(widest: int, kernels: bool) -> list[int]:
    """Blocks that block tables are padded to, up to those of the longest sequence."""
    narrowest = NARROWEST_TABLE_FOR_KERNELS if kernels else NARROWEST_TABLE
    return geometric(min(narrowest, widest), widest, TABLE_FACTOR)


def geometric(first: int, last: int, factor: int) -> list[int]:
    """first, first * factor, ... up to the first that is not less than `last`, which then takes its place."""
    values = [first]
    while values[-1] < last:
        values.append(values[-1] * factor)
    return [*values[:-1], max(last, first)]


def pack(
    step: Step,
    shape: Shape,
    previous_rows: Mapping[Sequence, int],
    sampling: list[tuple[SamplingParams, int]],
    speculate: bool,
) -> np.ndarray:
    """Packs a step into int32 [shape.size]; see `Shape.parts`.

    Args:
      step: planned; its sequences' tables have places for what it computes.
      shape: to pad it to.
      previous_rows: the row of the previous step that samples a token, by the sequence that does not have it yet.
      sampling: for each row its parameters and the number of its completion; empty where all take the likeliest token.
      speculate: whether a draft follows the step.
    """
    flat = np.zeros(shape.size, np.int32)
    arrays = shape.parts(flat)
    for name in ("previous_rows", "positions", "slots", "block_tables", "logit_rows", "next_rows"):
        arrays[name].fill(-1)
    ids: list[int] = []
    unknown, unknown_rows = [], []  # tokens that the previous step samples, and the rows that do
    logit_rows, sample_positions = [], []
    for part, table in zip(step.parts, arrays["block_tables"], strict=False):
        sequence = part.sequence
        assert sequence.table is not None
        table[: len(sequence.table.blocks)] = sequence.table.blocks
        ids += sequence.tokens[part.start : part.stop]
        if part.draft >= 0:
            ids.append(part.draft)
        elif part.stop > len(sequence.tokens):
            unknown.append(len(ids))
            unknown_rows.append(previous_rows[sequence])
            ids.append(0)
        for position in part.sample_positions:
            logit_rows.append(len(ids) - 1 + position - part.stop)
            sample_positions.append(position)
    lengths = [part.stop - part.start for part in step.parts]
    sequence_of = np.repeat(np.arange(len(lengths)), lengths)
    # Position of a token less its index in the step, for each part.
    offsets = np.array([part.stop for part in step.parts], np.int64) - np.cumsum(lengths, dtype=np.int64)
    positions = np.arange(len(ids)) + offsets[sequence_of]
    slots = slots_of(positions, sequence_of, arrays["block_tables"])
    token_values = {"ids": ids, "sequence": sequence_of, "positions": positions, "slots": slots}
    for name, values in token_values.items():
        arrays[name][: len(ids)] = values
    arrays["previous_rows"][unknown] = unknown_rows
    rows = len(sample_positions)
    arrays["logit_rows"][:rows] = logit_rows
    arrays["sample_positions"][:rows] = sample_positions
    if sampling:
        arrays["seeds"][:rows] = [params.seed for params, _ in sampling]
        arrays["completions"][:rows] = [completion for _, completion in sampling]
        arrays["temperature"].view(np.float32)[:rows] = [params.temperature or 0.0 for params, _ in sampling]
        arrays["top_p"].view(np.float32)[:rows] = [params.top_p or 1.0 for params, _ in sampling]
    if speculate:
        fill_next_tokens(step, arrays["next_ids"], arrays["next_rows"])
    return flat
