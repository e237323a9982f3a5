"""The program of a CTA of sparse latent attention on Hopper, the same for prefill and decode, bf16 and FP8 caches.

A CTA takes items, one after the other. An item is 64 heads of one token and all of the token's keys, or one of several
splits of them; it walks over them 128 at a time, as two blocks of 64 in two slots of shared memory. Two blocks are all
that fits: 72 KB of queries and 2 x 72 KB of keys.

  warpgroup 2   loads (see gather.py)
  warpgroup 0   scores and softmax of the even blocks (slot 0), columns   0..255 of the output of all blocks
  warpgroup 1   scores and softmax of the odd blocks  (slot 1), columns 256..511 of the output of all blocks

The two math warpgroups take turns: while one does its softmax, the other keeps the tensor cores busy. Blocks are
applied in order in both, so that the running maximum is one chain. A slot is freed in two halves, each by the warpgroup
that multiplies by that half of the values, so that the next keys arrive while the other half is still read.
Probabilities reach the other warpgroup through shared memory, in the place of the rope part of their own keys, which is
dead once the scores are known.

    warpgroup 0:  softmax 0 | P0 -> smem | O += P0 V0 | wait P1 | O += P1 V1 | next scores 0
    warpgroup 1:  scores 1  | wait P0 | O += P0 V0, meanwhile softmax 1 | P1 -> smem | O += P1 V1

Barriers of a slot are numbered slot * 2 + part; part 0 of slot 0 is its left half, part 0 of slot 1 its right half.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.sparse_mla.config import Config
from pallas_kernels.sparse_mla.gather import (
    BIAS,
    HALF,
    KEYS,
    LATENT,
    ROPE,
)
from pallas_kernels.sparse_mla.products import COLUMN, MATRIX, ROW, rows, zeros

HEADS = 64
"""Heads of an item."""
PAIR = 2 * KEYS
"""Keys of a step: one block in each slot."""
LEFT_0, RIGHT_0, RIGHT_1, LEFT_1 = range(4)
"""The parts of the two slots, in the order in which they are loaded."""
SUMS = 2
"""First of the two rows of the statistics with the sums of the two warpgroups; the maxima come before them."""
LOWEST = -1e30
"""A maximum before the first key; finite, so that no difference of maxima is NaN."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a kernel is compiled for. `keys` are slots a token, `masked` says that any of them may be absent."""

    tokens: int
    groups: int
    keys: int
    masked: bool
    scale: float
    config: Config

    @property
    def items(self) -> int:
        return self.tokens * self.config.splits * self.groups

    @property
    def ctas(self) -> int:
        return min(self.items, self.config.ctas)


@dataclasses.dataclass(frozen=True)
class Item:
    """One item: `pairs` pairs of blocks from key `start` on, `done` of them before it in this CTA. All are traced."""

    token: Any
    split: Any
    head: Any
    start: Any
    limit: Any
    pairs: Any
    done: Any


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One CTA's program. The fields after `products` are refs: operands, results, shared memory and barriers."""

    problem: Problem
    gather: Any
    products: Any
    queries_gmem: Any
    kv_gmem: Any
    slots_gmem: Any
    lengths_gmem: Any
    first_row_gmem: Any
    out_gmem: Any
    lse_gmem: Any
    q_smem: Any
    k_smem: Any
    stat_smem: Any
    ready_bar: Any
    q_ready_bar: Any
    q_free_bar: Any
    k_free_bar: Any
    p_ready_bar: Any
    sum_ready_bar: Any

    def run(self) -> None:
        warpgroup = lax.axis_index("warpgroup")
        math_registers, load_registers = self.problem.config.registers
        self.gather.prepare(self.ready_bar)

        def math_warpgroup(f: Callable[[], None]) -> None:
            plgpu.set_max_registers(math_registers, action="increase")
            f()

        def load_warpgroup() -> None:
            plgpu.set_max_registers(load_registers, action="decrease")
            self.load_blocks()

        pl.when(warpgroup == 0)(lambda: math_warpgroup(self.even_blocks))
        pl.when(warpgroup == 1)(lambda: math_warpgroup(self.odd_blocks))
        pl.when(warpgroup == 2)(load_warpgroup)

    def for_items(self, f: Callable[[Item], None], without_keys: Callable[[Item], None] | None = None) -> Any:
        """Calls `f` for this CTA's items that have keys, `without_keys` for the others; returns all pairs of blocks."""
        problem, cta = self.problem, lax.axis_index("cta")

        def one(i, done):
            index = cta + i * problem.ctas
            group, index = lax.rem(index, jnp.int32(problem.groups)), lax.div(index, jnp.int32(problem.groups))
            splits = jnp.int32(problem.config.splits)
            split, token = lax.rem(index, splits), lax.div(index, splits)
            length = lax.clamp(jnp.int32(0), self.lengths_gmem[token], jnp.int32(problem.keys))
            whole = lax.div(length + (PAIR - 1), jnp.int32(PAIR))
            first, end = lax.div(split * whole, splits), lax.div((split + 1) * whole, splits)
            item = Item(
                token=token,
                split=split,
                head=group * HEADS,
                start=first * PAIR,
                limit=lax.min(length, end * PAIR),
                pairs=end - first,
                done=done,
            )
            pl.when(item.pairs > 0)(lambda: f(item))
            if without_keys is not None:
                pl.when(item.pairs == 0)(lambda: without_keys(item))
            return done + item.pairs

        return lax.fori_loop(0, lax.div(problem.items - 1 - cta, jnp.int32(problem.ctas)) + 1, one, jnp.int32(0))

    # ---- math ----

    @property
    def rope(self) -> Any:
        return pl.ds(LATENT, ROPE)

    def columns(self, half: int) -> Any:
        """Returns latent columns: the left or the right half."""
        return pl.ds(half * HALF, HALF)

    def values(self, zero: Any, slot: int, half: int) -> Any:
        return self.k_smem.at[zero + slot, :, self.columns(half)]

    def probabilities(self, zero: Any, slot: int) -> Any:
        return self.k_smem.at[zero + slot, :, self.rope]

    def score(self, scores: Any, zero: Any, slot: int, *columns: Any) -> None:
        """Begins scores += queries @ keys.T over some columns."""
        for part in columns:
            queries, keys = self.q_smem.at[zero, :, part], self.k_smem.at[zero + slot, :, part]
            self.products.multiply(scores, queries, keys, transposed=True)

    def no_scores(self) -> Any:
        return self.products.accumulator(zeros((HEADS, KEYS), MATRIX))

    def start(self) -> tuple[Any, Any, Any]:
        """Returns output, maxima (log2, scaled) and sums before the first key."""
        lowest = plgpu.layout_cast(jnp.full((HEADS,), LOWEST, jnp.float32), ROW)
        return zeros((HEADS, HALF), MATRIX), lowest, zeros((HEADS,), ROW)

    def softmax(self, scores: Any, lowest: Any, item: Item, slot: int, pair: Any, last: bool) -> tuple[Any, Any]:
        """Returns the maxima after these scores, and the probabilities in their terms, not yet divided by any sum."""
        if self.problem.masked:
            bias = plgpu.load(self.stat_smem.at[BIAS + slot], layout=COLUMN)
            scores = scores + lax.broadcast_in_dim(bias, scores.shape, [1])
        elif last:
            key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=MATRIX)
            key = key + (item.start + pair * PAIR + slot * KEYS)
            scores = jnp.where(key < item.limit, scores, -jnp.inf)
        scale, slack = self.problem.scale * math.log2(math.e), self.problem.config.slack
        top = scores.max(axis=1) * scale
        # A maximum that is exceeded by less than `slack` stays: then nearly all rescaling is by exactly 1 and skipped.
        highest = jnp.where(top - lowest > slack, top, lowest) if slack else jnp.maximum(lowest, top)
        return highest, jnp.exp2(scores * scale - rows(highest, scores.shape))

    def rescale(self, output: Any, factors: Any) -> Any:
        if self.problem.config.slack:
            return self.products.rescale(output, factors)
        return output * rows(factors, output.shape)

    def publish(self, zero: Any, slot: int, probabilities: Any, maxima: Any) -> None:
        """Hands probabilities and maxima to the other math warpgroup."""
        self.probabilities(zero, slot)[...] = probabilities
        self.stat_smem.at[slot][...] = maxima
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.p_ready_bar.at[slot])

    def even_blocks(self) -> None:
        """Runs the program of warpgroup 0."""
        products, wait = self.products, self.gather.wait

        def one(item: Item) -> None:
            plgpu.barrier_wait(self.q_ready_bar)

            def first(scores):
                zero = products.opaque_zero(item.done)
                wait(self.ready_bar, LEFT_0, item.done)
                self.score(scores, zero, 0, self.columns(0))
                wait(self.ready_bar, RIGHT_0, item.done)
                self.score(scores, zero, 0, self.columns(1), self.rope)

            def pair(j, carry, last=False):
                output, maxima, sums, scores = carry
                zero = products.opaque_zero(j)
                maxima_0, p = self.softmax(scores, maxima, item, 0, j, last)
                p16 = p.astype(jnp.bfloat16)
                self.publish(zero, 0, p16, maxima_0)
                alpha = jnp.exp2(maxima - maxima_0)

                def values_0(output, sums):
                    products.multiply(output, p16, self.values(zero, 0, 0))
                    sums[...] = sums[...] * alpha + p.sum(axis=1)

                output, sums = products.run(values_0, products.accumulator(self.rescale(output, alpha)), sums)
                plgpu.barrier_arrive(self.k_free_bar.at[LEFT_0])

                plgpu.barrier_wait(self.p_ready_bar.at[1])
                maxima_1 = plgpu.load(self.stat_smem.at[1], layout=ROW)
                beta = jnp.exp2(maxima_0 - maxima_1)

                def values_1(output, scores):
                    products.multiply(output, self.probabilities(zero, 1), self.values(zero, 1, 0))
                    if last:
                        products.wait(0)
                        plgpu.barrier_arrive(self.k_free_bar.at[LEFT_1])
                    else:
                        wait(self.ready_bar, LEFT_0, item.done + j + 1)
                        self.score(scores, zero, 0, self.columns(0))
                        products.wait(1)
                        plgpu.barrier_arrive(self.k_free_bar.at[LEFT_1])
                        wait(self.ready_bar, RIGHT_0, item.done + j + 1)
                        self.score(scores, zero, 0, self.columns(1), self.rope)

                output, scores = products.run(
                    values_1, products.accumulator(self.rescale(output, beta)), self.no_scores()
                )
                return output, maxima_1, sums * beta, scores

            [scores] = products.run(first, self.no_scores())
            carry = lax.fori_loop(0, item.pairs - 1, pair, (*self.start(), scores))
            output, maxima, sums, _ = pair(item.pairs - 1, carry, last=True)
            self.finish(item, output, maxima, sums, 0)

        self.for_items(one, lambda item: self.finish_without_keys(item, 0))

    def odd_blocks(self) -> None:
        """Runs the program of warpgroup 1."""
        products, wait = self.products, self.gather.wait

        def one(item: Item) -> None:
            plgpu.barrier_wait(self.q_ready_bar)

            def pair(j, carry, last=False):
                zero = products.opaque_zero(j)

                def step(output, scores, maxima, sums):
                    wait(self.ready_bar, RIGHT_1, item.done + j)
                    self.score(scores, zero, 1, self.columns(1))
                    wait(self.ready_bar, LEFT_1, item.done + j)
                    self.score(scores, zero, 1, self.columns(0), self.rope)

                    plgpu.barrier_wait(self.p_ready_bar.at[0])
                    maxima_0 = plgpu.load(self.stat_smem.at[0], layout=ROW)
                    alpha = jnp.exp2(maxima[...] - maxima_0)
                    output[...] = self.rescale(products.read(output), alpha)
                    products.multiply(output, self.probabilities(zero, 0), self.values(zero, 0, 1))

                    known = products.read(scores, pending=1)  # while the product above is under way
                    maxima_1, p = self.softmax(known, maxima_0, item, 1, j, last)
                    p16 = p.astype(jnp.bfloat16)
                    self.publish(zero, 1, p16, maxima_1)
                    beta = jnp.exp2(maxima_0 - maxima_1)
                    products.wait(0)
                    plgpu.barrier_arrive(self.k_free_bar.at[RIGHT_0])
                    output[...] = self.rescale(products.read(output), beta)
                    products.multiply(output, p16, self.values(zero, 1, 1))
                    maxima[...] = maxima_1
                    sums[...] = sums[...] * (alpha * beta) + p.sum(axis=1)

                output, maxima, sums = carry
                output, _, maxima, sums = products.run(
                    step, products.accumulator(output), self.no_scores(), maxima, sums
                )
                plgpu.barrier_arrive(self.k_free_bar.at[RIGHT_1])
                return output, maxima, sums

            carry = lax.fori_loop(0, item.pairs - 1, pair, self.start())
            output, maxima, sums = pair(item.pairs - 1, carry, last=True)
            self.finish(item, output, maxima, sums, 1)

        self.for_items(one, lambda item: self.finish_without_keys(item, 1))

    # ---- results ----

    def place(self, item: Item, row: int = 0, count: int = HEADS) -> tuple[Any, ...]:
        """Returns where an item's heads go in `out` and `lse`: `count` of them from `row` on."""
        heads = pl.ds(item.head + row, count)
        return (item.token, heads) if self.problem.config.splits == 1 else (item.token, item.split, heads)

    def finish(self, item: Item, output: Any, maxima: Any, sums: Any, half: int) -> None:
        """Adds up the sums of both warpgroups, and writes this one's columns of the output."""
        self.stat_smem.at[SUMS + half][...] = sums
        plgpu.barrier_arrive(self.sum_ready_bar)
        plgpu.barrier_wait(self.sum_ready_bar)
        sums = sums + plgpu.load(self.stat_smem.at[SUMS + 1 - half], layout=ROW)
        output = output * rows(jnp.where(sums > 0, 1.0 / sums, 0.0), output.shape)
        columns = self.columns(half)
        if half == 1:
            self.lse_gmem.at[self.place(item)][...] = (maxima + jnp.log2(sums)) * math.log(2.0)
        self.q_smem.at[0, :, columns][...] = output.astype(jnp.bfloat16)  # nobody needs the queries any more
        plgpu.commit_smem()
        for row in range(0, HEADS, 8):  # 8 rows of 256 columns are contiguous, as a copy to device memory must be
            plgpu.copy_smem_to_gmem(
                self.q_smem.at[0, pl.ds(row, 8), columns], self.out_gmem.at[(*self.place(item, row, 8), columns)]
            )
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(self.q_free_bar)

    def finish_without_keys(self, item: Item, half: int) -> None:
        """Writes zeros and -inf; of a split only -inf, by which it is left out."""
        place = self.place(item)
        if half == 1:
            self.lse_gmem.at[place][...] = plgpu.layout_cast(jnp.full((HEADS,), -jnp.inf, jnp.float32), ROW)
        if self.problem.config.splits == 1:
            nothing = plgpu.layout_cast(jnp.zeros((HEADS, HALF), jnp.bfloat16), MATRIX)
            self.out_gmem.at[(*place, self.columns(half))][...] = nothing

    # ---- loads ----

    def load_blocks(self) -> None:
        """Runs the program of warpgroup 2, which loads."""
        gather = self.gather
        units = 2 * gather.units
        first_row = self.first_row_gmem[0]

        def half_of(slot, part):
            return slot if part == 0 else 1 - slot

        def one(item: Item) -> None:
            def load_queries():
                plgpu.copy_gmem_to_smem(
                    self.queries_gmem.at[item.token, pl.ds(item.head, HEADS)], self.q_smem.at[0], self.q_ready_bar
                )

            def rows_of(block):
                return gather.rows(self.slots_gmem, first_row, item.token, item.start + block * KEYS, item.limit)

            def fetch(block_rows, slot, unit, after):
                part, unit = divmod(unit, gather.units)
                return gather.fetch(self.kv_gmem, block_rows, half_of(slot, part), first_row, after, unit=unit)

            def block(b, carry):
                rows, next_rows, held = carry
                slot = lax.bitwise_and(b, jnp.int32(1))
                for unit in range(units):
                    part, unit_of_part = divmod(unit, gather.units)
                    which = 2 * slot + part
                    # The next unit is on its way before it has a place.
                    at = (rows, slot) if unit + 1 < units else (next_rows, 1 - slot)
                    following = fetch(*at, (unit + 1) % units, held)
                    if unit == units // 2 - 1:
                        rows_after_next = rows_of(b + 2)
                        gather.prefetch(self.kv_gmem, next_rows)
                    if unit_of_part == 0:

                        @pl.when(item.done * 2 + b >= 2)
                        def _(which=which):
                            plgpu.barrier_wait(self.k_free_bar.at[which])

                    refs = self.kv_gmem, self.k_smem, self.stat_smem, self.ready_bar
                    gather.fill(*refs, rows, held, slot, half_of(slot, part), part=part, unit=unit_of_part)
                    held = following

                @pl.when(jnp.logical_and(item.done > 0, b == 1))
                def _next_queries():  # in the place of the outputs just stored
                    plgpu.barrier_wait(self.q_free_bar)
                    load_queries()

                return next_rows, rows_after_next, held

            pl.when(item.done == 0)(load_queries)
            zero = item.done * 0  # a literal could not be captured
            rows, next_rows = rows_of(zero), rows_of(zero + 1)
            gather.prefetch(self.kv_gmem, rows)
            lax.fori_loop(0, 2 * item.pairs, block, (rows, next_rows, fetch(rows, zero, 0, None)))

        total = self.for_items(one)

        @pl.when(total > 0)
        def _drain():
            for which in range(4):
                plgpu.barrier_wait(self.k_free_bar.at[which])
            plgpu.barrier_wait(self.q_free_bar)
