"""Which blocks of the cache belong to whom: allocation, shared prefixes, eviction. On the host, without JAX.

A block is 64 tokens of all layers; here it is a number. A sequence has a `BlockTable`, and several may hold the same
block. A full block has an identity: SHA-256 of its tokens and of the identity of the block before it. Equal identities
therefore mean equal tokens from the start on, and so equal values in the cache. A block that nobody holds any more
keeps its identity until its memory is needed: the one that was released longest ago goes first.
"""

import dataclasses
import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from pallas_kernels.paging import BLOCK_SIZE

__all__ = ["BlockPool", "BlockTable", "OutOfBlocks", "Statistics"]


class OutOfBlocks(Exception):
    """More blocks were asked for than are free or cached; nothing was taken."""

    def __init__(self, needed: int, available: int):
        super().__init__(f"{needed} blocks are needed, {available} are available")
        self.needed, self.available = needed, available


@dataclasses.dataclass(eq=False)
class BlockTable:
    """The blocks of one sequence, in order. Only a `BlockPool` changes it.

    Attributes:
      blocks: numbers of the blocks, int32, so that NumPy takes them as they are; the last one may be partly filled.
      length: tokens that have a place.
      digests: identities of the first full blocks whose values are computed.
      salt: what separates this sequence from others with the same tokens: only equal salts share.
    """

    blocks: array[int] = dataclasses.field(default_factory=lambda: array("i"))
    length: int = 0
    digests: list[bytes] = dataclasses.field(default_factory=list)
    salt: bytes = b""


@dataclasses.dataclass(frozen=True)
class Statistics:
    """A pool at one moment.

    Attributes:
      in_use: blocks that a sequence holds.
      cached: blocks that nobody holds, but that still have an identity to be found by.
      free: the others.
      shared: blocks that more than one sequence holds.
      tokens_asked, tokens_found: of all that was opened so far: its length, and how much of it was cached.
      evictions: identities given up for memory so far.
      internal_fragmentation: share of the slots of blocks in use that hold no token.
      external_fragmentation: share of the available blocks that no request could get. Always 0: a block is as good as
        any other.
    """

    in_use: int
    cached: int
    free: int
    shared: int
    tokens_asked: int
    tokens_found: int
    evictions: int
    internal_fragmentation: float
    external_fragmentation: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of all opened tokens that was found in the cache."""
        return self.tokens_found / self.tokens_asked if self.tokens_asked else 0.0


class BlockPool:
    """All blocks of a cache.

    Every operation takes time by the blocks that it touches, never by those that there are.

    Args:
      num_blocks: blocks of the cache.
      sharing: find cached prefixes again; without it each sequence has blocks of its own (forks still share).
    """

    def __init__(self, num_blocks: int, *, sharing: bool = True):
        if num_blocks < 1:
            raise ValueError(f"num_blocks: {num_blocks}; must be at least 1")
        self.num_blocks = num_blocks
        self.sharing = sharing
        self._asked = self._found = self._evictions = 0
        self.reset()

    def reset(self) -> None:
        """All blocks are free and without identity, whatever was under way; tables from before are worth nothing."""
        self._free = list(range(self.num_blocks - 1, -1, -1))
        self._references = [0] * self.num_blocks
        self._filled = [0] * self.num_blocks  # tokens of each block in use
        self._digest: list[bytes | None] = [None] * self.num_blocks
        self._block_of: dict[bytes, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # cached, held by nobody, the oldest first
        self._shared = self._slots_filled = 0

    @property
    def available(self) -> int:
        """Blocks that can be had now: free ones, and cached ones that nobody holds."""
        return len(self._free) + len(self._unused)

    def statistics(self) -> Statistics:
        """The pool now."""
        in_use = self.num_blocks - self.available
        return Statistics(
            in_use=in_use,
            cached=len(self._unused),
            free=len(self._free),
            shared=self._shared,
            tokens_asked=self._asked,
            tokens_found=self._found,
            evictions=self._evictions,
            internal_fragmentation=1 - self._slots_filled / (in_use * BLOCK_SIZE) if in_use else 0.0,
        )

    # ---- sequences ----

    def open(self, tokens: Sequence[int], salt: bytes = b"", *, room: int = 0) -> BlockTable:
        """A table that begins with the longest cached prefix of a prompt; its `length` says how long that is.

        The prompt's last token is never among what is found: its logits are wanted, so it must be computed.

        Args:
          tokens: ids of the prompt.
          salt: see `BlockTable`.
          room: tokens for which `extend` must be able to give places next, if nothing else happens in between.

        Raises:
          OutOfBlocks: there is no such room; nothing has changed.
        """
        table = BlockTable(salt=salt)
        for index in range((len(tokens) - 1) // BLOCK_SIZE if self.sharing else 0):
            digest = self._identity(table, tokens, index)
            block = self._block_of.get(digest)
            if block is None:
                break
            table.blocks.append(block)
            table.digests.append(digest)
        needed = -(-room // BLOCK_SIZE) - len(table.blocks)
        available = self.available - sum(self._references[block] == 0 for block in table.blocks)
        if needed > available:
            raise OutOfBlocks(needed, available)
        for block in table.blocks:
            self._hold(block)
        table.length = len(table.blocks) * BLOCK_SIZE
        self._asked += len(tokens)
        self._found += table.length
        return table

    def extend(self, table: BlockTable, length: int) -> list[tuple[int, int]]:
        """Gives a sequence places for `length` tokens, all of them its own from the present length on.

        Args:
          table: of the sequence.
          length: tokens that shall have a place; at least the present length.

        Returns:
          (source, target) blocks that must be copied before the sequence writes: its last block, partly filled, if
          another sequence holds that too.

        Raises:
          OutOfBlocks: there are not enough; nothing has changed.
        """
        if length < table.length:
            raise ValueError(f"length: {length}; the sequence has {table.length} tokens already")
        if length == table.length:
            return []
        new = -(-length // BLOCK_SIZE) - len(table.blocks)
        last = table.blocks[-1] if table.length % BLOCK_SIZE else None
        copy = last is not None and self._references[last] > 1
        if new + copy > self.available:
            raise OutOfBlocks(new + copy, self.available)
        copies = []
        if last is not None and copy:
            target = self._take(self._filled[last])
            self._release(last)
            table.blocks[-1] = target
            copies.append((last, target))
        if last is not None:
            self._fill(table.blocks[-1], min(length - (len(table.blocks) - 1) * BLOCK_SIZE, BLOCK_SIZE))
        for _ in range(new):
            table.blocks.append(self._take(min(length - len(table.blocks) * BLOCK_SIZE, BLOCK_SIZE)))
        table.length = length
        return copies

    def fork(self, table: BlockTable) -> BlockTable:
        """Another sequence with the same tokens so far, in the same blocks."""
        for block in table.blocks:
            self._hold(block)
        return dataclasses.replace(table, blocks=table.blocks[:], digests=list(table.digests))

    def commit(self, table: BlockTable, tokens: Sequence[int], computed: int) -> None:
        """Lets others find the full blocks whose values are computed.

        Args:
          table: of the sequence.
          tokens: its ids from the start, at least `computed`.
          computed: tokens whose values are in the cache, or are written by a step that has been started: later steps
            read them after that.
        """
        if not 0 <= computed <= min(table.length, len(tokens)):
            raise ValueError(
                f"computed: {computed}; the sequence has {table.length} places, and {len(tokens)} tokens are given"
            )
        if not self.sharing:
            return
        for index in range(len(table.digests), computed // BLOCK_SIZE):
            digest, block = self._identity(table, tokens, index), table.blocks[index]
            table.digests.append(digest)
            # Two sequences may have computed the same at the same time: the first one's block is found, the other's
            # has no identity. A fork's block is known already.
            if digest not in self._block_of:
                self._block_of[digest] = block
                self._digest[block] = digest

    def close(self, table: BlockTable) -> None:
        """Releases a sequence's blocks, its last first: of a prefix, the end is given up before the start."""
        for block in reversed(table.blocks):
            self._release(block)
        table.blocks, table.digests, table.length = array("i"), [], 0

    def forget(self) -> None:
        """Gives up the identity of every cached block that nobody holds, as if each had been evicted."""
        while self._unused:
            self._free.append(self._evict())

    # ---- blocks ----

    @staticmethod
    def _identity(table: BlockTable, tokens: Sequence[int], index: int) -> bytes:
        """Of a sequence's full block, whose predecessors' are in the table."""
        before = table.digests[index - 1] if index else hashlib.sha256(table.salt).digest()
        own = array("i", tokens[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])
        return hashlib.sha256(before + own.tobytes()).digest()

    def _take(self, filled: int) -> int:
        """A block for one sequence, with so many tokens."""
        block = self._free.pop() if self._free else self._evict()
        self._references[block] = 1
        self._fill(block, filled)
        return block

    def _evict(self) -> int:
        """The cached block that was released longest ago, without its identity."""
        block, _ = self._unused.popitem(last=False)
        digest = self._digest[block]
        assert digest is not None
        del self._block_of[digest]
        self._digest[block] = None
        self._evictions += 1
        return block

    def _hold(self, block: int) -> None:
        """One more sequence has it."""
        if self._references[block] == 0:
            del self._unused[block]
            self._fill(block, BLOCK_SIZE)
        self._references[block] += 1
        self._shared += self._references[block] == 2

    def _release(self, block: int) -> None:
        """One sequence fewer."""
        self._references[block] -= 1
        self._shared -= self._references[block] == 1
        if self._references[block]:
            return
        self._fill(block, 0)
        if self._digest[block] is None:
            self._free.append(block)
        else:
            self._unused[block] = None

    def _fill(self, block: int, tokens: int) -> None:
        """Sets how many tokens a block in use has."""
        self._slots_filled += tokens - self._filled[block]
        self._filled[block] = tokens
