"""Device memory and shared memory of device code, by address."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils as mgu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.mosaic.words import Word, as_word, i64, integer, ptx, ptx_word, ptx_words, vector_operand


def global_address(ref: Any) -> ir.Value:
    """Returns the 64-bit address of a device-memory ref."""
    return llvm.ptrtoint(integer(64), mgu.memref_ptr(ref))


def shared_address(ref: Any) -> Word:
    """Returns the 32-bit address of a shared-memory ref."""
    return Word(llvm.ptrtoint(integer(32), mgu.memref_ptr(ref)))


def offset(address: ir.Value, count: Word, size: int) -> ir.Value:
    """`address + count * size` bytes, in 64 bits."""
    return arith.addi(address, arith.muli(count.wide(), i64(size)))


def parts_of(address: ir.Value, count: int) -> Iterator[ir.Value]:
    """Yields the addresses of `count` words, a multiple of 4, in fours."""
    return (offset(address, Word(i), 4) for i in range(0, count, 4))


def load_global(address: ir.Value, count: int = 1) -> list[Word]:
    """1, 2, or a multiple of 4 consecutive words, aligned to their size or to 16 bytes."""
    if count > 4:
        return [word for part in parts_of(address, count) for word in load_global(part, 4)]
    suffix, names = vector_operand(0, count)
    return ptx_words(f"ld.global{suffix}.b32 {names}, [${count}];", count, address)


def load_read_only(address: ir.Value, count: int = 1) -> list[Word]:
    """`load_global` of memory that nobody writes while the kernel runs: may move over stores."""
    if count > 4:
        return [word for part in parts_of(address, count) for word in load_read_only(part, 4)]
    suffix, names = vector_operand(0, count)
    types = (integer(32),) * count
    # Side effects are only claimed so that LLVM issues the loads where they stand, not where they are used.
    text = f"ld.global.nc{suffix}.b32 {names}, [${count}];"
    values = mgu.inline_ptx(text, address, result_types=types, has_side_effects=True)
    return [Word(x) for x in values]


def store_global(address: ir.Value, words: Sequence[Word | int], predicate: Word | None = None) -> None:
    """1, 2, or a multiple of 4 consecutive words, aligned to their size or to 16 bytes."""
    if len(words) > 4:
        for i, part in enumerate(parts_of(address, len(words))):
            store_global(part, words[4 * i : 4 * i + 4], predicate)
        return
    suffix, names = vector_operand(1, len(words))
    ptx(f"st.global{suffix}.b32 [$0], {names};", address, *words, predicate=predicate)


class SharedWords:
    """A one-dimensional array of 32-bit words in shared memory."""

    def __init__(self, base: Any):
        self.base = base if isinstance(base, Word) else shared_address(base)

    def address(self, index: Word | int) -> Word:
        """Returns the address of a word."""
        return self.base + (as_word(index) << 2)

    def part(self, index: Word | int) -> SharedWords:
        """Returns the array from `index` on."""
        return SharedWords(self.address(index))

    def load(self, index: Word | int) -> Word:
        """Returns one word."""
        return ptx_word("ld.shared.b32 $0, [$1];", self.address(index))

    def load_many(self, index: Word | int, count: int) -> list[Word]:
        """`count` consecutive words: 1, 2, or a multiple of 4, aligned."""
        address, width = self.address(index), min(count, 4)
        suffix, names = vector_operand(0, width)
        words = []
        for i in range(0, count, width):
            words += ptx_words(f"ld.shared{suffix}.b32 {names}, [${width}];", width, address + 4 * i)
        return words

    def store(self, index: Word | int, x: Word | int, predicate: Word | None = None) -> None:
        """One word."""
        ptx("st.shared.b32 [$0], $1;", self.address(index), x, predicate=predicate)

    def store_zeros(self, index: Word | int, count: int) -> None:
        """Zeros over `count` consecutive words: 1, 2, or a multiple of 4, aligned."""
        address, width = self.address(index), min(count, 4)
        suffix, names = vector_operand(1, width)
        for i in range(0, count, width):
            ptx(f"st.shared{suffix}.b32 [$0], {names};", address + 4 * i, *[0] * width)

    def load_pair(self, pair: Word | int) -> tuple[Word, Word]:
        """Returns words 2 * pair and 2 * pair + 1."""
        first, second = self.part(as_word(pair) << 1).load_many(0, 2)
        return first, second

    def store_pair(self, pair: Word | int, x: Word, y: Word | int, predicate: Word | None = None) -> None:
        """Words 2 * pair and 2 * pair + 1."""
        ptx("st.shared.v2.b32 [$0], {$1, $2};", self.base + (as_word(pair) << 3), x, y, predicate=predicate)

    def increment(self, index: Word | int, predicate: Word | None = None) -> None:
        """Adds one, atomically."""
        ptx("red.shared.add.u32 [$0], 1;", self.address(index), predicate=predicate)

    def fetch_increment(self, index: Word | int) -> Word:
        """Adds one, atomically, and returns what was there."""
        return ptx_word("atom.shared.add.u32 $0, [$1], 1;", self.address(index))

    def load_of_peer(self, index: Word | int, count: int, rank: Word | int) -> list[Word]:
        """`load_many` from the same array of another CTA of the cluster."""
        address = ptx_word("mapa.shared::cluster.u32 $0, $1, $2;", self.address(index), rank)
        width = min(count, 4)
        suffix, names = vector_operand(0, width)
        words = []
        for i in range(0, count, width):
            words += ptx_words(f"ld.shared::cluster{suffix}.b32 {names}, [${width}];", width, address + 4 * i)
        return words
