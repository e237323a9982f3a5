"""Exact selection among candidates in shared memory: device code that all threads of a CTA run together.

A candidate is a pair of words: the bits of a score and its position. Scores are compared as *keys*, unsigned words of
the same order. The k-th best is closed in on by histograms, each over the range that the one before left: a digit at a
time, as a radix sort has it, but of the range that is left. As soon as a bin holds no more candidates than a warp has
lanes, every warp ranks those, a lane each. The result is a `Cut`: the last candidate that stays.

If a row is shared by the CTAs of a cluster, each has its own candidates; histograms are added up through distributed
shared memory, so that all find the same cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pallas_kernels.mosaic import (
    SharedWords,
    Word,
    as_word,
    barrier,
    branch,
    cluster_barrier,
    loop,
    repeat_while,
    shuffle,
    thread_index,
    total,
    warp_prefix_sum,
    warp_reduce,
    warp_votes,
    when,
)

LOG_BINS = 11
BINS = 1 << LOG_BINS
"""Of a histogram."""

FEW = 32
"""Candidates that a warp ranks, one a lane."""

SCRATCH_WORDS = 224
"""Words of the `scratch` of `Selection`."""

ALL_BITS = 0xFFFFFFFF
NEGATIVE_INFINITY = 0x007FFFFF
POSITIVE_INFINITY = 0xFF800000
"""Keys; those of NaNs lie outside of the two."""


def to_key(bits: Word) -> Word:
    """float32 bits -> a word of the same order; -0 is 0."""
    bits = bits.equals(0x80000000).where(0, bits)
    return bits ^ (bits.signed_shift_right(31) | 0x80000000)


def from_key(key: Word) -> Word:
    """Returns the float32 bits of a key."""
    return key ^ ((key.signed_shift_right(31) ^ ALL_BITS) | 0x80000000)


def just_below(key: Word) -> Word:
    """The largest key whose number is less than that of `key`: the one before, but never that of -0, which none has."""
    below = key - 1
    return below - below.equals(0x7FFFFFFF).to_word()


def shift_for(width: Word) -> Word:
    """Returns the shift that spreads words 0 .. width over all bins."""
    return (as_word(32 - LOG_BINS) - width.leading_zeros()).signed_max(0)


class Cut(NamedTuple):
    """Candidates with a greater key stay, and those with the same key up to a position."""

    key: Word
    position: Word

    def keeps(self, key: Word, position: Word) -> Word:
        """Returns whether a candidate stays."""
        return (key > self.key) | (key.equals(self.key) & (position <= self.position))


class Range(NamedTuple):
    """Words base .. base + width, among them the one that is searched for."""

    base: Word
    width: Word
    taken: Word
    """Words above the range."""
    inside: Word
    """Words in the range."""
    fits: Word
    """1 if all of them may stay, so that the search is over."""
    step: Word
    """Histograms so far."""

    def holds(self, word: Word) -> Word:
        """Returns whether a word is in the range."""
        return word - self.base <= self.width


class Selection:
    """The threads of a CTA, their shared memory, and the steps of the selection."""

    def __init__(self, config: Any, row_length: int, candidates: Any, histogram: Any, scratch: Any):
        """
        Args:
          config: a `Config` of the op.
          row_length: positions are less than that.
          candidates: ref of 2 * config.capacity words.
          histogram: ref of BINS words, or 2 * BINS with a cluster; zeros between rows.
          scratch: ref of SCRATCH_WORDS; zeros at the start of the kernel.
        """
        self.config = config
        self.threads = config.warpgroups * 128
        self.warps = config.warpgroups * 4
        self.last_position = (1 << max(LOG_BINS, (row_length - 1).bit_length())) - 1
        self.candidates, self.histogram, scratch = map(SharedWords, (candidates, histogram, scratch))
        self.sums = scratch.part(0)  # of each warp: two arrays of 32, which take turns
        self.lowest, self.highest = scratch.part(64), scratch.part(96)  # of each warp
        self.for_peers = scratch.part(128)  # what the other CTAs of the cluster read
        self.crossed = scratch.part(140)  # what `crossing` found
        self.few_count = scratch.part(144)
        self.few = scratch.part(160)  # FEW pairs
        self.thread = thread_index()
        self.lane, self.warp = self.thread & 31, self.thread >> 5

    # ---- over all threads ----

    def warp_offsets(self, n: Word, parity: Word | int) -> tuple[Word, Word]:
        """Returns the sums of `n` (of lane 31) over the warps before this one, and over all.

        One barrier. Calls without a barrier in between alternate `parity`.
        """
        sums = self.sums.part(as_word(parity) << 5)
        sums.store(self.warp, n, predicate=self.lane.equals(31))
        barrier()
        of_warp = sums.load(self.lane)  # zeros past the last warp
        return warp_reduce("add", (self.lane < self.warp).where(of_warp, 0)), warp_reduce("add", of_warp)

    def offsets(self, n: Word, parity: Word | int) -> tuple[Word, Word]:
        """Returns the sums of `n` over the threads before this one, and over all; a barrier as in `warp_offsets`."""
        inclusive = warp_prefix_sum(n, self.lane)
        before, everything = self.warp_offsets(inclusive, parity)
        return before + inclusive - n, everything

    def meet(self, peers: int) -> None:
        """A barrier over the CTA, or over the cluster."""
        if peers > 1:
            cluster_barrier()
        else:
            barrier()

    def extremes(self, lowest: Word, highest: Word, peers: int) -> tuple[Word, Word]:
        """Returns the least and the greatest word of all threads, and how far they are apart: (least, distance)."""
        for words, kind, x in ((self.lowest, "min", lowest), (self.highest, "max", highest)):
            words.store(self.warp, warp_reduce(kind, x), predicate=self.lane.equals(0))
        barrier()
        exists = self.lane < self.warps
        lowest = warp_reduce("min", exists.where(self.lowest.load(self.lane), ALL_BITS))
        highest = warp_reduce("max", exists.where(self.highest.load(self.lane), 0))
        if peers > 1:
            first = self.thread.equals(0)
            self.for_peers.store(0, lowest, predicate=first)
            self.for_peers.store(1, highest, predicate=first)
            cluster_barrier()
            for peer in range(peers):
                lowest = lowest.min(self.for_peers.load_of_peer(0, 1, peer)[0])
                highest = highest.max(self.for_peers.load_of_peer(1, 1, peer)[0])
        return lowest, highest - lowest

    def each(self, count: Word, state: list[Word | int], body: Callable[..., Any]) -> list[Word]:
        """`state = body(key, position, whether it exists, *state)` for this thread's share of the candidates."""

        def batch(first, *state):
            places = [first + i * self.threads for i in range(4)]
            pairs = [self.candidates.load_pair(place.min(self.config.capacity - 1)) for place in places]
            for place, (bits, position) in zip(places, pairs, strict=True):
                state = body(to_key(bits), position, place < count, *state) or ()
            return state

        return loop(self.thread, count, 4 * self.threads, state, batch)

    # ---- histograms ----

    def clear_histogram(self) -> None:
        """Zeros in all bins."""
        words = BINS * (2 if self.config.cluster > 1 else 1) // self.threads
        self.histogram.store_zeros(self.thread * words, words)

    def count_word(self, distance: Word, shift: Word, step: Word | int, predicate: Word) -> None:
        """Counts a word at a distance from the range's base. The highest words are in bin 0; the bin of the highest is
        open above."""
        bin_ = (distance >> shift).min(BINS - 1)
        self.histogram.increment(self.buffer(step) + (BINS - 1) - bin_, predicate=predicate)

    def buffer(self, step: Word | int) -> Word | int:
        """Where the bins of a histogram start: in a cluster two take turns, as peers may still read the other."""
        return (as_word(step) & 1) << LOG_BINS if self.config.cluster > 1 else 0

    def crossing(self, need: Word, step: Word, peers: int) -> tuple[Word, Word, Word]:
        """Returns the bin that holds the need-th greatest word: (its number, words in bins above, words in it).

        Call it after `meet`. The histogram is zero again when it returns.
        """
        width = BINS // self.threads
        first = self.buffer(step) + self.thread * width
        if peers > 1:
            of_peers = [self.histogram.load_of_peer(first, width, peer) for peer in range(peers)]
            counts = [total(bins) for bins in zip(*of_peers, strict=True)]
            self.histogram.store_zeros(self.buffer(step + 1) + self.thread * width, width)
        else:
            counts = self.histogram.load_many(first, width)
            self.histogram.store_zeros(first, width)
        above, _ = self.offsets(total(counts), step & 1)
        for i, count in enumerate(counts):
            here = (above < need) & (need <= above + count)
            for at, x in enumerate(((BINS - 1 - i) - self.thread * width, above, count)):
                self.crossed.store(at, x, predicate=here)
            above = above + count
        barrier()
        return self.crossed.load(0), self.crossed.load(1), self.crossed.load(2)

    def narrow(
        self,
        count_words: Callable[..., None],
        base: Word | int,
        width: Word | int,
        k: Word,
        limit: Word,
        *,
        few: int = FEW,
        shift: Word | None = None,
        counted: Word | int = 0,
        step: Word | int = 0,
        peers: int = 1,
    ) -> Range:
        """Closes in on the k-th greatest word until all words down to the range's base are at most `limit`, or those in
        the range at most `few`, or the range is a single word.

        Args:
          count_words: `f(base, width, shift, step)` counts this thread's words of a range.
          base, width: the range at the start.
          shift: of the first histogram, if not all bins are to be used.
          counted: 1 if that histogram is there already, and all have met since.
        """

        def one(base, width, shift, counted, taken, _inside, _fits, step):
            def count():
                count_words(base, width, shift, step)
                self.meet(peers)

            branch(counted.equals(0), count, [])
            crossed, above, inside = self.crossing(k - taken, step, peers)
            edge = crossed << shift
            width = crossed.equals(BINS - 1).where(width - edge, (as_word(1) << shift) - 1)
            taken = taken + above
            fits = taken + inside <= limit
            over = fits | (inside <= few) | width.equals(0)
            return over.negated(), base + edge, width, shift_for(width), 0, taken, inside, fits.to_word(), step + 1

        shift = shift_for(as_word(width)) if shift is None else shift
        base, width, _, _, *rest = repeat_while([base, width, shift, counted, 0, 0, 0, step], one)
        return Range(base, width, *rest)

    # ---- the cut ----

    def cut(
        self,
        count: Word,
        k: int,
        limit: int,
        base: Word,
        width: Word,
        peers: int = 1,
        *,
        shift: Word | None = None,
        counted: Word | int = 0,
    ) -> tuple[Cut, Word]:
        """Returns the cut that keeps the k best candidates, or up to `limit` if that is known sooner.

        Args:
          count: candidates of this CTA; all CTAs together have at least k.
          base, width: where their keys are.
          peers: CTAs that share the row.
          shift, counted: see `narrow`.

        Returns:
          The cut, and the key that later scores of the row must exceed to be candidates.
        """

        def count_keys(base, width, shift, step):
            def one(key, position, exists):
                self.count_word(key - base, shift, step, exists & (key - base <= width))

            self.each(count, [], one)

        keys = self.narrow(
            count_keys, base, width, as_word(k), as_word(limit), peers=peers, shift=shift, counted=counted
        )

        def count_ties(base, width, shift, step):
            def one(key, position, exists):
                distance = (self.last_position - position) - base
                self.count_word(distance, shift, step, exists & key.equals(keys.base) & (distance <= width))

            self.each(count, [], one)

        def narrow_ties():
            need = k - keys.taken
            return self.narrow(count_ties, 0, self.last_position, need, need, step=keys.step, peers=peers)

        # Many of one key are left only as a range of one word: then the lowest positions of them.
        tied = keys.fits.equals(0) & (keys.inside > FEW)
        positions = Range(*branch(tied, narrow_ties, [0, self.last_position, 0, keys.inside, keys.fits, keys.step]))
        need = k - keys.taken - positions.taken
        cut = Cut(
            *branch(
                positions.fits.equals(0),
                lambda: self.rank(count, keys, positions, need, peers),
                [keys.base, self.last_position - positions.base],
            )
        )
        whole = keys.fits.differs(0)  # no tie was cut, so later scores of the same key count
        return cut, whole.where(just_below(cut.key), cut.key)

    def rank(self, count: Word, keys: Range, positions: Range, need: Word, peers: int) -> tuple[Word, Word]:
        """(key, position) of the need-th best of the few candidates in both ranges. Each warp finds it for itself."""

        def collect(key, position, exists):
            in_both = exists & keys.holds(key) & positions.holds(self.last_position - position)
            when(in_both, lambda: self.few.store_pair(self.few_count.fetch_increment(0), key, position))

        self.each(count, [], collect)
        self.meet(peers)
        key, position, n = self.few_of_lane(peers)

        def compare(i, better):
            other, at = shuffle("idx", key, i), shuffle("idx", position, i)
            return [better + ((other > key) | (other.equals(key) & (at < position))).to_word()]

        [better] = loop(0, n, 1, [0], compare)
        chosen = (self.lane < n) & better.equals(need - 1)
        result = [warp_reduce("max", chosen.where(x, 0)) for x in (key, position)]
        self.meet(peers)
        self.few_count.store(0, 0, predicate=self.thread.equals(0))
        return result[0], result[1]

    def few_of_lane(self, peers: int) -> tuple[Word, Word, Word]:
        """Returns the candidate of this lane (key, position), and how many lanes of the warp have one."""
        if peers == 1:
            n = self.few_count.load(0)
            key, position = self.few.load_pair(self.lane)
            return key, position, n
        counts = [self.few_count.load_of_peer(0, 1, peer)[0] for peer in range(peers)]
        first = as_word(0)
        owner, place = as_word(0), as_word(0)
        for peer, n in enumerate(counts):
            owner = (self.lane >= first).where(peer, owner)
            place = (self.lane >= first).where(self.lane - first, place)
            first = first + n
        key, position = self.few.load_of_peer(place.min(FEW - 1) << 1, 2, owner)
        return key, position, first

    def count_kept(self, count: Word, cut: Cut) -> Word:
        """Returns how many candidates of this CTA stay."""
        [n] = self.each(
            count, [0], lambda key, position, exists, n: [n + (exists & cut.keeps(key, position)).to_word()]
        )
        return self.offsets(n, 0)[1]

    def keep(self, count: Word, cut: Cut, put: Callable[..., None], start: Word | int = 0) -> Word:
        """`put(place, bits, position, predicate)` for the candidates that stay, in their order -> the end.

        Places count from `start`. Neighbouring lanes put to neighbouring places. `put` may move them within the buffer.
        """
        share = max(1, 2048 // self.threads)  # of a thread between two barriers
        lanes_before = (as_word(1) << self.lane) - 1

        def batch(first, end, parity):
            first = first + self.warp * (32 * share) + self.lane
            places = [first + 32 * i for i in range(share)]
            pairs = [self.candidates.load_pair(place.min(self.config.capacity - 1)) for place in places]
            stay = [
                (place < count) & cut.keeps(to_key(bits), position)
                for place, (bits, position) in zip(places, pairs, strict=True)
            ]
            votes = [warp_votes(x) for x in stay]
            before, everything = self.warp_offsets(total([x.bit_count() for x in votes]), parity)
            place = end + before
            for (bits, position), stays, vote in zip(pairs, stay, votes, strict=True):
                put(place + (vote & lanes_before).bit_count(), bits, position, stays)
                place = place + vote.bit_count()
            return end + everything, parity ^ 1

        return loop(0, count, share * self.threads, [start, 0], batch)[0]
