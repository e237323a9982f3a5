"""A plan as one flat array, against what each token and each row says of itself."""

import numpy as np
import pytest

from dsv32_jax.engine.blocks import BLOCK_SIZE, BlockPool
from dsv32_jax.engine.device_step import Shape
from dsv32_jax.engine.packing import Draw, pack
from dsv32_jax.engine.scheduler import Limits, Scheduler, Sequence

SHAPE = Shape(tokens=256, width=4, sequences=8, rows=8)


@pytest.fixture
def plans():
    """Three steps: a prompt with a sibling and the begin of another, then drawn tokens that the host has not seen."""
    scheduler = Scheduler(BlockPool(16), Limits(100, 8))
    first = Sequence(list(range(100, 170)), 8)
    first.siblings = [Sequence(list(first.tokens), 8)]
    scheduler.add(first)
    scheduler.add(Sequence(list(range(200, 290)), 8))
    rows, found = {}, []
    for _ in range(3):
        planned = scheduler.schedule()
        blocks = [part.sequence.table.blocks[:] for part in planned.parts]  # a sibling's write changes them later
        found.append((planned, rows, blocks, pack(planned, SHAPE, rows, [], False)))
        rows = {sequence: row for row, sequence in enumerate(planned.samples)}
    return found


def test_every_token_has_its_id_position_slot_and_sequence(plans):
    for planned, rows, tables, flat in plans:
        given, at = SHAPE.parts(flat), 0
        for number, (part, blocks) in enumerate(zip(planned.parts, tables, strict=True)):
            sequence, written = part.sequence, given["block_tables"][number].tolist()
            assert written == [*blocks, *[-1] * (SHAPE.width - len(blocks))]
            for position in range(part.start, part.stop):
                known = position < len(sequence.tokens)
                assert given["ids"][at] == (sequence.tokens[position] if known else 0)
                assert given["feed"][at] == (-1 if known else rows[sequence])
                assert given["positions"][at] == position and given["sequence"][at] == number
                assert given["slots"][at] == blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
                at += 1
        assert at == planned.tokens > 0
        for name in ("positions", "slots", "feed"):
            assert (given[name][at:] == -1).all()


def test_every_row_draws_behind_the_last_token_of_its_part(plans):
    assert [len(planned.samples) for planned, *_ in plans] == [2, 3, 3]  # with the sibling; with the second prompt
    for planned, *_, flat in plans:
        given, row, end = SHAPE.parts(flat), 0, 0
        for part in planned.parts:
            end += part.stop - part.start
            for _ in part.samples:
                assert given["logit_rows"][row] == end - 1 and given["places"][row] == part.stop
                row += 1
        assert (given["logit_rows"][row:] == -1).all()


def test_how_rows_draw(plans):
    planned, rows, *_ = plans[1]
    draws = [Draw(7, 0, 0.5, 0.9), Draw(7, 1, 0.5, 0.9), Draw(2**31 - 1, 0, 0.0, 1.0)]
    given = SHAPE.parts(pack(planned, SHAPE, rows, draws, False))
    assert given["seeds"][:3].tolist() == [7, 7, 2**31 - 1] and given["numbers"][:3].tolist() == [0, 1, 0]
    assert given["temperature"].view(np.float32)[:3].tolist() == [0.5, 0.5, 0.0]
    np.testing.assert_array_equal(given["top_p"].view(np.float32)[:3], np.float32([0.9, 0.9, 1.0]))
