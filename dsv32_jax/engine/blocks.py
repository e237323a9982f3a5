"""The blocks of the cache: allocation to sequences, shared prefixes, eviction. On the host, without JAX.

A block is 64 tokens of all layers; here it is a number. A sequence has a `BlockTable`, and several may hold the same
block. A full block has an identity: SHA-256 of its tokens and of the identity of the block before it. Equal identities
therefore mean equal tokens from the start on, and so equal values in the cache. A block that no sequence holds any more
keeps its identity until its memory is needed: the least recently released one is evicted first.
"""

import dataclasses
import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from pallas_kernels.paging import BLOCK_SIZE

__all__ = ["BlockPool", "BlockTable", "OutOfBlocks", "PoolStatistics"]


class OutOfBlocks(Exception):
    """Raised where more blocks are needed than are free or cached; none is taken."""

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
      salt: separates this sequence from others with the same tokens: only sequences with equal salts share blocks.
    """

    blocks: array[int] = dataclasses.field(default_factory=lambda: array("i"))
    length: int = 0
    digests: list[bytes] = dataclasses.field(default_factory=list)
    salt: bytes = b""


@dataclasses.dataclass(frozen=True)
class PoolStatistics:
    """A pool's counts at one moment.

    Attributes:
      in_use: blocks that a sequence holds.
      cached: blocks that no sequence holds, but that still have an identity by which they can be found.
      free: the other blocks.
      shared: blocks that more than one sequence holds.
      tokens_asked, tokens_found: tokens of all prompts that were opened so far, and those of them that were cached.
      evictions: cached blocks that were given up for memory so far.
      internal_fragmentation: share of the slots of blocks in use that hold no token.
      external_fragmentation: share of the available blocks that no request could get. It is always 0, since all blocks
        have one size.
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
        """The share of all prompts' tokens that was found in the cache."""
        return self.tokens_found / self.tokens_asked if self.tokens_asked else 0.0


class BlockPool:
    """All blocks of a cache.

    The time of an operation depends on the blocks that it touches, never on the size of the pool.

    Args:
      num_blocks: blocks of the cache.
      sharing: whether cached prefixes are found; without it only forks share blocks.
    """

    def __init__(self, num_blocks: int, *, sharing: bool = True):
        if num_blocks < 1:
            raise ValueError(f"num_blocks: {num_blocks}; must be at least 1")
        self.num_blocks = num_blocks
        self.sharing = sharing
        self._tokens_asked = self._tokens_found = self._evictions = 0
        self.reset()

    def reset(self) -> None:
        """Makes all blocks free and without identity, in whatever state they are; earlier tables become invalid."""
        self._free = list(range(self.num_blocks - 1, -1, -1))
        self._references = [0] * self.num_blocks
        self._filled = [0] * self.num_blocks  # tokens of each block in use
        self._digest: list[bytes | None] = [None] * self.num_blocks
        self._block_of: dict[bytes, int] = {}
        self._unused: OrderedDict[int, None] = (
            OrderedDict()
        )  # cached blocks that no sequence holds, the least recently released first
        self._shared = self._slots_filled = 0

    @property
    def available(self) -> int:
        """Blocks that can be allocated now: free ones, and cached ones that no sequence holds."""
        return len(self._free) + len(self._unused)

    def statistics(self) -> PoolStatistics:
        """The pool's counts now."""
        in_use = self.num_blocks - self.available
        return PoolStatistics(
            in_use=in_use,
            cached=len(self._unused),
            free=len(self._free),
            shared=self._shared,
            tokens_asked=self._tokens_asked,
            tokens_found=self._tokens_found,
            evictions=self._evictions,
            internal_fragmentation=1 - self._slots_filled / (in_use * BLOCK_SIZE) if in_use else 0.0,
        )

    # ---- sequences ----

    def open(self, tokens: Sequence[int], salt: bytes = b"", *, room: int = 0) -> BlockTable:
        """A table of the longest cached prefix of a prompt, whose tokens its `length` counts.

        The prefix never includes the prompt's last token, which must be computed for its logits.

        Args:
          tokens: ids of the prompt.
          salt: see `BlockTable`.
          room: tokens for which the next call of `extend` must be able to give places, if no other call comes between.

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
        self._tokens_asked += len(tokens)
        self._tokens_found += table.length
        return table

    def extend(self, table: BlockTable, length: int) -> list[tuple[int, int]]:
        """Gives a sequence places for `length` tokens; those behind the present length are in blocks of its own.

        Args:
          table: of the sequence.
          length: tokens that shall have a place; at least the present length.

        Returns:
          (source, target) blocks that must be copied before the sequence writes: its last block, if that is partly
          filled and another sequence holds it too.

        Raises:
          OutOfBlocks: there are not enough blocks; nothing has changed.
        """
        if length < table.length:
            raise ValueError(f"length: {length}; the sequence has {table.length} tokens already")
        if length == table.length:
            return []
        new_blocks = -(-length // BLOCK_SIZE) - len(table.blocks)
        last_block = table.blocks[-1] if table.length % BLOCK_SIZE else None
        copy = last_block is not None and self._references[last_block] > 1
        if new_blocks + copy > self.available:
            raise OutOfBlocks(new_blocks + copy, self.available)
        copies = []
        if last_block is not None and copy:
            target = self._take(self._filled[last_block])
            self._release(last_block)
            table.blocks[-1] = target
            copies.append((last_block, target))
        if last_block is not None:
            self._fill(table.blocks[-1], min(length - (len(table.blocks) - 1) * BLOCK_SIZE, BLOCK_SIZE))
        for _ in range(new_blocks):
            table.blocks.append(self._take(min(length - len(table.blocks) * BLOCK_SIZE, BLOCK_SIZE)))
        table.length = length
        return copies

    def fork(self, table: BlockTable) -> BlockTable:
        """A table for another sequence with the same tokens so far, in the same blocks."""
        for block in table.blocks:
            self._hold(block)
        return dataclasses.replace(table, blocks=table.blocks[:], digests=list(table.digests))

    def commit(self, table: BlockTable, tokens: Sequence[int], computed: int) -> None:
        """Lets others find the full blocks whose values are computed.

        Args:
          table: of the sequence.
          tokens: its ids from the start, at least `computed`.
          computed: tokens whose values are in the cache, or are written by a step that has been started, after which
            later steps read them.
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
            # Two sequences may have computed the same block at the same time: the first one's gets the identity, the
            # other's none. The block of a fork has its identity already.
            if digest not in self._block_of:
                self._block_of[digest] = block
                self._digest[block] = digest

    def close(self, table: BlockTable) -> None:
        """Releases a sequence's blocks, the last first, so that the end of a prefix is evicted before its start."""
        for block in reversed(table.blocks):
            self._release(block)
        table.blocks, table.digests, table.length = array("i"), [], 0

    def forget(self) -> None:
        """Evicts every cached block that no sequence holds."""
        while self._unused:
            self._free.append(self._evict())

    # ---- blocks ----

    @staticmethod
    def _identity(table: BlockTable, tokens: Sequence[int], index: int) -> bytes:
        """The identity of a sequence's full block; those of its predecessors are in the table."""
        previous = table.digests[index - 1] if index else hashlib.sha256(table.salt).digest()
        block_tokens = array("i", tokens[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])
        return hashlib.sha256(previous + block_tokens.tobytes()).digest()

    def _take(self, filled: int) -> int:
        """Allocates a block for one sequence, with `filled` tokens."""
        block = self._free.pop() if self._free else self._evict()
        self._references[block] = 1
        self._fill(block, filled)
        return block

    def _evict(self) -> int:
        """Takes the least recently released cached block, and removes its identity."""
        block, _ = self._unused.popitem(last=False)
        digest = self._digest[block]
        assert digest is not None
        del self._block_of[digest]
        self._digest[block] = None
        self._evictions += 1
        return block

    def _hold(self, block: int) -> None:
        """Counts one more sequence that has a block."""
        if self._references[block] == 0:
            del self._unused[block]
            self._fill(block, BLOCK_SIZE)
        self._references[block] += 1
        self._shared += self._references[block] == 2

    def _release(self, block: int) -> None:
        """Counts one sequence fewer that has a block."""
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
        """Sets how many tokens of a block are in use."""
        self._slots_filled += tokens - self._filled[block]
        self._filled[block] = tokens
