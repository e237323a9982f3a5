"""Plans what the next step runs: which sequences, which of their tokens, in which blocks. On the host, without JAX.

A step is a flat batch of tokens. Running sequences come first, the oldest before the others: one token of each that is
being continued, a piece of its prompt where that is not read yet. The rest of the step's tokens goes to waiting
sequences. Where blocks run out, the youngest running sequence gives its own back and waits again, before those that
arrived later; its blocks may still be found in the pool, and are computed again otherwise.

A planned step is run, and then published: only blocks that a started step writes can be found by others. A step may be
planned before the tokens of the previous one are known: they are `in_flight`, and only their number counts here.

A sequence may have a draft: a guess at the token after its last one. Both then go into one step, and a token is sampled
behind each; the second is only of use if the draft equals the first. How many tokens count is known when the step has
run: an engine with drafts receives a step's tokens before it plans the next.
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
    """The limits of a step.

    Attributes:
      tokens: the most that a step has; prompts are read in pieces that fit.
      sequences: the most that run at a time.
      prompt_tokens: the most tokens of a step that continues no sequence, so that none waits for it; at least `tokens`,
        or 0 for `tokens`.
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
      tokens: ids of the prompt and of the tokens that are known after it.
      max_new_tokens: the most that may follow the prompt.
      salt: see `BlockTable`.
      siblings: other continuations of the same prompt, which begin when it has been read.
      prompt_length: tokens of the prompt.
      in_flight: tokens that are sampled in steps whose results are not known yet.
      computed: tokens that are in the cache, or in a planned step.
      table: its blocks; None while it waits.
      finished: whether it has ended, and is in no queue.
      draft: a guess at the token after the last; -1 for none.
    """

    tokens: list[int]
    max_new_tokens: int
    salt: bytes = b""
    siblings: list["Sequence"] = dataclasses.field(default_factory=list)
    prompt_length: int = dataclasses.field(init=False)
    in_flight: int = 0
    computed: int = 0
    table: BlockTable | None = None
    finished: bool = False
    draft: int = -1

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    @property
    def length(self) -> int:
        """The number of its tokens, known or in flight."""
        return len(self.tokens) + self.in_flight

    @property
    def uncomputed(self) -> int:
        """The number of tokens that are to be computed; 0 once its last token has been sampled."""
        length = self.length
        return 0 if length - self.prompt_length >= self.max_new_tokens else length - self.computed


class Part(NamedTuple):
    """Tokens start..stop of a sequence in a step; its table has places for them.

    Attributes:
      sequence: that they belong to.
      start, stop: their positions.
      receivers: sequences that receive a token, sampled from the logits of the last of them: the sequence, if no token
        of it is uncomputed then, and its siblings, which begin here. With a draft, the sequence twice: it receives
        tokens from the logits of the last two.
      draft: the last token, where it is a guess; else -1.
    """

    sequence: Sequence
    start: int
    stop: int
    receivers: tuple[Sequence, ...]
    draft: int = -1

    @property
    def sample_positions(self) -> list[int]:
        """Positions of the tokens that `receivers` receive."""
        return [self.stop] * len(self.receivers) if self.draft < 0 else [self.stop - 1, self.stop]


@dataclasses.dataclass(frozen=True)
class Step:
    """A planned step.

    Attributes:
      parts: the tokens that it computes, of a different sequence each.
      copies: (source, target) blocks to be copied before it runs.
      preempted: sequences that had to give back their blocks for it.
    """

    parts: list[Part]
    copies: list[tuple[int, int]]
    preempted: list[Sequence]

    @functools.cached_property
    def tokens(self) -> int:
        """The number of tokens that it computes."""
        return sum(part.stop - part.start for part in self.parts)

    @functools.cached_property
    def receivers(self) -> list[Sequence]:
        """The sequence that receives the token of each row, in the order of the parts."""
        return [sequence for part in self.parts for sequence in part.receivers]

    def settle(self, tokens: list[int]) -> list[int]:
        """The sampled tokens, in the order of `receivers`, with -1 for those behind a wrong draft."""
        settled, row = list(tokens), 0
        for part in self.parts:
            if part.draft >= 0 and tokens[row] != part.draft:
                settled[row + 1] = -1
            row += len(part.receivers)
        return settled


class Scheduler:
    """The queues of waiting and running sequences, and the pool that they share.

    `running`, followed by `waiting`, is in the order of arrival: the first waiting sequence joins the end of those that
    run, and the last running one goes back to the front of those that wait.

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
        """Raises `ValueError` where a sequence could never run: it has too many siblings, or more tokens than the whole
        cache holds.
        """
        continuations = 1 + len(sequence.siblings)
        if continuations > self.limits.sequences:
            raise ValueError(
                f"{continuations} continuations of one prompt; at most {self.limits.sequences} run at a time"
            )
        # The last token that is sampled needs no place.
        needed, room = sequence.length + sequence.max_new_tokens - 1, self.pool.num_blocks * BLOCK_SIZE
        if needed > room:
            raise ValueError(f"{needed} tokens are more than the whole cache holds, {room}")

    def add(self, sequence: Sequence) -> None:
        """Appends a new sequence, with its siblings, to the queue; raises what `check` does."""
        self.check(sequence)
        self.waiting.append(sequence)

    def schedule(self) -> Step | None:
        """Plans the next step; None if there is nothing to compute now. The previous step has been published."""
        parts: list[Part] = []
        copies: list[tuple[int, int]] = []
        preempted: list[Sequence] = []
        continues = any(
            sequence.table and sequence.uncomputed and sequence.computed >= sequence.prompt_length
            for sequence in self.running
        )
        budget = self.limits.tokens if continues else self.limits.prompt_tokens or self.limits.tokens
        spare = budget - len(self.running) - bool(self.waiting)  # tokens for drafts, which no other sequence needs
        # A later sequence begins when all before it have read their prompts: each but the last needs one token at most.
        for sequence in list(self.running):
            count = min(sequence.uncomputed, budget)
            if sequence.table is None or not count:  # an older one has its blocks now, or its last token was sampled
                continue
            needed_copies = self._extend_with_draft(sequence) if sequence.draft >= 0 and spare > 0 else None
            if drafted := needed_copies is not None:
                count, spare = count + 1, spare - 1
            else:
                needed_copies = self._extend(sequence, count, preempted)
            if needed_copies is not None:
                copies += needed_copies
                parts.append(self._part(sequence, count, drafted))
                budget -= count
        while self.waiting and not preempted and budget:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            count = min(sequence.uncomputed, budget)
            self.pool.extend(self._table(sequence), sequence.computed + count)  # after whole blocks: nothing to copy
            parts.append(self._part(sequence, count))
            budget -= count
        return Step(parts, copies, preempted) if parts else None

    def publish(self, step: Step) -> None:
        """Lets later steps find the blocks of a step that has been started."""
        for part in step.parts:
            self._commit(part.sequence)

    def receive(self, step: Step, tokens: Iterable[int]) -> None:
        """Appends the tokens of a step, as `Step.settle` returns them; drops those of finished sequences."""
        receivers = step.receivers
        for sequence, token in zip(receivers, tokens, strict=True):
            sequence.in_flight -= 1
            if sequence.finished:
                continue
            if token >= 0:
                sequence.tokens.append(token)
            else:
                sequence.computed -= 1  # the draft; its place stays, for the token that belongs there
        for sequence in receivers:  # only now: `computed` is right after the sequence's last row
            self._commit(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence that runs or waits, and its siblings that have not begun; releases its blocks."""
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
        """Ends all sequences, whatever state an exception left; all blocks are free, and none can be found."""
        for sequence in (*self.running, *self.waiting):
            sequence.finished, sequence.table = True, None
        self.running.clear()
        self.waiting.clear()
        self.pool.reset()

    # ---- helpers ----

    def _extend(self, sequence: Sequence, count: int, preempted: list[Sequence]) -> list[tuple[int, int]] | None:
        """Gives a running sequence places for its next tokens, and preempts younger ones where it must.

        Returns:
          The copies that `BlockPool.extend` asks for; None if the sequence itself was preempted.
        """
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

    def _extend_with_draft(self, sequence: Sequence) -> list[tuple[int, int]] | None:
        """Gives a sequence places for its last token and its draft, and preempts none.

        The last token that may be sampled needs no draft. So no sequence ever has more places than without drafts, and
        `add` need not know of them.

        Returns:
          The copies that `BlockPool.extend` asks for; None if a draft is of no use, or there is no place for it.
        """
        assert sequence.uncomputed == 1
        if sequence.length - sequence.prompt_length + 1 >= sequence.max_new_tokens:
            return None
        try:
            return self.pool.extend(self._table(sequence), sequence.length + 1)
        except OutOfBlocks:
            return None

    def _admit(self, sequence: Sequence) -> bool:
        """Lets the first waiting sequence run, if there is room for all its tokens; returns whether it runs."""
        if sequence.in_flight:  # it was preempted while a token was being sampled, which is not known yet
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
        """The next `count` tokens of a sequence, which have places; the last of them may be its draft."""
        start, sequence.computed = sequence.computed, sequence.computed + count
        receivers: tuple[Sequence, ...] = ()
        if sequence.computed >= sequence.length:
            receivers = (sequence, sequence) if drafted else (sequence, *sequence.siblings)
            for sibling in sequence.siblings:
                sibling.table, sibling.computed = self.pool.fork(self._table(sequence)), sequence.computed
                self.running.append(sibling)
            sequence.siblings = []
            for receiver in receivers:
                receiver.in_flight += 1
        return Part(sequence, start, sequence.computed, receivers, sequence.draft if drafted else -1)

    def _commit(self, sequence: Sequence) -> None:
        """Lets others find the sequence's full blocks of known tokens."""
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
