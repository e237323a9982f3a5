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

from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, nvvm

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


def per_thread(count: int, vector: int) -> Any:
    """Returns the layout of an int32 array that is `count` words of each thread, in registers of `vector` words."""
    return plgpu.Layout.WG_STRIDED((THREADS * count,), vec_size=vector)


def pack(words: list[Word], vector: int) -> Any:
    """Returns words of each thread as an array that Pallas can carry."""
    registers = []
    for i in range(0, len(words), vector):
        register = llvm.mlir_undef(ir.VectorType.get((vector,), integer(32)))
        for j in range(vector):
            register = llvm.insertelement(register, words[i + j].value, i32(j))
        registers.append(register)
    layout = per_thread(len(words), vector).to_mgpu()
    return mgpu.FragmentedArray(_registers=np.array(registers, dtype=object), _layout=layout, _is_signed=True)


def unpack(array: Any) -> list[Word]:
    """Returns the inverse of `pack`."""
    words = []
    for register in array.registers.flat:
        [count] = ir.VectorType(register.type).shape
        words += [Word(llvm.extractelement(register, i32(j))) for j in range(count)]
    return words


def mbarrier(ready: Any, slot: Word, part: int) -> Word:
    """Returns the shared address of a part's mbarrier."""
    return shared_address(ready) + (slot << 4) + 8 * part


def arrive(address: Word) -> None:
    """Arrives at an mbarrier, with everything that this thread stored before."""
    ptx("mbarrier.arrive.shared::cta.b64 _, [$0];", address)


def arrive_when_copied(address: Word) -> None:
    """Arrives at an mbarrier as soon as this thread's asynchronous copies have landed."""
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
        """`masked`: any key may be absent; `prefetches`: `prefetch` does something."""
        self.masked, self.prefetches = masked, prefetches
        self.steps = KEYS // self.rows_at_a_time

    def arrivals(self, part: int) -> int:
        """How many arrivals of one thread complete a part."""
        raise NotImplementedError

    def scratch(self) -> Any:
        return plgpu.SMEM((2 * PARTS,), jnp.uint32)

    def prepare(self, ready_bar: Any) -> None:
        """Initialises the mbarriers; every thread of the CTA comes here."""

        @plgpu.inline_mgpu(arg_types=(REF,))
        def initialise(ctx, ready_bar):
            first = mgu.single_thread_predicate(scope=mgu.ThreadSubset.BLOCK)
            for i in range(PARTS):
                count = i32(THREADS * self.arrivals(i % 2))
                nvvm.mbarrier_init(
                    mgu.getelementptr(mgu.memref_ptr(ready_bar), [i], integer(64)), count, predicate=first
                )
            barrier()

        initialise(ready_bar)

    def wait(self, ready_bar: Any, which: int, step: Any) -> None:
        """Waits until part `which` (slot * 2 + part) of the CTA's `step`-th pair of blocks has arrived."""

        @plgpu.inline_mgpu(arg_types=(REF, SCALAR))
        def wait(ctx, ready_bar, step):
            odd = (scalar(step) & 1).differs(0)
            barriers: Callable[..., mgu.BarrierRef] = mgu.BarrierRef  # its phases may be None: `wait_parity` reads none
            barriers(mgu.memref_ptr(ready_bar), i32(which), None, 1).wait_parity(odd.value)

        wait(ready_bar, step)

    def lane_key(self, warp: Word, lane: Word) -> Word:
        """Returns the key whose row number a lane has."""
        in_warp = self.rows_at_a_time // 4
        return lane // in_warp * self.rows_at_a_time + warp * in_warp + lane % in_warp

    def row(self, rows: Word, i: int, in_warp: Word) -> Word:
        """Returns the row number of the `in_warp`-th of the keys that this warp handles in its i-th step."""
        return shuffle("idx", rows, in_warp + self.rows_at_a_time // 4 * i)

    def rows(self, slots_gmem: Any, first_row: Any, token: Any, start: Any, limit: Any) -> Any:
        """Returns row numbers of the keys at `start` and after, one a thread; -1 for the keys at `limit` and after."""

        @plgpu.inline_mgpu(
            arg_types=(REF, SCALAR, SCALAR, SCALAR, SCALAR),
            return_type=plgpu.ShapeDtypeStruct((THREADS,), jnp.int32, layout=per_thread(1, 1)),
        )
        def load(ctx, slots_gmem, first_row, token, start, limit):
            thread = thread_index() % THREADS
            key = scalar(start) + self.lane_key(thread >> 5, thread & (WARP_KEYS - 1))
            [_, width] = ir.MemRefType(slots_gmem.type).shape
            slot = ptx_word(
                "{ .reg .pred p; setp.lt.s32 p, $1, $2; mov.b32 $0, -1; @p ld.global.nc.b32 $0, [$3]; }",
                key,
                scalar(limit),
                offset(offset(global_address(slots_gmem), scalar(token), 4 * width), key, 4),
            )
            return pack([slot.signed_less(0).where(as_word(-1), slot + scalar(first_row))], 1)

        return load(slots_gmem, first_row, token, start, limit)

    def prefetch(self, kv_gmem: Any, rows: Any) -> None:
        if not self.prefetches:
            return

        @plgpu.inline_mgpu(arg_types=(REF, per_thread(1, 1)))
        def prefetch(ctx, kv_gmem, rows):
            [row], memory = unpack(rows), ir.MemRefType(kv_gmem.type)
            element: Any = memory.element_type
            size = memory.shape[1] * element.width // 8
            # Two lanes know a row: each asks for half of it, line by line. One bulk prefetch a row would be issued lane
            # after lane.
            half_lines = -(-size // (2 * LINE))
            address = offset(global_address(kv_gmem), row.signed_max(0), size)
            address = offset(address, (thread_index() >> 4) & 1, half_lines * LINE)
            for line in range(half_lines):
                ptx(f"prefetch.global.L2 [$0+{line * LINE}];", address)

        prefetch(kv_gmem, rows)

    def store_bias(self, stat_smem: Any, slot: Word, rows: Word) -> None:
        """Says which keys are present."""
        thread = thread_index() % THREADS
        lane = thread & 31
        key = self.lane_key(thread >> 5, lane)
        bias = rows.signed_less(0).where(as_word(-0x800000), 0)
        address = shared_address(stat_smem) + ((slot + BIAS) << 8) + (key << 2)
        ptx("st.shared.b32 [$0], $1;", address, bias, predicate=lane < WARP_KEYS)


class CopyingGather(DeviceGather):
    """bf16 rows: asynchronous copies of 16 bytes, 8 threads for the 128 bytes of a row in a tile."""

    rows_at_a_time = 16
    units = 1

    def arrivals(self, part: int) -> int:
        return 2 if self.masked and part == 0 else 1

    def fetch(self, kv_gmem: Any, rows: Any, half: Any, first_row: Any, after: Any, *, unit: int) -> Any:
        """Nothing goes through registers."""
        del kv_gmem, rows, half, first_row, after, unit

    def fill(self, kv_gmem, keys_smem, stat_smem, ready_bar, rows, held, slot, half, *, part: int, unit: int) -> None:
        del held, unit

        @plgpu.inline_mgpu(arg_types=(REF, plgpu.RefType(TILED), REF, REF, per_thread(1, 1), SCALAR, SCALAR))
        def copy(ctx, kv_gmem, keys_smem, stat_smem, ready_bar, rows, slot, half):
            thread, slot, half, [rows] = thread_index() % THREADS, scalar(slot), scalar(half), unpack(rows)
            chunk, row = thread & 7, (thread >> 3) & 7
            place = shared_address(keys_smem) + slot * SLOT_BYTES + (thread >> 6) * EIGHT_ROWS
            place = place + (row << 7) + ((row ^ chunk) << 4)
            left = place + half * (HALF // 64 * TILE_BYTES)
            for i in range(self.steps):
                key_row = self.row(rows, i, (thread >> 3) & 3)
                at = i * self.rows_at_a_time // 8 * EIGHT_ROWS
                source = offset(offset(global_address(kv_gmem), key_row.signed_max(0), 2 * WIDTH), chunk, 16)
                source_left = offset(source, half, 2 * HALF)
                size = key_row.signed_less(0).where(0, 16)  # of which 0 are read, and the rest is zeros
                piece = "cp.async.cg.shared.global.L2::256B [$0+{}], [$1+{}], 16, $2;"
                text = "\n".join(piece.format(at + TILE_BYTES * j, 128 * j) for j in range(HALF // 64))
                ptx(text, left, source_left, size)
                if part:
                    ptx(piece.format(at + LATENT // 64 * TILE_BYTES, 2 * LATENT), place, source, size)
            address = mbarrier(ready_bar, slot, part)
            arrive_when_copied(address)
            if self.masked and part == 0:
                self.store_bias(stat_smem, slot, rows)
                arrive(address)

        copy(kv_gmem, keys_smem, stat_smem, ready_bar, rows, slot, half)


class InterpretedGather:
    """The twin of both forms: ordinary loads and stores in their units, and a `plgpu.Barrier` for the mbarriers.

    As on the device, a wait is for the parity of a step: one for the wrong parity does not wait, and what follows it is
    a race.
    """

    def __init__(self, form: type[DeviceGather], masked: bool):
        self.units, self.masked = form.units, masked

    def scratch(self) -> Any:
        """Returns the barriers, and how often each was waited for."""
        return plgpu.Barrier(num_barriers=PARTS), plgpu.SMEM((PARTS,), jnp.int32)

    def prepare(self, ready_bar: Any) -> None:
        _, waits_smem = ready_bar
        warpgroup = lax.axis_index("warpgroup")
        for part in range(PARTS):

            @pl.when(warpgroup == part // 2)  # which waits for it
            def _(part=part):
                waits_smem[part] = jnp.int32(0)

    def wait(self, ready_bar: Any, part: int, step: Any) -> None:
        bars, waits_smem = ready_bar
        waits = waits_smem[part]

        @pl.when(lax.bitwise_and(waits, jnp.int32(1)) == lax.bitwise_and(step, jnp.int32(1)))
        def _():
            plgpu.barrier_wait(bars.at[part])

        waits_smem[part] = waits + 1

    def rows(self, slots_gmem: Any, first_row: Any, token: Any, start: Any, limit: Any) -> Any:
        key = start + lax.iota(jnp.int32, KEYS)
        slot = slots_gmem[token][jnp.minimum(key, slots_gmem.shape[1] - 1)]
        return jnp.where((key < limit) & (slot >= 0), slot + first_row, -1)

    def prefetch(self, kv_gmem: Any, rows: Any) -> None:
        del kv_gmem, rows

    def fetch(self, kv_gmem: Any, rows: Any, half: Any, first_row: Any, after: Any, *, unit: int) -> Any:
        del first_row, after
        count = KEYS // self.units
        values = self.values(kv_gmem, rows[unit * count : (unit + 1) * count])
        return lax.dynamic_slice_in_dim(values, half * HALF, HALF, axis=1)

    def values(self, kv_gmem: Any, rows: Any) -> Any:
        """Returns the latents and rope keys of rows; zeros for absent ones."""
        values = unpack_rows(kv_gmem[...][jnp.maximum(rows, 0)], ROPE, jnp.bfloat16)
        return jnp.where(rows[:, None] >= 0, values, jnp.zeros_like(values))

    def fill(self, kv_gmem, keys_smem, stat_smem, ready_bar, rows, held, slot, half, *, part: int, unit: int) -> None:
        count = KEYS // self.units
        keys_smem[slot, pl.ds(unit * count, count), pl.ds(half * HALF, HALF)] = held
        if part and unit == 0:
            keys_smem[slot, :, pl.ds(LATENT, ROPE)] = self.values(kv_gmem, rows)[:, LATENT:]
        if unit < self.units - 1:
            return
        if part == 0 and self.masked:
            stat_smem[BIAS + slot] = jnp.where(rows >= 0, jnp.float32(0), -jnp.inf)
        bars, _ = ready_bar
        plgpu.commit_smem()
        plgpu.barrier_arrive(bars.at[2 * slot + part])
