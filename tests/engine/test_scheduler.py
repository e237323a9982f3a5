"""Planned steps run on a memory of tokens instead of a model: each step must read the tokens of its sequences."""

import hashlib
from collections import Counter
from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from dsv32_jax.engine.blocks import BLOCK_SIZE, BlockPool
from dsv32_jax.engine.scheduler import Limits, Scheduler, Sequence
from tests.harness import slots_of_table


def next_token(tokens: list[int], seed: int) -> int:
    """The next token by the model of these tests."""
    return hashlib.sha256(np.asarray([seed, *tokens], np.int64).tobytes()).digest()[0]


def right(tokens: list[int], seed: int) -> int:
    """A draft that equals the model's next token."""
    return next_token(tokens, seed)


def wrong(tokens: list[int], seed: int) -> int:
    return (next_token(tokens, seed) + 1) % 256


def mixed(tokens: list[int], seed: int) -> int:
    """A draft that is right, wrong, or missing."""
    return (right(tokens, seed), wrong(tokens, seed), -1, right(tokens, seed))[tokens[-1] % 4]


class Machine:
    """Runs steps as an engine does, each planned before the tokens of the previous one are known.

    With a `guess` at the token behind some tokens, instead as one that speculates.
    """

    def __init__(self, blocks: int, limits: Limits, guess: Callable[[list[int], int], int] | None = None):
        self.guess = guess
        self.pool = BlockPool(blocks)
        self.scheduler = Scheduler(self.pool, limits)
        self.memory = np.full((blocks, BLOCK_SIZE), -1)
        self.seeds: dict[Sequence, int] = {}
        self.arrival: dict[Sequence, int] = {}
        self.drawn: dict[Sequence, list[int]] = {}
        self.late = None  # a step that ran, whose tokens are not known yet
        self.preemptions = 0

    def add(self, prompt, new, seed=0, continuations=1):
        first, *siblings = (Sequence(list(prompt), new) for _ in range(continuations))
        first.siblings = siblings
        for n, sequence in enumerate((first, *siblings)):
            self.seeds[sequence], self.drawn[sequence] = seed + n, []
            self.arrival[sequence] = len(self.arrival)
        self.scheduler.add(first)
        return [first, *siblings]

    def step(self) -> bool:
        """Plans and runs a step, then receives the tokens of the previous one; False if there was nothing to do."""
        planned = self.scheduler.schedule()
        result = None
        if planned is not None:
            self.check_plan(planned)
            result = planned, self.run(planned)
        late, self.late = (self.late, result) if self.guess is None else (result, None)
        if late is not None:
            self.scheduler.receive(*late)
            for sequence in late[0].receivers:
                if not sequence.finished and len(sequence.tokens) - sequence.prompt_length >= sequence.max_new_tokens:
                    self.scheduler.finish(sequence)
        self.check_pool()
        return planned is not None or late is not None

    def run(self, planned) -> list[int]:
        self.scheduler.publish(planned)
        for source, target in planned.copies:
            self.memory[target] = self.memory[source]
        whole = {}
        for part in planned.parts:
            # All its tokens, also those that the scheduler does not know yet.
            known = [*part.sequence.tokens[: part.sequence.prompt_length], *self.drawn[part.sequence]]
            if part.draft >= 0:
                known.append(part.draft)
            slots = slots_of_table(part.sequence.table, part.start, part.stop)
            self.memory.reshape(-1)[slots] = known[part.start : part.stop]
            whole[part.sequence] = known
        tokens = []
        for part in planned.parts:
            # What attention would read: everything before the part's end, through the table.
            assert self.read(part.sequence, part.stop) == whole[part.sequence][: part.stop]
            for sequence, position in zip(part.receivers, part.sample_positions, strict=True):
                tokens.append(next_token(whole[part.sequence][:position], self.seeds[sequence]))
        tokens = planned.settle(tokens)
        for sequence, token in zip(planned.receivers, tokens, strict=True):
            if token >= 0:
                self.drawn[sequence].append(token)
                if self.guess is not None:
                    known = [*sequence.tokens[: sequence.prompt_length], *self.drawn[sequence]]
                    sequence.draft = self.guess(known, self.seeds[sequence])
        return tokens

    def read(self, sequence, stop):
        return self.memory.reshape(-1)[slots_of_table(sequence.table, 0, stop)].tolist()

    def check_plan(self, planned):
        limits = self.scheduler.limits
        assert 0 < planned.tokens <= max(limits.tokens, limits.prompt_tokens)
        assert len(self.scheduler.running) <= limits.sequences
        assert max(Counter(planned.receivers).values(), default=0) <= (1 if self.guess is None else 2)
        assert len({part.sequence for part in planned.parts}) == len(planned.parts)
        slots = [slot for part in planned.parts for slot in slots_of_table(part.sequence.table, part.start, part.stop)]
        assert len(set(slots)) == len(slots)
        written = {slot // BLOCK_SIZE for slot in slots}
        assert all(self.pool._references[block] == 1 or self.begins_here(planned, block) for block in written)
        running = self.scheduler.running
        arrivals = [self.arrival[s] for s in (*running, *self.scheduler.waiting)]
        assert arrivals == sorted(arrivals)
        if not planned.preempted:  # each running sequence that wants a token gets one
            assert {part.sequence for part in planned.parts} | set(planned.receivers) >= {
                s for s in running if s.uncomputed
            }
        self.preemptions += len(planned.preempted)

    @staticmethod
    def begins_here(planned, block):
        """Whether a block is shared because siblings begin with the tokens that this step computes."""
        return any(len(part.receivers) > 1 and block in part.sequence.table.blocks for part in planned.parts)

    def check_pool(self):
        blocks = sum(len(s.table.blocks) for s in self.scheduler.running)
        assert sum(self.pool._references) == blocks
        assert all(sequence.table is None for sequence in self.scheduler.waiting)

    def finish_all(self, max_steps: int):
        for _ in range(max_steps):
            if not self.step():
                break
        assert not self.scheduler.running and not self.scheduler.waiting, "it does not end"
        assert self.pool.statistics().in_use == 0


REQUEST = st.tuples(
    st.integers(0, 2),  # which text
    st.integers(1, 300),  # tokens of the prompt
    st.integers(1, 90),  # new ones
    st.integers(1, 3),  # continuations
    st.integers(0, 12),  # steps before it comes
    st.sampled_from([None, None, None, 1, 5, 20]),  # steps until it is given up
)
TEXTS = [[(seed * 5 + i * i) % 7 for i in range(300)] for seed in range(3)]


def tokens_alone(prompt, new, seed):
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(next_token(tokens, seed))
    return tokens


@settings(max_examples=250, deadline=None)
@given(
    st.lists(REQUEST, min_size=1, max_size=8),
    st.integers(7, 20),
    st.integers(3, 150),
    st.integers(3, 6),
    st.sampled_from([0, 0, 1, 100]),
    st.sampled_from([None, right, wrong, mixed]),
)
def test_every_sequence_gets_what_it_gets_alone(requests, blocks, tokens, sequences, extra, guess):
    tokens = max(tokens, sequences)
    machine = Machine(blocks, Limits(tokens, sequences, tokens + extra if extra else 0), guess)
    alive, given_up = [], set()
    for clock in range(40):
        for number, (text, length, new, continuations, comes, leaves) in enumerate(requests):
            if clock == comes:
                group = machine.add(TEXTS[text][:length], new, 10 * number, continuations)
                alive.append((group, clock + leaves if leaves else None))
        for group, end in alive:
            if clock == end:
                given_up.update(sequence for sequence in group if not sequence.finished)
                for sequence in group:
                    machine.scheduler.finish(sequence)
        machine.step()
    machine.finish_all(20_000)
    for group, _ in alive:
        for sequence in group:
            want = tokens_alone(
                sequence.tokens[: sequence.prompt_length], sequence.max_new_tokens, machine.seeds[sequence]
            )
            assert sequence.finished
            assert (
                sequence.tokens == want if sequence not in given_up else sequence.tokens == want[: len(sequence.tokens)]
            )


def test_a_small_pool_preempts_the_youngest_and_loses_nothing():
    machine = Machine(5, Limits(64, 4))
    added = [machine.add(TEXTS[n][:100], 100, n)[0] for n in range(3)]
    machine.finish_all(2000)
    assert machine.preemptions > 0
    for n, sequence in enumerate(added):
        assert sequence.tokens == tokens_alone(TEXTS[n][:100], 100, n)


def test_who_waits_for_a_token_in_flight_is_not_read_without_it():
    """Steps are planned ahead of results; a sequence that was preempted meanwhile begins again with all its tokens."""
    pool = BlockPool(3)
    scheduler = Scheduler(pool, Limits(256, 2))
    old, young = Sequence([1] * 60, 30), Sequence([2] * 60, 30)
    scheduler.add(old)
    scheduler.add(young)
    steps = []
    while not (steps and steps[-1].preempted):
        steps.append(scheduler.schedule())
    assert steps[-1].preempted == [young] and young.in_flight == len(steps) - 1
    steps.append(scheduler.schedule())
    assert [part.sequence for part in steps[-1].parts] == [old]
    scheduler.finish(old)
    assert scheduler.schedule() is None
    for step in steps:
        scheduler.receive(step, range(len(step.receivers)))
    (part,) = scheduler.schedule().parts
    assert (part.sequence, part.stop) == (young, 60 + len(steps) - 2)


def test_running_sequences_go_on_while_a_long_prompt_is_read():
    machine = Machine(40, Limits(16, 4))
    first = machine.add(TEXTS[0][:10], 50)[0]
    machine.step()
    long = machine.add(TEXTS[1][:300], 2)[0]
    for _ in range(10):
        before = first.length
        machine.step()
        assert first.length == before + 1 and long.computed > 0
    machine.finish_all(200)


def test_prompts_are_read_in_longer_pieces_while_nothing_is_continued():
    machine = Machine(40, Limits(16, 4, 200))
    first, second = (machine.add(TEXTS[n][:150], 20)[0] for n in range(2))
    machine.step()
    assert (first.computed, second.computed) == (150, 50)  # the step continues nobody
    machine.step()
    assert (first.computed, second.computed) == (151, 65)
    machine.finish_all(200)


def test_a_prompt_of_several_continuations_is_read_once():
    machine = Machine(20, Limits(256, 4))
    machine.add(TEXTS[0][:200], 5, continuations=3)
    planned = machine.scheduler.schedule()
    assert planned.tokens == 200 and len(planned.receivers) == 3
    assert machine.pool.statistics().in_use == 4
    machine.run(planned)
    again = machine.scheduler.schedule()
    assert again.tokens == 3 and len(again.copies) == 2


def test_a_shared_prefix_is_not_computed_again():
    machine = Machine(20, Limits(256, 4))
    machine.add(TEXTS[0][:200], 1)
    machine.step()
    other = machine.add([*TEXTS[0][:150], 9, 9], 1)[0]
    planned = machine.scheduler.schedule()
    assert planned.parts[0].start == 128 and planned.tokens == 24 and other.table.blocks[:2]


@pytest.mark.parametrize(("guess", "steps"), [(right, 2 + 44), (wrong, 90)])
def test_a_right_draft_is_a_token_more_a_step(guess, steps):
    """The prompt's step samples one token, each other two; the 90th comes alone."""
    machine = Machine(4, Limits(64, 1), guess)
    machine.add(TEXTS[0][:50], 90)
    count = 0
    while machine.scheduler.waiting or machine.scheduler.running:
        machine.step()
        count += 1
    assert count == steps


def test_drafts_take_what_is_left_and_let_others_begin():
    machine = Machine(20, Limits(5, 4), right)
    for n in range(3):
        machine.add(TEXTS[n][:1], 50, n)
    machine.step()
    planned = machine.scheduler.schedule()
    assert [part.draft >= 0 for part in planned.parts] == [True, True, False] and planned.tokens == 5

    machine = Machine(20, Limits(5, 4), right)
    for n in range(3):
        machine.add(TEXTS[n][:1], 50, n)
    machine.step()
    machine.add(TEXTS[0][:20], 9, 3)
    planned = machine.scheduler.schedule()
    assert [part.draft >= 0 for part in planned.parts] == [True, False, False, False] and planned.tokens == 5


def test_a_draft_costs_nobody_a_block():
    """A draft is left out where there is no block for it; the token itself then takes that of a younger sequence."""
    machine = Machine(2, Limits(256, 2), wrong)
    for n in range(2):
        machine.add(TEXTS[n][:62], 60, n)
    seen = []
    while not machine.preemptions:
        planned = machine.scheduler.schedule()
        machine.check_plan(planned)
        seen.append([part.draft >= 0 for part in planned.parts])
        machine.scheduler.receive(planned, machine.run(planned))
    assert seen == [[False, False], [True, True], [False, False], [False]]
    machine.finish_all(500)
    assert all(len(tokens) == 60 for tokens in machine.drawn.values())


def test_places_are_enough_for_what_fits_exactly():
    """The last token but one has no draft, which would need a place beyond those of the request."""
    machine = Machine(2, Limits(256, 1), right)
    sequence = machine.add(TEXTS[0][:100], 29)[0]
    machine.finish_all(100)
    assert sequence.tokens == tokens_alone(TEXTS[0][:100], 29, 0) and not machine.preemptions


def test_a_block_with_a_wrong_draft_is_not_found():
    machine = Machine(4, Limits(256, 1), wrong)
    sequence = machine.add(TEXTS[0][:62], 60)[0]
    machine.step()
    planned = machine.scheduler.schedule()
    assert planned.parts[0].stop == 64 and planned.parts[0].draft >= 0  # the draft ends the block
    machine.scheduler.receive(planned, machine.run(planned))
    assert not sequence.table.digests
    machine.step()
    assert len(sequence.table.digests) == 1


def test_what_can_never_run_is_refused():
    scheduler = Scheduler(BlockPool(2), Limits(8, 2))
    with pytest.raises(ValueError, match="129 tokens are more than the whole cache holds, 128"):
        scheduler.add(Sequence([1] * 100, 30))
    scheduler.add(Sequence([1] * 100, 29))
    with pytest.raises(ValueError, match="3 continuations of one prompt; at most 2"):
        scheduler.add(Sequence([1], 1, siblings=[Sequence([1], 1), Sequence([1], 1)]))
    with pytest.raises(ValueError, match="sequences: 9"):
        Limits(8, 9)
    with pytest.raises(ValueError, match="prompt_tokens: 7; must be no fewer than any step's, 8"):
        Limits(8, 2, 7)
