"""A planned step as one flat array, against the values of each token and each row."""

import numpy as np
import pytest

from dsv32_jax.engine.blocks import BLOCK_SIZE, BlockPool
from dsv32_jax.engine.device_step import Shape
from dsv32_jax.engine.packing import pack
from dsv32_jax.engine.request import SamplingParams
from dsv32_jax.engine.scheduler import Limits, Scheduler, Sequence

SHAPE = Shape(tokens=256, width=4, sequences=8, rows=8)


@pytest.fixture
def plans():
    """Three steps: a prompt with a sibling and the begin of another, then sampled tokens that the host has not seen."""
    scheduler = Scheduler(BlockPool(16), Limits(100, 8))
    first = Sequence(list(range(100, 170)), 8)
    first.siblings = [Sequence(list(first.tokens), 8)]
    scheduler.add(first)
    scheduler.add(Sequence(list(range(200, 290)), 8))
    rows, plans = {}, []
    for _ in range(3):
        planned = scheduler.schedule()
        blocks = [part.sequence.table.blocks[:] for part in planned.parts]  # a sibling's write changes them later
        plans.append((planned, rows, blocks, pack(planned, SHAPE, rows, [], False)))
        rows = {sequence: row for row, sequence in enumerate(planned.receivers)}
    return plans


def test_every_token_has_its_id_position_slot_and_sequence(plans):
    for planned, rows, tables, flat in plans:
        arrays, index = SHAPE.parts(flat), 0
        for number, (part, blocks) in enumerate(zip(planned.parts, tables, strict=True)):
            sequence, table = part.sequence, arrays["block_tables"][number].tolist()
            assert table == [*blocks, *[-1] * (SHAPE.width - len(blocks))]
            for position in range(part.start, part.stop):
                known = position < len(sequence.tokens)
                assert arrays["ids"][index] == (sequence.tokens[position] if known else 0)
                assert arrays["previous_rows"][index] == (-1 if known else rows[sequence])
                assert arrays["positions"][index] == position and arrays["sequence"][index] == number
                assert arrays["slots"][index] == blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
                index += 1
        assert index == planned.tokens > 0
        for name in ("positions", "slots", "previous_rows"):
            assert (arrays[name][index:] == -1).all()


def test_every_row_draws_behind_the_last_token_of_its_part(plans):
    assert [len(planned.receivers) for planned, *_ in plans] == [2, 3, 3]  # with the sibling; with the second prompt
    for planned, *_, flat in plans:
        arrays, row, end = SHAPE.parts(flat), 0, 0
        for part in planned.parts:
            end += part.stop - part.start
            for _ in part.receivers:
                assert arrays["logit_rows"][row] == end - 1 and arrays["sample_positions"][row] == part.stop
                row += 1
        assert (arrays["logit_rows"][row:] == -1).all()


def test_the_sampling_parameters_of_rows(plans):
    planned, rows, *_ = plans[1]
    first, second = SamplingParams(None, 0.5, 0.9, seed=7), SamplingParams(None, 0.0, 1.0, seed=2**31 - 1)
    arrays = SHAPE.parts(pack(planned, SHAPE, rows, [(first, 0), (first, 1), (second, 0)], False))
    assert arrays["seeds"][:3].tolist() == [7, 7, 2**31 - 1] and arrays["completions"][:3].tolist() == [0, 1, 0]
    assert arrays["temperature"].view(np.float32)[:3].tolist() == [0.5, 0.5, 0.0]
    np.testing.assert_array_equal(arrays["top_p"].view(np.float32)[:3], np.float32([0.9, 0.9, 1.0]))
