"""The gather from a cache of FP8 records, which are dequantised on the way to shared memory: a form of `gather.py`."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.mosaic import (
    REF,
    SCALAR,
    Word,
    as_word,
    global_address,
    offset,
    ptx,
    ptx_word,
    ptx_words,
    scalar,
    shared_address,
    thread_index,
)
from pallas_kernels.sparse_mla.gather import (
    EIGHT_ROWS,
    LATENT,
    RECORD,
    ROPE,
    SLOT_BYTES,
    THREADS,
    TILE_BYTES,
    TILED,
    DeviceGather,
    arrive,
    arrive_when_copied,
    mbarrier,
    pack,
    per_thread,
    unpack,
)

TWO_TO_120 = 0x7B807B80
"""A pair of bf16."""


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
        """Returns the steps that a unit does."""
        return range(unit * self.steps // self.units, (unit + 1) * self.steps // self.units)

    def fetch(self, kv_gmem: Any, rows: Any, half: Any, first_row: Any, after: Any, *, unit: int) -> Any:
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
        def load(ctx, kv_gmem, rows, half, first_row, *before):
            lane, half, [rows] = thread_index() & 31, scalar(half), unpack(rows)
            # Part of every address, which the compilers do not know to be 0.
            zero = scalar(first_row) >> 31
            for held in before:
                count = words // 5
                for word in [*unpack(held)[: 4 * count : 4], *unpack(held)[4 * count :]]:  # one of each load
                    zero = zero & word
            values = offset(global_address(kv_gmem), zero + (half << 8) + ((lane >> 3) << 6) + ((lane & 3) << 4), 1)
            scales = offset(global_address(kv_gmem), zero + (half << 3) + ((lane >> 4) << 2) + LATENT, 1)
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

        return load(kv_gmem, rows, half, first_row, *before)

    def fill(self, kv_gmem, keys_smem, stat_smem, ready_bar, rows, held, slot, half, *, part: int, unit: int) -> None:
        layout = self.held[1]

        @plgpu.inline_mgpu(arg_types=(REF, plgpu.RefType(TILED), REF, REF, per_thread(1, 1), layout, SCALAR, SCALAR))
        def store(ctx, kv_gmem, keys_smem, stat_smem, ready_bar, rows, held, slot, half):
            thread, slot, half, [rows], held = thread_index(), scalar(slot), scalar(half), unpack(rows), unpack(held)
            lane = thread & 31
            row = ((thread >> 4) & 6) + ((lane >> 2) & 1)  # within eight rows
            base = shared_address(keys_smem) + slot * SLOT_BYTES + (row << 7)
            if part and unit == 0:
                self.copy_rope(global_address(kv_gmem), base, rows, lane, row)
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
                self.store_bias(stat_smem, slot, rows)
            address = mbarrier(ready_bar, slot, part)
            ptx("fence.proxy.async.shared::cta;")
            arrive(address)
            if part:
                arrive_when_copied(address)

        store(kv_gmem, keys_smem, stat_smem, ready_bar, rows, held, slot, half)

    def copy_rope(self, cache: ir.Value, base: Word, rows: Word, lane: Word, row: Word) -> None:
        """Of the 16 threads that have a row, half copy its 8 chunks; the others do so for the next step's row."""
        odd = (lane >> 4) & 1
        chunk = ((lane & 3) << 1) + ((lane >> 3) & 1)
        place = base + odd * EIGHT_ROWS + ((chunk ^ row) << 4) + LATENT // 64 * TILE_BYTES
        source = offset(cache, (chunk << 4) + (RECORD - 2 * ROPE), 1)
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
