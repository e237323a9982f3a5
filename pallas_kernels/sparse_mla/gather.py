"""How the chosen rows of the cache reach shared memory: copied (bf16) or dequantised on the way (FP8).

A block of 64 keys is one slot of shared memory, [64, 576] bf16, and arrives in two parts, each with its own mbarrier:
first one half of the latent columns, then the other half with the rope columns. Slot 0 begins with its left half, slot
1 with its right half. A (64, 576) ref tiled (8, 64) is [8, 9, 8, 64] in memory, and the 128-byte swizzle puts the
16-byte chunk c of row r at c ^ (r % 8).

The three classes have the same methods, called by the loading warpgroup in this order for each block:

  rows(...)       the keys of the block as row numbers of the whole cache; -1 where absent
  prefetch(...)   has them brought into L2, if that helps
  fetch(...)      begins to load a unit (a part or a half of one), if it goes through registers
  fill(...)       puts a unit in place; the last one of a part tells the part's mbarrier

Absent keys are filled with zeros: whatever a row holds that nobody chose must not come near a product.
"""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from pallas_kernels.cache_format import record_bytes, unpack_rows
from pallas_kernels.mosaic import (
    REF,
    SCALAR,
    Word,
    as_word,
    barrier,
    global_address,
    i32,
    integer,
    offset,
    ptx,
    ptx_word,
    ptx_words,
    scalar,
    shared_address,
    shuffle,
    thread_index,
)

LATENT, ROPE = 512, 64
WIDTH = LATENT + ROPE
RECORD = record_bytes(LATENT, ROPE)
KEYS = 64
"""Keys of a block."""
HALF = LATENT // 2
PARTS = 4
"""Mbarriers: slot * 2 + part."""
THREADS = 128
WARP_KEYS = KEYS // 4
BIAS = 4
"""First of the two rows of the statistics that hold 0 for a present key and -inf for an absent one, a row a slot."""
TILED: Any = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]

TILE_BYTES = 8 * 128
ROW_TILES = WIDTH // 64
EIGHT_ROWS = ROW_TILES * TILE_BYTES
SLOT_BYTES = KEYS * WIDTH * 2
LINE = 128
"""Bytes that L2 loads at once."""
TWO_TO_120 = 0x7B807B80
"""A pair of bf16."""


def per_thread(count: int, vector: int) -> Any:
    """The layout of an int32 array that is `count` words of each thread, in registers of `vector` words."""
    return plgpu.Layout.WG_STRIDED((THREADS * count,), vec_size=vector)


def pack(words: list[Word], vector: int) -> Any:
    """Words of each thread as an array that Pallas can carry."""
    registers = []
    for i in range(0, len(words), vector):
        register = llvm.mlir_undef(ir.VectorType.get((vector,), integer(32)))
        for j in range(vector):
            register = llvm.insertelement(register, words[i + j].value, i32(j))
        registers.append(register)
    layout = per_thread(len(words), vector).to_mgpu()
    return mgpu.FragmentedArray(_registers=np.array(registers, dtype=object), _layout=layout, _is_signed=True)


def unpack(array: Any) -> list[Word]:
    """The inverse of `pack`."""
    words = []
    for register in array.registers.flat:
        [count] = ir.VectorType(register.type).shape
        words += [Word(llvm.extractelement(register, i32(j))) for j in range(count)]
    return words


def mbarrier(ready: Any, slot: Word, part: int) -> Word:
    """The shared address of a part's mbarrier."""
    return shared_address(ready) + (slot << 4) + 8 * part


def arrive(address: Word) -> None:
    """With everything that this thread stored before."""
    ptx("mbarrier.arrive.shared::cta.b64 _, [$0];", address)


def arrive_when_copied(address: Word) -> None:
    """As soon as this thread's asynchronous copies have landed."""
    ptx("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", address)


class DeviceGather:
    """What both forms share: barriers, and which keys a thread works on.

    A warp has 16 keys of a block, and each of its lanes the row number of one of them; it gets others from its
    neighbours. The mbarriers are plain shared memory: a `plgpu.Barrier` cannot be passed to `inline_mgpu`, and
    asynchronous copies must arrive at them.
    """

    rows_at_a_time: int
    """Keys that the warpgroup handles at once: the distance from one key of a thread to its next."""
    units: int
    """Units of a part."""

    def __init__(self, masked: bool, prefetches: bool):
        """Any key may be absent; whether `prefetch` does anything."""
        self.masked, self.prefetches = masked, prefetches
        self.steps = KEYS // self.rows_at_a_time

    def arrivals(self, part: int) -> int:
        """How many arrivals of one thread complete a part."""
        raise NotImplementedError

    def scratch(self) -> Any:
        return plgpu.SMEM((2 * PARTS,), jnp.uint32)

    def prepare(self, ready: Any) -> None:
        """Initialises the mbarriers; every thread of the CTA comes here."""

        @plgpu.inline_mgpu(arg_types=(REF,))
        def initialise(ctx, ready):
            first = mgu.single_thread_predicate(scope=mgu.ThreadSubset.BLOCK)
            for i in range(PARTS):
                count = i32(THREADS * self.arrivals(i % 2))
                nvvm.mbarrier_init(mgu.getelementptr(mgu.memref_ptr(ready), [i], integer(64)), count, predicate=first)
            barrier()

        initialise(ready)

    def wait(self, ready: Any, which: int, step: Any) -> None:
        """Until part `which` (slot * 2 + part) of the CTA's `step`-th pair of blocks is there."""

        @plgpu.inline_mgpu(arg_types=(REF, SCALAR))
        def wait(ctx, ready, step):
            odd = (scalar(step) & 1).differs(0)
            mgu.BarrierRef(mgu.memref_ptr(ready), i32(which), None, 1).wait_parity(odd.value)

        wait(ready, step)

    def lane_key(self, warp: Word, lane: Word) -> Word:
        """The key whose row number a lane has."""
        in_warp = self.rows_at_a_time // 4
        return lane // in_warp * self.rows_at_a_time + warp * in_warp + lane % in_warp

    def row(self, rows: Word, i: int, in_warp: Word) -> Word:
        """The row number of the `in_warp`-th of the keys that this warp handles in its i-th step."""
        return shuffle("idx", rows, in_warp + self.rows_at_a_time // 4 * i)

    def rows(self, slots: Any, first_row: Any, token: Any, start: Any, limit: Any) -> Any:
        """Row numbers of the keys at `start` and after, one a thread; -1 for the keys at `limit` and after."""

        @plgpu.inline_mgpu(
            arg_types=(REF, SCALAR, SCALAR, SCALAR, SCALAR),
            return_type=plgpu.ShapeDtypeStruct((THREADS,), jnp.int32, layout=per_thread(1, 1)),
        )
        def load(ctx, slots, first_row, token, start, limit):
            thread = thread_index() % THREADS
            key = scalar(start) + self.lane_key(thread >> 5, thread & (WARP_KEYS - 1))
            [_, width] = ir.MemRefType(slots.type).shape
            slot = ptx_word(
                "{ .reg .pred p; setp.lt.s32 p, $1, $2; mov.b32 $0, -1; @p ld.global.nc.b32 $0, [$3]; }",
                key,
                scalar(limit),
                offset(offset(global_address(slots), scalar(token), 4 * width), key, 4),
            )
            return pack([slot.signed_less(0).where(as_word(-1), slot + scalar(first_row))], 1)

        return load(slots, first_row, token, start, limit)

    def prefetch(self, kv: Any, rows: Any) -> None:
        if not self.prefetches:
            return

        @plgpu.inline_mgpu(arg_types=(REF, per_thread(1, 1)))
        def prefetch(ctx, kv, rows):
            [row], memory = unpack(rows), ir.MemRefType(kv.type)
            element: Any = memory.element_type
            size = memory.shape[1] * element.width // 8
            # Two lanes know a row: each asks for half of it, line by line. One bulk prefetch a row would be issued lane
            # after lane.
            half_lines = -(-size // (2 * LINE))
            address = offset(global_address(kv), row.signed_max(0), size)
            address = offset(address, (thread_index() >> 4) & 1, half_lines * LINE)
            for line in range(half_lines):
                ptx(f"prefetch.global.L2 [$0+{line * LINE}];", address)

        prefetch(kv, rows)

    def store_bias(self, stat: Any, slot: Word, rows: Word) -> None:
        """Says which keys are present."""
        thread = thread_index() % THREADS
        lane = thread & 31
        key = self.lane_key(thread >> 5, lane)
        bias = rows.signed_less(0).where(as_word(-0x800000), 0)
        address = shared_address(stat) + ((slot + BIAS) << 8) + (key << 2)
        ptx("st.shared.b32 [$0], $1;", address, bias, predicate=lane < WARP_KEYS)


class CopyingGather(DeviceGather):
    """bf16 rows: asynchronous copies of 16 bytes, 8 threads for the 128 bytes of a row in a tile."""

    rows_at_a_time = 16
    units = 1

    def arrivals(self, part: int) -> int:
        return 2 if self.masked and part == 0 else 1

    def fetch(self, kv: Any, rows: Any, half: Any, first_row: Any, after: Any, *, unit: int) -> Any:
        """Nothing goes through registers."""
        del kv, rows, half, first_row, after, unit

    def fill(self, kv, keys, stat, ready, rows, held, slot, half, *, part: int, unit: int) -> None:
        del held, unit

        @plgpu.inline_mgpu(arg_types=(REF, plgpu.RefType(TILED), REF, REF, per_thread(1, 1), SCALAR, SCALAR))
        def copy(ctx, kv, keys, stat, ready, rows, slot, half):
            thread, slot, half, [rows] = thread_index() % THREADS, scalar(slot), scalar(half), unpack(rows)
            chunk, row = thread & 7, (thread >> 3) & 7
            place = shared_address(keys) + slot * SLOT_BYTES + (thread >> 6) * EIGHT_ROWS
            place = place + (row << 7) + ((row ^ chunk) << 4)
            left = place + half * (HALF // 64 * TILE_BYTES)
            for i in range(self.steps):
                key_row = self.row(rows, i, (thread >> 3) & 3)
                at = i * self.rows_at_a_time // 8 * EIGHT_ROWS
                source = offset(offset(global_address(kv), key_row.signed_max(0), 2 * WIDTH), chunk, 16)
                source_left = offset(source, half, 2 * HALF)
                size = key_row.signed_less(0).where(0, 16)  # of which 0 are read, and the rest is zeros
                piece = "cp.async.cg.shared.global.L2::256B [$0+{}], [$1+{}], 16, $2;"
                text = "\n".join(piece.format(at + TILE_BYTES * j, 128 * j) for j in range(HALF // 64))
                ptx(text, left, source_left, size)
                if part:
                    ptx(piece.format(at + LATENT // 64 * TILE_BYTES, 2 * LATENT), place, source, size)
            address = mbarrier(ready, slot, part)
            arrive_when_copied(address)
            if self.masked and part == 0:
                self.store_bias(stat, slot, rows)
                arrive(address)

        copy(kv, keys, stat, ready, rows, slot, half)


class DequantisingGather(DeviceGather):
    """FP8 records: 16 e4m3 values at a time through registers, the rope columns by asynchronous copies.

    Scales are rounded to bf16, which is exact for the powers of two that `quantize` writes by default. A group of 4
    threads has 64 values of a row and 8 threads two neighbouring rows, whose swizzled chunks fill all banks.
    """

    rows_at_a_time = 8
    units = 2

    def arrivals(self, part: int) -> int:
        return 2 if part else 1

    @property
    def held(self) -> tuple[int, Any]:
        """The words of a thread that `fetch` returns, and their layout: 4 words of 4 values a key, then the scales."""
        words = 5 * self.steps // self.units
        return words, per_thread(words, words)

    def unit_steps(self, unit: int) -> range:
        """The steps that a unit does."""
        return range(unit * self.steps // self.units, (unit + 1) * self.steps // self.units)

    def fetch(self, kv: Any, rows: Any, half: Any, first_row: Any, after: Any, *, unit: int) -> Any:
        """Starts the loads of a unit, once those of `after` have arrived.

        All loads of a warp are counted by one scoreboard, so that whoever waits for some waits for all. Therefore the
        next unit's begin when this one's are there, and have the time of its conversion.
        """
        words, layout = self.held
        before = () if after is None else (after,)

        @plgpu.inline_mgpu(
            arg_types=(REF, per_thread(1, 1), SCALAR, SCALAR, *[layout for _ in before]),
            return_type=plgpu.ShapeDtypeStruct((THREADS * words,), jnp.int32, layout=layout),
        )
        def load(ctx, kv, rows, half, first_row, *before):
            lane, half, [rows] = thread_index() & 31, scalar(half), unpack(rows)
            # Part of every address, which the compilers do not know to be 0.
            zero = scalar(first_row) >> 31
            for held in before:
                count = words // 5
                for word in [*unpack(held)[: 4 * count : 4], *unpack(held)[4 * count :]]:  # one of each load
                    zero = zero & word
            values = offset(global_address(kv), zero + (half << 8) + ((lane >> 3) << 6) + ((lane & 3) << 4), 1)
            scales = offset(global_address(kv), zero + (half << 3) + ((lane >> 4) << 2) + LATENT, 1)
            loaded, loaded_scales = [], []
            for i in self.unit_steps(unit):
                row = self.row(rows, i, (lane >> 2) & 1)
                text = "ld.relaxed.gpu.global.L1::no_allocate.L2::256B.v4.b32 {$0, $1, $2, $3}, [$4];"
                loaded += ptx_words(text, 4, offset(values, row.signed_max(0), RECORD))
                # The values of an absent key are those of some row, finite whatever its bytes are; 0 times them is 0.
                text = "{ .reg .pred p; setp.ge.s32 p, $1, 0; mov.b32 $0, 0; @p ld.relaxed.gpu.global.b32 $0, [$2]; }"
                loaded_scales.append(ptx_word(text, row, offset(scales, row.signed_max(0), RECORD)))
            # ptxas would sink the loads down to their use.
            ptx("bar.warp.sync 0xffffffff;")
            return pack(loaded + loaded_scales, words)

        return load(kv, rows, half, first_row, *before)

    def fill(self, kv, keys, stat, ready, rows, held, slot, half, *, part: int, unit: int) -> None:
        layout = self.held[1]

        @plgpu.inline_mgpu(arg_types=(REF, plgpu.RefType(TILED), REF, REF, per_thread(1, 1), layout, SCALAR, SCALAR))
        def store(ctx, kv, keys, stat, ready, rows, held, slot, half):
            thread, slot, half, [rows], held = thread_index(), scalar(slot), scalar(half), unpack(rows), unpack(held)
            lane = thread & 31
            row = ((thread >> 4) & 6) + ((lane >> 2) & 1)  # within eight rows
            base = shared_address(keys) + slot * SLOT_BYTES + (row << 7)
            if part and unit == 0:
                self.copy_rope(global_address(kv), base, rows, lane, row)
            place = base + ((half << 2) + (lane >> 3)) * TILE_BYTES + ((((lane & 3) << 1) ^ row) << 4)
            steps = self.unit_steps(unit)
            for n, i in enumerate(steps):
                scale = ptx_word("cvt.rn.bf16x2.f32 $0, $1, $1;", _float(held[4 * len(steps) + n]))
                words = [x for word in held[4 * n : 4 * n + 4] for x in dequantise(word, scale)]
                for chunk in range(2):
                    text = f"st.shared.v4.b32 [$0+{i * EIGHT_ROWS}], {{$1, $2, $3, $4}};"
                    ptx(text, place ^ (16 * chunk), *words[4 * chunk : 4 * chunk + 4])
            if unit < self.units - 1:
                return
            if part == 0 and self.masked:
                self.store_bias(stat, slot, rows)
            address = mbarrier(ready, slot, part)
            ptx("fence.proxy.async.shared::cta;")
            arrive(address)
            if part:
                arrive_when_copied(address)

        store(kv, keys, stat, ready, rows, held, slot, half)

    def copy_rope(self, kv: ir.Value, base: Word, rows: Word, lane: Word, row: Word) -> None:
        """Of the 16 threads that have a row, half copy its 8 chunks; the others do so for the next step's row."""
        odd = (lane >> 4) & 1
        chunk = ((lane & 3) << 1) + ((lane >> 3) & 1)
        place = base + odd * EIGHT_ROWS + ((chunk ^ row) << 4) + LATENT // 64 * TILE_BYTES
        source = offset(kv, (chunk << 4) + (RECORD - 2 * ROPE), 1)
        for i in range(0, self.steps, 2):
            key_row = self.row(rows, i, ((lane >> 2) & 1) + 2 * odd)
            ptx(
                f"cp.async.cg.shared.global.L2::128B [$0+{i * EIGHT_ROWS}], [$1], 16, $2;",
                place,
                offset(source, key_row.signed_max(0), RECORD),
                key_row.signed_less(0).where(0, 16),
            )


def _float(word: Word) -> ir.Value:
    return arith.bitcast(ir.F32Type.get(), word.value)


def dequantise(word: Word, scale: Word) -> list[Word]:
    """Four e4m3 values as two words of two bf16 each, times a pair of equal bf16 scales; exact up to that product.

    A byte s eeee mmm becomes s 0000eeee mmm0000 of a bf16, which reads 2^120 too small, subnormal numbers too. The
    hardware's conversion is several times slower than these bit fields. There is no NaN: 0x7f reads as 480.
    """
    text = (
        "{ .reg .b32 low, high, a, b;"
        "and.b32 low, $2, 0x0f0f0f0f; shl.b32 low, low, 4;"
        "shr.u32 high, $2, 4; and.b32 high, high, 0x07070707;"
        "lop3.b32 high, $2, 0x80808080, high, 0xea;"  # (word & signs) | high
        "prmt.b32 a, low, high, 0x5140; prmt.b32 b, low, high, 0x7362;"
        "mul.rn.bf16x2 a, a, $4; mul.rn.bf16x2 b, b, $4;"
        "mul.rn.bf16x2 $0, a, $3; mul.rn.bf16x2 $1, b, $3; }"
    )
    return ptx_words(text, 2, word, scale, as_word(TWO_TO_120))


class InterpretedGather:
    """The twin of both forms: ordinary loads and stores in their units, and a `plgpu.Barrier` for the mbarriers.

    As on the device, a wait is for the parity of a step: one for the wrong parity does not wait, and what follows it is
    a race.
    """

    def __init__(self, form: type[DeviceGather], masked: bool):
        self.units, self.masked = form.units, masked

    def scratch(self) -> Any:
        """The barriers, and how often each was waited for."""
        return plgpu.Barrier(num_barriers=PARTS), plgpu.SMEM((PARTS,), jnp.int32)

    def prepare(self, ready: Any) -> None:
        _, waits_smem = ready
        warpgroup = lax.axis_index("warpgroup")
        for part in range(PARTS):

            @pl.when(warpgroup == part // 2)  # which waits for it
            def _(part=part):
                waits_smem[part] = jnp.int32(0)

    def wait(self, ready: Any, part: int, step: Any) -> None:
        bars, waits_smem = ready
        waits = waits_smem[part]

        @pl.when(lax.bitwise_and(waits, jnp.int32(1)) == lax.bitwise_and(step, jnp.int32(1)))
        def _():
            plgpu.barrier_wait(bars.at[part])

        waits_smem[part] = waits + 1

    def rows(self, slots: Any, first_row: Any, token: Any, start: Any, limit: Any) -> Any:
        key = start + lax.iota(jnp.int32, KEYS)
        slot = slots[token][jnp.minimum(key, slots.shape[1] - 1)]
        return jnp.where((key < limit) & (slot >= 0), slot + first_row, -1)

    def prefetch(self, kv: Any, rows: Any) -> None:
        del kv, rows

    def fetch(self, kv: Any, rows: Any, half: Any, first_row: Any, after: Any, *, unit: int) -> Any:
        del first_row, after
        count = KEYS // self.units
        values = self.values(kv, rows[unit * count : (unit + 1) * count])
        return lax.dynamic_slice_in_dim(values, half * HALF, HALF, axis=1)

    def values(self, kv: Any, rows: Any) -> Any:
        """The latents and rope keys of rows; zeros for absent ones."""
        values = unpack_rows(kv[...][jnp.maximum(rows, 0)], ROPE, jnp.bfloat16)
        return jnp.where(rows[:, None] >= 0, values, jnp.zeros_like(values))

    def fill(self, kv, keys, stat, ready, rows, held, slot, half, *, part: int, unit: int) -> None:
        count = KEYS // self.units
        keys[slot, pl.ds(unit * count, count), pl.ds(half * HALF, HALF)] = held
        if part and unit == 0:
            keys[slot, :, pl.ds(LATENT, ROPE)] = self.values(kv, rows)[:, LATENT:]
        if unit < self.units - 1:
            return
        if part == 0 and self.masked:
            stat[BIAS + slot] = jnp.where(rows >= 0, jnp.float32(0), -jnp.inf)
        bars, _ = ready
        plgpu.commit_smem()
        plgpu.barrier_arrive(bars.at[2 * slot + part])
