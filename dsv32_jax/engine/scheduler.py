"""What the next step runs: which sequences, which of their tokens, in which blocks. On the host, without JAX.

A step is a flat batch of tokens. Every running sequence gets a place first, the oldest before the others: one token
where it is being continued, a piece of its prompt where that is not read yet. What is left of the step's tokens goes to
waiting sequences. Where blocks run out, the youngest running sequence gives its own back and waits again, before those
that came later; what it has computed may still be found in the pool, and else is computed anew.

A planned step is run, and then published: only blocks that a started step writes can be found by others. It may be
planned before the tokens of the one before it are known: they are `in_flight`, and only their number counts here.

A sequence may have a draft: a guess at the token behind its last one. Both then go into one step, and each draws a
token; the second one is only of use if the draft is what the first drew. How many tokens come is known when the step
has run: whoever gives drafts takes a step's tokens before the next is planned.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from dsv32_jax.engine.blocks import BLOCK_SIZE, BlockPool, BlockTable, OutOfBlocks

__all__ = ["Limits", "Part", "Scheduler", "Sequence", "Step"]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one step may hold.

    Attributes:
      tokens: in a step, at most; prompts are read in pieces that fit.
      sequences: that run at a time, at most.
      prompt_tokens: in a step that continues no sequence, so that none waits for it; no fewer. `tokens` where 0.
    """

    tokens: int
    sequences: int
    prompt_tokens: int = 0

    def __post_init__(self) -> None:
        if 0 < self.prompt_tokens < self.tokens:
            raise ValueError(f"prompt_tokens: {self.prompt_tokens}; must be no fewer than any step's, {self.tokens}")
        if not 1 <= self.sequences <= self.tokens:
            raise ValueError(
                f"sequences: {self.sequences}; must be from 1 to the tokens of a step, {self.tokens}: each running "
                f"sequence gets one"
            )


@dataclasses.dataclass(eq=False, slots=True)
class Sequence:
    """One continuation of one prompt.

    Attributes:
      tokens: ids of the prompt, and of what has come after it so far.
      max_new_tokens: how many may come.
      salt: see `BlockTable`.
      siblings: other continuations of the same prompt, which begin when it has been read.
      prompt: how many of `tokens` are the prompt's.
      in_flight: tokens drawn in steps whose results are not known yet.
      computed: tokens that are in the cache, or in a planned step.
      table: its blocks; None while it waits.
      finished: it has ended, and is in no queue.
      draft: what the token behind the last may be; -1: no guess.
    """

    tokens: list[int]
    max_new_tokens: int
    salt: bytes = b""
    siblings: list["Sequence"] = dataclasses.field(default_factory=list)
    prompt: int = dataclasses.field(init=False)
    in_flight: int = 0
    computed: int = 0
    table: BlockTable | None = None
    finished: bool = False
    draft: int = -1

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens that it has, known or in flight."""
        return len(self.tokens) + self.in_flight

    @property
    def wanted(self) -> int:
        """Tokens that are to be computed now; 0 where the last one has been drawn."""
        length = self.length
        return 0 if length - self.prompt >= self.max_new_tokens else length - self.computed


class Part(NamedTuple):
    """Tokens start..stop of a sequence in a step; its table has places for them.

    Attributes:
      sequence: whose.
      start, stop: their positions.
      samples: sequences that draw a token from the logits of the last of them: the sequence, if it is complete with
        that, and those of its siblings that begin here. With a draft, the sequence twice: from the last two.
      draft: the last token, where it is a guess; else -1.
    """

    sequence: Sequence
    start: int
    stop: int
    samples: tuple[Sequence, ...]
    draft: int = -1

    @property
    def places(self) -> list[int]:
        """Positions of the tokens that `samples` draw."""
        return [self.stop] * len(self.samples) if self.draft < 0 else [self.stop - 1, self.stop]


@dataclasses.dataclass(frozen=True)
class Step:
    """A planned step.

    Attributes:
      parts: of different sequences.
      copies: (source, target) blocks to be copied before it.
      preempted: sequences that had to give back their blocks for it.
    """

    parts: list[Part]
    copies: list[tuple[int, int]]
    preempted: list[Sequence]

    @functools.cached_property
    def tokens(self) -> int:
        """How many it computes."""
        return sum(part.stop - part.start for part in self.parts)

    @functools.cached_property
    def samples(self) -> list[Sequence]:
        """Who draws a token, in the order of the parts."""
        return [sequence for part in self.parts for sequence in part.samples]

    def settle(self, tokens: list[int]) -> list[int]:
        """What was drawn, in the order of `samples`, with -1 for what came behind a draft that was wrong."""
        settled, row = list(tokens), 0
        for part in self.parts:
            if part.draft >= 0 and tokens[row] != part.draft:
                settled[row + 1] = -1
            row += len(part.samples)
        return settled


class Scheduler:
    """The queues of waiting and running sequences, and the pool that they share.

    `running` and behind it `waiting` are in the order of arrival: who waits first runs next, behind the others, and who
    runs last waits next, before the others.

    Args:
      pool: blocks of the cache.
      limits: of a step.
    """

    def __init__(self, pool: BlockPool, limits: Limits):
        self.pool = pool
        self.limits = limits
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def check(self, sequence: Sequence) -> None:
        """Raises `ValueError` where a sequence could never run: too many siblings, or more tokens than the whole cache
        holds.
        """
        together = 1 + len(sequence.siblings)
        if together > self.limits.sequences:
            raise ValueError(f"{together} continuations of one prompt; at most {self.limits.sequences} run at a time")
        # The last token that is drawn needs no place.
        needed, room = sequence.length + sequence.max_new_tokens - 1, self.pool.num_blocks * BLOCK_SIZE
        if needed > room:
            raise ValueError(f"{needed} tokens are more than the whole cache holds, {room}")

    def add(self, sequence: Sequence) -> None:
        """A new sequence, with its siblings, at the end of the queue; raises what `check` does."""
        self.check(sequence)
        self.waiting.append(sequence)

    def schedule(self) -> Step | None:
        """Plans the next step; None if there is nothing to compute now. The one before has been published."""
        parts: list[Part] = []
        copies: list[tuple[int, int]] = []
        preempted: list[Sequence] = []
        continues = any(one.table and one.wanted and one.computed >= one.prompt for one in self.running)
        budget = self.limits.tokens if continues else self.limits.prompt_tokens or self.limits.tokens
        spare = budget - len(self.running) - bool(self.waiting)  # for drafts: those tokens are in nobody's way
        # Who comes later begins when all before it have read their prompts: each but the last wants one token at most.
        for sequence in list(self.running):
            count = min(sequence.wanted, budget)
            if sequence.table is None or not count:  # an older one has its blocks now, or its last token was drawn
                continue
            found = self._places_with_draft(sequence) if sequence.draft >= 0 and spare > 0 else None
            if drafted := found is not None:
                count, spare = count + 1, spare - 1
            else:
                found = self._places(sequence, count, preempted)
            if found is not None:
                copies += found
                parts.append(self._part(sequence, count, drafted))
                budget -= count
        while self.waiting and not preempted and budget:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            count = min(sequence.wanted, budget)
            self.pool.extend(self._table(sequence), sequence.computed + count)  # behind whole blocks: nothing to copy
            parts.append(self._part(sequence, count))
            budget -= count
        return Step(parts, copies, preempted) if parts else None

    def publish(self, step: Step) -> None:
        """A step has been started: what later ones plan may begin with what it computes."""
        for part in step.parts:
            self._commit(part.sequence)

    def receive(self, step: Step, tokens: Iterable[int]) -> None:
        """The tokens that a step drew, as `Step.settle` gives them; those of finished sequences are dropped."""
        samples = step.samples
        for sequence, token in zip(samples, tokens, strict=True):
            sequence.in_flight -= 1
            if sequence.finished:
                continue
            if token >= 0:
                sequence.tokens.append(token)
            else:
                sequence.computed -= 1  # the draft's: it keeps its place, for the token that belongs there
        for sequence in samples:  # only now: what is computed of a sequence is known after its last row
            self._commit(sequence)

    def finish(self, sequence: Sequence) -> None:
        """A sequence ends, wherever it is; its blocks are released. Siblings that have not begun go with it."""
        for sibling in sequence.siblings:
            sibling.finished = True
        sequence.siblings = []
        if sequence.finished:
            return
        sequence.finished = True
        if sequence in self.running:
            self.running.remove(sequence)
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        self._close(sequence)

    def clear(self) -> None:
        """Ends all sequences, whatever was under way; all blocks are free, and none can be found."""
        for sequence in (*self.running, *self.waiting):
            sequence.finished, sequence.table = True, None
        self.running.clear()
        self.waiting.clear()
        self.pool.reset()

    # ---- helpers ----

    def _places(self, sequence: Sequence, count: int, preempted: list[Sequence]) -> list[tuple[int, int]] | None:
        """Places for a running sequence's next tokens, at the cost of younger ones; None if it had to go itself."""
        while True:
            try:
                return self.pool.extend(self._table(sequence), sequence.computed + count)
            except OutOfBlocks:
                victim = self.running.pop()
                self._close(victim)
                self.waiting.appendleft(victim)
                preempted.append(victim)
                if victim is sequence:
                    return None

    def _places_with_draft(self, sequence: Sequence) -> list[tuple[int, int]] | None:
        """Places for a sequence's last token and its draft; None if that is of no use, or would cost another's blocks.

        The last token that may be drawn needs no draft behind the one before it. So no sequence ever has more places
        than without drafts, and `add` need not know of them.
        """
        assert sequence.wanted == 1
        if sequence.length - sequence.prompt + 1 >= sequence.max_new_tokens:
            return None
        try:
            return self.pool.extend(self._table(sequence), sequence.length + 1)
        except OutOfBlocks:
            return None

    def _admit(self, sequence: Sequence) -> bool:
        """Lets the first waiting sequence run, if there is room for all that it has so far."""
        if sequence.in_flight:  # it was preempted while a token was being drawn, which is not known yet
            return False
        if len(self.running) + 1 + len(sequence.siblings) > self.limits.sequences:
            return False
        try:
            table = self.pool.open(sequence.tokens, sequence.salt, room=sequence.length)
        except OutOfBlocks:
            return False
        self.waiting.popleft()
        self.running.append(sequence)
        sequence.table, sequence.computed = table, table.length
        return True

    def _part(self, sequence: Sequence, count: int, drafted: bool = False) -> Part:
        """The next tokens of a sequence, which have places; the last of them may be its draft."""
        start, sequence.computed = sequence.computed, sequence.computed + count
        samples: tuple[Sequence, ...] = ()
        if sequence.computed >= sequence.length:
            samples = (sequence, sequence) if drafted else (sequence, *sequence.siblings)
            for sibling in sequence.siblings:
                sibling.table, sibling.computed = self.pool.fork(self._table(sequence)), sequence.computed
                self.running.append(sibling)
            sequence.siblings = []
            for one in samples:
                one.in_flight += 1
        return Part(sequence, start, sequence.computed, samples, sequence.draft if drafted else -1)

    def _commit(self, sequence: Sequence) -> None:
        """Full blocks of known tokens can be found from now on."""
        table, computed = sequence.table, sequence.computed
        if table is not None and computed // BLOCK_SIZE > len(table.digests):  # most often no block is full
            self.pool.commit(table, sequence.tokens, min(computed, len(sequence.tokens)))

    def _close(self, sequence: Sequence) -> None:
        if sequence.table is not None:
            self.pool.close(sequence.table)
        sequence.table, sequence.computed, sequence.draft = None, 0, -1

    @staticmethod
    def _table(sequence: Sequence) -> BlockTable:
        assert sequence.table is not None
        return sequence.table
