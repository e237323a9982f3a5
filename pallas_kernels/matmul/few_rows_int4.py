"""Four-bit weights in products of few bfloat16 rows: they stream through shared memory as they are stored.

Each of a CTA's four warpgroups takes every fourth group of 128 of a stage: it turns four-bit values into bfloat16 in
the registers that wgmma reads its first operand from (exact: integers from -15 to 15), multiplies, turns the next
group's meanwhile, and scales what comes out. At an item's end the four sums are added up in a fixed order.

A thread loads 16 bytes of a row at once; `int4.py` has stored there what wgmma wants of it.

A tile has 8, 16 or 32 rows. Tiles of more are taken as several of 32 with the same expert, whose weights come from the
second-level cache after the first.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils as mgu
from jaxlib.mlir.dialects import arith

from pallas_kernels import mosaic
from pallas_kernels.matmul.config import FewRowsInt4
from pallas_kernels.matmul.few_rows import Epilogue, Refs, Stage
from pallas_kernels.matmul.few_rows_tile import layout_of, pack, unpack
from pallas_kernels.matmul.int4 import BIASED, GROUP, unpack_values
from pallas_kernels.matmul.weight_stream import copy_lines
from pallas_kernels.mosaic import REF, SCALAR, Float, SharedWords, Word, integer
from pallas_kernels.mosaic.wgmma import SWIZZLED, descriptor, finish, first_row, floats


def pairs_of(word: Word, zero: Word) -> list[Word]:
    """Returns eight values of a word as pairs of bfloat16, less `zero` (a pair): nibbles i and i + 4."""
    pairs = []
    for i in range(4):
        biased = ((word >> (4 * i)) & 0x000F000F) | (BIASED * 0x10001)
        text = "sub.rn.bf16x2 $0, $1, $2;"
        pairs.append(Word(mgu.inline_ptx(text, biased.value, zero.value, result_types=integer(32))))
    return pairs


def start_product(left: list[Word], right: Any, columns: int) -> list[Any]:
    """Starts D[64, columns] = left[64, 128] right[columns, 128]^T of bfloat16; `left` are registers, 4 for 16 of K."""
    count = columns // 2
    names = "{" + ", ".join(f"${i}" for i in range(count)) + "}"
    text = (
        "{ .reg .b64 b; .reg .pred first, later; setp.ne.b32 first, 0, 0; setp.ne.b32 later, 1, 0;\n"
        "wgmma.fence.sync.aligned;\n"
    )
    for k in range(8):
        # 16 of K are 32 bytes of a row of 64 values; the other 64 lie behind all tokens' first ones.
        step = (k // 4) * (columns * 128 >> 4) + 2 * (k % 4)
        operand = "{" + ", ".join(f"${count + 1 + 4 * k + i}" for i in range(4)) + "}"
        text += (
            f"add.s64 b, ${count}, {step};\n"
            f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {names}, {operand}, b, "
            f"{'later' if k else 'first'}, 1, 1, 0;\n"
        )
    return floats(text + "wgmma.commit_group.sync.aligned; }", count, right, *left)


def device_stage(config: FewRowsInt4):
    """Returns a function of a warpgroup: its sums and the products of its groups in a stage, added up.

    Its arguments:
      values_smem: bytes [stages, groups / 2, rows, 128] in shared memory: a strip's rows of two groups each.
      x_smem: bfloat16 [stages, 2 * groups, tile, 64].
      words_smem: [stages, groups, rows], see `pack_int4`.
      sums: as `layout_of`; slot: the stage; warpgroup: its number.
    """
    layout = layout_of(config)

    @plgpu.inline_mgpu(
        arg_types=(SWIZZLED, SWIZZLED, REF, layout, SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct((64 * config.tile,), jnp.float32, layout=layout),
    )
    def stage(ctx, values_smem, x_smem, words_smem, sums, slot, warpgroup):
        del ctx
        slot, warpgroup = map(mosaic.scalar, (slot, warpgroup))
        thread = mosaic.thread_index() & 127
        row = first_row(thread)  # of a strip of less than 64 rows, also those past it, whatever is there
        # 16 bytes of a row of 128, swizzled by the row's lowest three bits.
        piece = (((warpgroup & 1) << 2) + (thread & 3)) ^ ((thread & 31) >> 2)
        group = slot * config.groups + warpgroup
        first = (group >> 1) * (config.rows * 128) + row * 128 + (piece << 4)
        values = SharedWords(mosaic.shared_address(values_smem) + first)
        thread_words = SharedWords(words_smem).part(group * config.rows + row)
        right = descriptor(mosaic.shared_address(x_smem) + group * (2 * config.tile * 128))

        def start(which):
            """The warpgroup's `which`-th product, under way, and the factors of its two rows."""
            further = config.warpgroups * which
            # Rows r and r + 8.
            loaded = [values.load_many(32 * (further // 2 * config.rows + 8 * i), 4) for i in range(2)]
            scales = [thread_words.load(further * config.rows + 8 * i) for i in range(2)]
            zeros = [(word & 0xFFFF) * 0x10001 for word in scales]
            left: list[Word] = []
            for upper, lower in zip(*loaded, strict=True):
                a, b = pairs_of(upper, zeros[0]), pairs_of(lower, zeros[1])
                for i in (0, 2):
                    left += [a[i], b[i], a[i + 1], b[i + 1]]
            right_operand = arith.addi(right, mosaic.i64(further * (2 * config.tile * 128) >> 4))
            return start_product(left, right_operand, config.tile), [Float.of_bits(word & -65536) for word in scales]

        total, flying = unpack(sums), start(0)
        for which in range(config.depth):
            (product, factors), more = flying, which + 1 < config.depth
            if more:
                flying = start(which + 1)
            product = finish(product, flying=1 if more else 0)
            total = [Float(p).times_plus(factors[i // 2 % 2], total[i]) for i, p in enumerate(product)]
        return pack(total, layout)

    return stage


def interpreted_stage(config: FewRowsInt4):
    """Returns the twin of `device_stage`."""

    def stage(values_smem, x_smem, words_smem, sums, slot, warpgroup):
        groups = [config.warpgroups * which + warpgroup for which in range(config.depth)]
        loaded = [
            (values_smem[slot, group // 2, :, :], x_smem[slot, pl.ds(2 * group, 2), :, :], words_smem[slot, group, :])
            for group in groups
        ]
        # Ordinary loads, which the next copy into the slot must not overtake.
        plgpu.commit_smem()
        for both, right, word in loaded:
            half = jnp.where(warpgroup % 2 == 0, both[:, :64], both[:, 64:])
            zeros = (word & 0xFFFF).astype(jnp.float32) - BIASED
            scales = lax.bitcast_convert_type(word & jnp.uint32(0xFFFF0000), jnp.float32)
            left = unpack_values(half).astype(jnp.float32) - zeros[:, None]
            right = right.astype(jnp.float32).transpose(0, 2, 1).reshape(GROUP, config.tile)
            product = jnp.dot(left, right, precision="highest") * scales[:, None]
            sums = sums + jnp.pad(product, ((0, 64 - config.rows), (0, 0))).reshape(-1)
        return sums

    return stage


def device_scratch(config: FewRowsInt4, *, load: bool):
    """Returns `access(scratch_smem, sums, part)` of float32 [3, 64 * tile].

    It stores sums at `part`; or, to `load`, it returns `sums` plus those that are there.
    """
    layout = layout_of(config)
    count = config.tile // 2
    result = {"return_type": plgpu.ShapeDtypeStruct((64 * config.tile,), jnp.float32, layout=layout)} if load else {}

    @plgpu.inline_mgpu(arg_types=(REF, layout, SCALAR), **result)
    def access(ctx, scratch_smem, sums, part):
        del ctx
        words_smem = SharedWords(scratch_smem).part(
            mosaic.scalar(part) * (128 * count) + (mosaic.thread_index() & 127) * 4
        )
        sums = unpack(sums)
        for i in range(0, count, 4):
            if load:
                others = words_smem.load_many(128 * i, 4)
                sums[i : i + 4] = [x + Float.of_bits(other) for x, other in zip(sums[i : i + 4], others, strict=True)]
            else:
                words = [x.bits() for x in sums[i : i + 4]]
                mosaic.ptx("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", words_smem.address(128 * i), *words)
        return pack(sums, layout) if load else None

    return access


def interpreted_scratch(config: FewRowsInt4, *, load: bool):
    """Returns the twin of `device_scratch`."""
    del config

    def access(scratch_smem, sums, part):
        if load:
            return sums + scratch_smem[part, :]
        scratch_smem[part, :] = sums
        return None

    return access


class Int4Stage(Stage):
    """The stage of `few_rows`."""

    kernel_name = "few_rows_int4"
    copies = 3

    @property
    def depth(self) -> int:
        return GROUP * self.problem.config.groups

    @property
    def weight_lines(self) -> int:
        return self.problem.config.groups // 2

    @property
    def x_lines(self) -> int:
        return 2 * self.problem.config.groups

    @property
    def shared(self) -> tuple[Any, ...]:
        """Scales and zeros, and the sums of all warpgroups but the first."""
        config = self.problem.config
        return (
            plgpu.SMEM((config.stages, config.groups, config.rows), jnp.uint32),
            plgpu.SMEM((config.warpgroups - 1, 64 * config.tile), jnp.float32),
        )

    @property
    def barriers(self) -> tuple[Any, ...]:
        """One where all warpgroups meet at an item's end."""
        return (plgpu.Barrier(num_arrivals=self.problem.config.warpgroups),)

    @staticmethod
    def flat_scales(scales: jax.Array) -> jax.Array:
        return scales.reshape(-1, scales.shape[-1])

    @staticmethod
    def whole_strips(values: jax.Array, scales: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
        missing = (0, -values.shape[1] % rows)
        return jnp.pad(values, ((0, 0), missing, (0, 0))), jnp.pad(scales, ((0, 0), (0, 0), missing))

    def load(self, refs: Refs, slot: Any, expert: Any, token: Any, row: Any, step: Any) -> None:
        problem, config, full_bar = self.problem, self.problem.config, refs.full_bar.at[slot]
        (values_gmem,), (words_gmem,) = refs.weights_gmem, refs.scales_gmem
        row_of_all = expert * problem.rows + row
        copy_lines(values_gmem, row_of_all, config.groups // 2 * step, refs.weight_smem.at[slot], full_bar)
        copy_lines(refs.x_gmem, token, 2 * config.groups * step, refs.x_smem.at[slot], full_bar)
        groups = pl.ds(expert * (problem.columns // GROUP) + step * config.groups, config.groups)
        words_gmem = words_gmem.at[groups, pl.ds(row, config.rows)]
        plgpu.copy_gmem_to_smem(words_gmem, refs.stage_smem[0].at[slot], full_bar)

    def add(self, refs: Refs, sums: Any, slot: Any, step: Any, row: Any, warpgroup: Any) -> Any:
        add = (interpreted_stage if self.problem.interpret else device_stage)(self.problem.config)
        return add(refs.weight_smem, refs.x_smem, refs.stage_smem[0], sums, slot, warpgroup)

    def store(self, refs: Refs, epilogue: Epilogue, sums: Any, token: Any, row: Any, warpgroup: Any) -> None:
        config, scratch_smem, (met_bar,) = self.problem.config, refs.stage_smem[1], refs.stage_bars
        access = interpreted_scratch if self.problem.interpret else device_scratch
        put, get = (access(config, load=load) for load in (False, True))

        def meet():
            """Waits until every warpgroup has stored its sums, or is done with the others'."""
            plgpu.barrier_arrive(met_bar)
            plgpu.barrier_wait(met_bar)

        pl.when(warpgroup > 0)(lambda: put(scratch_smem, sums, warpgroup - 1))
        meet()

        @pl.when(warpgroup == 0)
        def _():
            others = config.warpgroups - 1
            total = lax.fori_loop(0, others, lambda i, total: get(scratch_smem, total, i), sums)
            epilogue.store(refs.epilogue, total, token, row, warpgroup)

        meet()
