"""The block pool against a naive model of it, and against the contents of a memory that is written through it."""

import collections
import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from dsv32_jax.engine.blocks import BLOCK_SIZE, BlockPool, BlockTable, OutOfBlocks
from tests.harness import slots_of_table

TEXTS = [[(seed * 7 + i * i) % 11 for i in range(400)] for seed in range(3)]
"""Prompts are beginnings of these, so that they meet in the cache."""


@dataclasses.dataclass(eq=False)
class NaiveBlock:
    """A block of the model: its holders, its identity, and when it was last released."""

    holders: int = 0
    identity: tuple | None = None
    released: int = 0


@dataclasses.dataclass(eq=False)
class Sequence:
    """A table, its tokens, the model's blocks, and the number of tokens that have a place."""

    table: BlockTable
    tokens: list[int]
    blocks: list[NaiveBlock]
    length: int
    committed: int


class NaivePool:
    """The specification of `BlockPool`: every operation goes through all blocks."""

    def __init__(self, count: int):
        self.blocks = [NaiveBlock() for _ in range(count)]
        self.clock = self.evictions = 0

    def count(self, in_use: bool, known: bool) -> int:
        return sum((b.holders > 0) == in_use and (b.identity is not None) == known for b in self.blocks)

    def available(self) -> int:
        return sum(b.holders == 0 for b in self.blocks)

    def find(self, identity: tuple) -> NaiveBlock | None:
        return next((b for b in self.blocks if b.identity == identity), None)

    def take(self) -> NaiveBlock:
        unheld = [b for b in self.blocks if not b.holders]
        unknown = [b for b in unheld if b.identity is None]
        block = unknown[0] if unknown else min(unheld, key=lambda b: b.released)
        self.evictions += block.identity is not None
        block.identity, block.holders = None, 1
        return block

    def release(self, block: NaiveBlock) -> None:
        block.holders -= 1
        self.clock += 1
        block.released = self.clock


class Pools(RuleBasedStateMachine):
    """Sequences open, grow, fork and close in any order, in a pool that is often too small for them."""

    sequences = Bundle("sequences")

    @initialize(count=st.integers(1, 12))
    def start(self, count):
        self.pool, self.naive = BlockPool(count), NaivePool(count)
        self.memory = np.full((count, BLOCK_SIZE), -1)
        self.alive: list[Sequence] = []
        self.tokens_asked = self.tokens_found = 0

    @rule(
        target=sequences,
        text=st.sampled_from(TEXTS),
        length=st.integers(1, 400),
        unique=st.booleans(),
        salt=st.sampled_from([b"", b"tenant"]),
        room=st.sampled_from([0, 0, 70, 400]),
    )
    def open(self, text, length, unique, salt, room):
        prompt = [*text[: length - 1], 99] if unique else text[:length]
        shared_blocks = []
        for stop in range(BLOCK_SIZE, len(prompt), BLOCK_SIZE):
            block = self.naive.find((salt, *prompt[:stop]))
            if block is None:
                break
            shared_blocks.append(block)
        needed = -(-room // BLOCK_SIZE) - len(shared_blocks)
        available = self.naive.available() - sum(not block.holders for block in shared_blocks)
        if needed > available:
            before = self.pool.statistics()
            with pytest.raises(OutOfBlocks) as raised:
                self.pool.open(prompt, salt, room=room)
            assert (raised.value.needed, raised.value.available) == (needed, available)
            assert before == self.pool.statistics()
            return multiple()
        table = self.pool.open(prompt, salt, room=room)
        for block in shared_blocks:
            block.holders += 1
        assert table.length == len(shared_blocks) * BLOCK_SIZE < len(prompt)
        sequence = Sequence(table, prompt, shared_blocks, table.length, table.length)
        self.alive.append(sequence)
        self.tokens_asked, self.tokens_found = self.tokens_asked + len(prompt), self.tokens_found + table.length
        return sequence

    @rule(sequence=sequences, count=st.integers(0, 150), commit=st.booleans())
    def grow(self, sequence, count, commit):
        """Writes the next tokens: the rest of the prompt, then generated ones."""
        while len(sequence.tokens) < sequence.length + count:
            sequence.tokens.append(len(sequence.tokens) % 5)
        start, stop = sequence.length, sequence.length + count
        partly = start % BLOCK_SIZE > 0 and count > 0
        copied = partly and sequence.blocks[-1].holders > 1
        needed = -(-stop // BLOCK_SIZE) - len(sequence.blocks) + copied
        if needed > self.naive.available():
            before = self.pool.statistics(), sequence.table.blocks[:], sequence.table.length
            with pytest.raises(OutOfBlocks) as raised:
                self.pool.extend(sequence.table, stop)
            assert (raised.value.needed, raised.value.available) == (needed, self.naive.available())
            assert before == (self.pool.statistics(), sequence.table.blocks, sequence.table.length)
            return
        copies = self.pool.extend(sequence.table, stop)
        assert len(copies) == copied
        if copied:
            last = sequence.blocks.pop()
            sequence.blocks.append(self.naive.take())
            self.naive.release(last)
        while len(sequence.blocks) * BLOCK_SIZE < stop:
            sequence.blocks.append(self.naive.take())
        sequence.length = stop
        for source, target in copies:
            self.memory[target] = self.memory[source]
        slots = slots_of_table(sequence.table, start, stop)
        self.memory.reshape(-1)[slots] = sequence.tokens[start:stop]
        if commit:
            self.pool.commit(sequence.table, sequence.tokens, stop)
            for index in range(sequence.committed // BLOCK_SIZE, stop // BLOCK_SIZE):
                identity = (sequence.table.salt, *sequence.tokens[: (index + 1) * BLOCK_SIZE])
                block = sequence.blocks[index]
                if block.identity is None and self.naive.find(identity) is None:
                    block.identity = identity
            sequence.committed = stop

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence):
        for block in sequence.blocks:
            block.holders += 1
        other = dataclasses.replace(
            sequence,
            table=self.pool.fork(sequence.table),
            tokens=list(sequence.tokens),
            blocks=list(sequence.blocks),
        )
        self.alive.append(other)
        return other

    @rule(sequence=consumes(sequences))
    def close(self, sequence):
        self.pool.close(sequence.table)
        for block in reversed(sequence.blocks):
            self.naive.release(block)
        self.alive.remove(sequence)

    @rule()
    def forget(self):
        self.pool.forget()
        for block in self.naive.blocks:
            if not block.holders and block.identity:
                block.identity = None
                self.naive.evictions += 1

    @invariant()
    def each_sequence_reads_its_own_tokens(self):
        for sequence in self.alive:
            slots = slots_of_table(sequence.table, 0, sequence.length)
            assert self.memory.reshape(-1)[slots].tolist() == sequence.tokens[: sequence.length]

    @invariant()
    def references_are_exact(self):
        holders = collections.Counter(block for s in self.alive for block in s.table.blocks)
        assert self.pool._references == [holders[block] for block in range(self.pool.num_blocks)]
        for sequence in self.alive:
            assert [self.pool._references[b] for b in sequence.table.blocks] == [b.holders for b in sequence.blocks]

    @invariant()
    def blocks_are_in_one_place_each(self):
        pool = self.pool
        in_use = [block for block, count in enumerate(pool._references) if count]
        assert sorted([*pool._free, *pool._unused, *in_use]) == list(range(pool.num_blocks))
        assert {block: digest for digest, block in pool._block_of.items()} == {
            block: digest for block, digest in enumerate(pool._digest) if digest is not None
        }
        assert all(pool._digest[block] is not None for block in pool._unused)

    @invariant()
    def the_statistics_are_the_model_s(self):
        statistics, naive = self.pool.statistics(), self.naive
        filled = collections.Counter()
        for sequence in self.alive:
            for index, block in enumerate(sequence.table.blocks):
                filled[block] = max(filled[block], min(BLOCK_SIZE, sequence.length - index * BLOCK_SIZE))
        in_use = naive.count(True, True) + naive.count(True, False)
        assert (statistics.in_use, statistics.cached, statistics.free) == (
            in_use,
            naive.count(False, True),
            naive.count(False, False),
        )
        assert statistics.shared == sum(block.holders > 1 for block in naive.blocks)
        assert (statistics.tokens_asked, statistics.tokens_found) == (self.tokens_asked, self.tokens_found)
        assert statistics.evictions == naive.evictions
        empty = 1 - sum(filled.values()) / (in_use * BLOCK_SIZE) if in_use else 0
        assert statistics.internal_fragmentation == pytest.approx(empty) and statistics.external_fragmentation == 0


TestPools = Pools.TestCase
TestPools.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def fill(pool: BlockPool, tokens: list[int], salt: bytes = b"") -> BlockTable:
    table = pool.open(tokens, salt)
    pool.extend(table, len(tokens))
    pool.commit(table, tokens, len(tokens))
    return table


def test_a_prefix_is_shared_without_a_copy():
    pool = BlockPool(8)
    first = fill(pool, TEXTS[0][:200])
    second = pool.open([*TEXTS[0][:130], 7])
    assert second.blocks == first.blocks[:2] and second.length == 128
    assert pool.statistics().shared == 2
    assert pool.extend(second, 131) == [] and pool.statistics().in_use == 5


def test_the_last_token_of_a_prompt_is_always_computed():
    pool = BlockPool(8)
    pool.close(fill(pool, TEXTS[0][:128]))
    assert pool.open(TEXTS[0][:128]).length == 64
    assert pool.open(TEXTS[0][:129]).length == 128


def test_another_beginning_or_salt_shares_nothing():
    """A block's identity is also that of all before it."""
    pool = BlockPool(16)
    fill(pool, TEXTS[0][:129])
    assert pool.open([5, *TEXTS[0][1:129]]).length == 0
    assert pool.open(TEXTS[0][:129], b"tenant").length == 0
    assert pool.open(TEXTS[0][:129]).length == 128


def test_the_longest_unused_goes_first_and_of_a_prefix_its_end():
    pool = BlockPool(5)
    old, new = fill(pool, TEXTS[0][:129]), fill(pool, TEXTS[1][:65])
    pool.close(old)
    pool.close(new)
    assert (pool.statistics().cached, pool.statistics().free) == (3, 2)
    taken = pool.open([1, 2, 3])
    pool.extend(taken, 3 * BLOCK_SIZE)  # two free blocks, and one cached
    assert pool.open(TEXTS[0][:129]).length == 64 and pool.statistics().evictions == 1
    assert pool.open(TEXTS[1][:65]).length == 64


def test_a_fork_copies_only_the_block_that_it_writes():
    pool = BlockPool(8)
    first = fill(pool, TEXTS[0][:100])
    second = pool.fork(first)
    last = first.blocks[1]
    assert pool.extend(second, 101) == [(last, second.blocks[1])] and second.blocks[0] == first.blocks[0]
    assert pool.extend(first, 101) == []  # alone with it now
    third = pool.fork(first)
    pool.close(first)
    assert pool.extend(third, 102) == []


def test_slots_and_wrong_arguments():
    pool = BlockPool(4, sharing=False)
    table = fill(pool, TEXTS[0][:70])
    first, second = table.blocks
    assert slots_of_table(table, 62, 66).tolist() == [first * 64 + 62, first * 64 + 63, second * 64, second * 64 + 1]
    with pytest.raises(ValueError, match="length: 5; the sequence has 70 tokens already"):
        pool.extend(table, 5)
    with pytest.raises(ValueError, match="computed: 71"):
        pool.commit(table, TEXTS[0], 71)
    with pytest.raises(ValueError, match="num_blocks: 0"):
        BlockPool(0)
    assert pool.open(TEXTS[0][:70]).length == 0  # sharing=False
