"""One pass over a row that leaves a few thousand candidates: device code that all threads of a CTA run together.

A sample of the row gives a first threshold that somewhat more than k scores exceed. Scores above it are appended to the
candidates, at places from prefix sums: no atomics, so the order never varies. Each chunk also counts the candidates of
the one before into the histogram that the final selection starts with. If the buffer would overflow, a selection inside
the row makes room and raises the threshold. If the sample was misleading and fewer than k are left at the end, the row
is read again without a first threshold: the sample can cost time, never correctness.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxlib.mlir import ir

from pallas_kernels.mosaic import (
    Word,
    as_word,
    barrier,
    branch,
    cluster_barrier,
    load_global,
    loop,
    offset,
    ptx,
    ptx_word,
    store_global,
    total,
)
from pallas_kernels.top_k.selection import (
    ALL_BITS,
    NEGATIVE_INFINITY,
    POSITIVE_INFINITY,
    Cut,
    Selection,
    from_key,
    just_below,
    shift_for,
    to_key,
)

NO_HISTOGRAM = 32
"""As a `shift`: the candidates are not counted."""

SAMPLE_GROUP = 16
"""Neighbouring scores in the sample: two sectors of device memory."""


class Progress(NamedTuple):
    """Where a CTA is in its row."""

    candidates: Word
    """How many are in the buffer."""
    counted: Word
    """How many of them are in the histogram."""
    threshold: Word
    """Key that a score must exceed to be a candidate."""
    shift: Word
    """Of the histogram, whose first bin starts above the threshold; or `NO_HISTOGRAM`."""


class Streaming(Selection):
    """`Selection`, and the steps of a row before and after it."""

    # ---- before the row ----

    def sample_places(self, length: Word) -> list[Word]:
        """Where this thread's groups of 4 sampled scores start: pieces of longer groups, spread over the row."""
        stride = (length >> (self.config.sample // SAMPLE_GROUP).bit_length() - 1) & 0xFFFFFFFC
        stride = self.has_threshold(length).where(stride, 0)  # a short row: anything inside it
        lanes = SAMPLE_GROUP // 4
        groups = [self.thread + i * self.threads for i in range(self.config.sample // (4 * self.threads))]
        return [(i // lanes) * stride + (i % lanes) * 4 for i in groups]

    def has_threshold(self, length: Word) -> Word:
        """Returns whether a row is long enough for a first threshold to pay."""
        return length > max(2 * self.config.sample, self.config.chunk)

    def first_threshold(self, sample: list[Word], length: Word, k: int) -> list[Word]:
        """(threshold, shift of the histogram) from this thread's part of the sample, as score bits."""

        def choose():
            keys = [to_key(bits) for bits in sample]
            keys = [
                (key > POSITIVE_INFINITY).where(NEGATIVE_INFINITY, key.max(NEGATIVE_INFINITY)) for key in keys
            ]  # NaN
            least, greatest = keys[0], keys[0]
            for key in keys[1:]:
                least, greatest = least.min(key), greatest.max(key)
            wanted = k * self.config.aim // 100 * self.config.sample
            rank = (as_word(wanted) // length + self.config.margin).min(self.config.sample)
            # Each thread has a score >= the least of the threads' greatest: so it bounds low ranks, and closely.
            least = (rank <= self.threads).where(greatest, least)
            base, width = self.extremes(least, greatest, peers=1)
            highest = base + width

            def count(base, width, shift, step):
                for key in keys:
                    self.count_word(key - base, shift, step, key - base <= width)

            narrowed = self.narrow(count, base, width, rank, rank + (rank >> 3), few=0)
            threshold = just_below(narrowed.base).max(NEGATIVE_INFINITY)
            useful = threshold > NEGATIVE_INFINITY
            return [threshold, useful.where(shift_for(highest - threshold), NO_HISTOGRAM)]

        return branch(self.has_threshold(length), choose, [NEGATIVE_INFINITY, NO_HISTOGRAM])

    # ---- the row ----

    def absorb(self, scores: list[Word], first: Word, length: Word, step: Word, progress: Progress, k: int) -> Progress:
        """Appends the scores of a chunk that are above the threshold.

        Args:
          scores: this thread's score bits: 4 consecutive ones, every 4 * threads.
          first: position of the chunk.
          length: of the row; what lies beyond is skipped.
          step: counts the chunks.
        """
        n = self.count_above(scores, first, length, progress.threshold)
        place, new = self.offsets(n, step & 1)
        self.count_candidates(progress)  # the barrier in `offsets` has made the last chunk's visible

        def make_room():
            count, threshold = self.shrink(progress.candidates, k)
            n = self.count_above(scores, first, length, threshold)
            place, new = self.offsets(n, step & 1)
            return [place, new, count, threshold, NO_HISTOGRAM]

        place, new, count, threshold, shift = branch(
            progress.candidates + new > self.config.capacity,
            make_room,
            [place, new, progress.candidates, progress.threshold, progress.shift],
        )
        self.store_above(scores, first, length, threshold, count + place)
        return Progress(count + new, count, threshold, shift)

    def score_distance(self, i: int) -> int:
        """From the position of a thread's first score in a chunk to that of its score `i`."""
        return i // 4 * 4 * self.threads + i % 4

    def whole_or_tail(self, first: Word, length: Word, code: Any, results: int = 0) -> list[Word]:
        """`code(tail)`, where `tail` says whether the row may end in this chunk."""
        whole = (length - first).signed_greater(self.config.chunk - 1)
        return branch(whole, lambda: code(False), lambda: code(True), results)

    def above(self, i: int, score: int, threshold: int, left: int, tail: bool) -> str:
        """PTX: the predicate p is whether score `i` is a candidate; the other numbers are those of the operands."""
        text = f"setp.gt.f32 p, ${score + i}, ${threshold};\n"  # ordered: false for NaN
        return text + (f"setp.gt.and.s32 p, ${left}, {self.score_distance(i)}, p;\n" if tail else "")

    def count_above(self, scores: list[Word], first: Word, length: Word, threshold: Word) -> Word:
        """Returns how many of this thread's scores are candidates. Three instructions a score at most."""
        left = length - first - self.thread * 4

        def code(tail):
            text = "{ .reg .pred p; mov.u32 $0, 0;\n"
            for i in range(len(scores)):
                text += self.above(i, 3, 1, 2, tail) + "@p add.u32 $0, $0, 1;\n"
            return [ptx_word(text + "}", from_key(threshold), left, *scores)]

        return self.whole_or_tail(first, length, code, 1)[0]

    def store_above(self, scores: list[Word], first: Word, length: Word, threshold: Word, place: Word) -> None:
        """Stores this thread's candidates from `place` on."""
        own_first = first + self.thread * 4

        def code(tail):
            text = "{ .reg .pred p; .reg .b32 a, q; mov.u32 a, $2;\n"
            for i in range(len(scores)):
                text += self.above(i, 4, 0, 1, tail) + f"add.u32 q, $3, {self.score_distance(i)};\n"
                text += f"@p st.shared.v2.b32 [a], {{${4 + i}, q}};\n@p add.u32 a, a, 8;\n"
            address = self.candidates.address(place << 1)
            ptx(text + "}", from_key(threshold), length - own_first, address, own_first, *scores)

        self.whole_or_tail(first, length, code)

    def count_candidates(self, progress: Progress) -> None:
        """Counts those that are not yet in the histogram into it."""

        def one(i):
            key = to_key(self.candidates.load_pair(i)[0])
            self.count_word(key - (progress.threshold + 1), progress.shift, 0, as_word(0).equals(0))

        def all_of_them():
            loop(progress.counted + self.thread, progress.candidates, self.threads, [], one)

        branch(progress.shift.differs(NO_HISTOGRAM), all_of_them, [])

    def shrink(self, count: Word, k: int) -> tuple[Word, Word]:
        """Keeps the k best candidates and perhaps some more -> (how many, the threshold from now on)."""
        barrier()
        self.clear_histogram()
        base, width = self.extent(count, peers=1)
        cut, threshold = self.cut(count, k, k + self.config.slack, base, width)
        count = self.keep(count, cut, self.candidates.store_pair)
        barrier()
        return count, threshold

    def extent(self, count: Word, peers: int) -> tuple[Word, Word]:
        """Returns the least key of the candidates, and how far it is to the greatest."""

        def one(key, position, exists, least, greatest):
            return exists.where(least.min(key), least), exists.where(greatest.max(key), greatest)

        least, greatest = self.each(count, [ALL_BITS, 0], one)
        return self.extremes(least, greatest, peers)

    # ---- after the row ----

    def finish(
        self, row: ir.Value, out: ir.Value, length: Word, progress: Progress, first_threshold: Word, rank: Word, k: int
    ) -> None:
        """Writes the positions of the k best, then -1.

        Args:
          row: address of the row's scores, as often as there is one to read.
          out: address of the k positions.
          first_threshold: what the row started with.
          rank: number of the CTA in its cluster.
        """
        peers = self.config.cluster
        barrier()
        self.count_candidates(progress)
        [everything, counted] = self.over_cluster(
            2, [progress.candidates, progress.shift.differs(NO_HISTOGRAM).to_word()]
        )

        def again():
            progress = self.read_again(row, length, rank, k)
            return [*progress, *self.over_cluster(4, [progress.candidates]), 0]

        misled = (everything < length.min(k)) & (first_threshold > NEGATIVE_INFINITY)
        *state, everything, counted = branch(misled, again, [*progress, everything, counted])
        progress = Progress(*state)
        count = progress.candidates

        def choose():
            def without_histogram():
                self.clear_histogram()
                base, width = self.extent(count, peers)
                return [base, width, shift_for(width), 0]

            base = progress.threshold + 1
            with_histogram = [base, base ^ ALL_BITS, progress.shift, 1]
            base, width, shift, ready = branch(counted.equals(peers).negated(), without_histogram, with_histogram)
            return self.cut(count, k, k, base, width, peers, shift=shift, counted=ready)[0]

        last = [as_word(0), as_word(self.last_position)]
        cut = Cut(*branch(everything > k, choose, last))
        start = self.kept_before(count, cut, rank)

        def put(place, bits, position, stays):
            store_global(offset(out, place, 4), [position], predicate=stays)

        self.keep(count, cut, put, start)
        branch(rank.equals(0), lambda: self.pad(out, everything, k), [])
        if peers > 1:
            cluster_barrier()  # they have read what they need
        self.clear_histogram()
        barrier()

    def over_cluster(self, place: int, words: list[Word]) -> list[Word]:
        """Returns sums of words over the CTAs of the cluster, with a barrier; `place` is where they are exchanged."""
        if self.config.cluster == 1:
            barrier()
            return words
        for i, word in enumerate(words):
            self.for_peers.store(place + i, word, predicate=self.thread.equals(0))
        cluster_barrier()
        peers = range(self.config.cluster)
        return [total([self.for_peers.load_of_peer(place + i, 1, p)[0] for p in peers]) for i in range(len(words))]

    def read_again(self, row: ir.Value, length: Word, rank: Word, k: int) -> Progress:
        """Returns the row once more, from device memory and without a first threshold."""
        chunk, cluster = self.config.chunk, self.config.cluster

        def one(step, *state):
            first = (step * cluster + rank) * chunk
            scores: list[Word] = []
            for i in range(0, self.config.per_thread, 4):
                # Clamped: a chunk may begin beyond the row's end. What is read there twice is not counted.
                place = (first + self.thread * 4 + self.score_distance(i)).min((length - 1) & 0xFFFFFFFC)
                scores += load_global(offset(row, place, 4), 4)
            return self.absorb(scores, first, length, step, Progress(*state), k)

        self.clear_histogram()
        chunks = (length + (chunk * cluster - 1)) // (chunk * cluster)
        start = Progress(as_word(0), as_word(0), as_word(NEGATIVE_INFINITY), as_word(NO_HISTOGRAM))
        progress = Progress(*loop(0, chunks, 1, list(start), one))
        barrier()
        return progress

    def kept_before(self, count: Word, cut: Cut, rank: Word) -> Word:
        """Returns how many candidates stay in the CTAs of the cluster before this one."""
        if self.config.cluster == 1:
            return as_word(0)
        self.for_peers.store(5, self.count_kept(count, cut), predicate=self.thread.equals(0))
        cluster_barrier()
        start = as_word(0)
        for peer in range(self.config.cluster):
            [n] = self.for_peers.load_of_peer(5, 1, peer)
            start = start + (as_word(peer) < rank).where(n, 0)
        return start

    def pad(self, out: ir.Value, everything: Word, k: int) -> None:
        """-1 after the positions that were chosen."""
        loop(
            everything + self.thread,
            k,
            self.threads,
            [],
            lambda i: store_global(offset(out, i, 4), [as_word(ALL_BITS)]),
        )
