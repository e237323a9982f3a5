"""FP8 in products of few rows: scaled products of 128 of K each, added up in registers.

Each 128 of K give a fresh product of the matrix units, which a warpgroup multiplies by both scales and adds to its
float32 sums while the next product runs. A strip may need the scales of two groups of 128 weight rows.
"""

import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir.dialects import arith

from pallas_kernels import mosaic
from pallas_kernels.matmul.config import FewRows
from pallas_kernels.matmul.few_rows import Epilogue, Refs, Stage
from pallas_kernels.matmul.few_rows_tile import first_column, layout_of, pack, part_of, unpack
from pallas_kernels.matmul.weight_stream import copy_lines
from pallas_kernels.mosaic import REF, SCALAR, Float, SharedWords
from pallas_kernels.mosaic.wgmma import SWIZZLED, descriptor, finish, first_row, start_product

BLOCK = 128
"""Values of K, and rows of the weight, that share a scale."""
GROUP = 4
"""Scales along K that are copied together: 16 bytes, the least that TMA takes."""


def straddles(rows: int) -> bool:
    """Returns whether a strip of so many rows may begin or end within the rows of a scale."""
    return BLOCK % rows != 0 and rows % BLOCK != 0


def scale_rows(rows: int) -> int:
    """Returns how many rows of scales a strip of so many rows may need."""
    return (BLOCK - math.gcd(rows, BLOCK) + rows - 1) // BLOCK + 1


def device_tile(config: FewRows, matrices: int = 1):
    """Returns a function of a warpgroup: its sums and the products of one stage, added up.

    matrices: weights that share a strip, 1 or 2.

    Its arguments:
      weights_smem, x_smem: e4m3 [stages, blocks, rows, 128] and [stages, blocks, tile, 128] in shared memory.
      x_scales_smem, scales_smem: float32 [stages, tile, 4] and [stages, 8 * matrices, 4]. A row of the latter is for
        128 weight rows, the first of them for those that the strip's first row is one of; those of the second matrix
        begin at the eighth.
      sums: as `layout_of`.
      slot: the stage; place: of its first block in the groups of 4 scales; row: the strip's first of the weight;
      warpgroup: its number.
    """
    layout = layout_of(config)

    @plgpu.inline_mgpu(
        arg_types=(SWIZZLED, SWIZZLED, REF, REF, layout, SCALAR, SCALAR, SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct((64 * config.warpgroup_tokens,), jnp.float32, layout=layout),
    )
    def tile(ctx, weights_smem, x_smem, x_scales_smem, scales_smem, sums, slot, place, row, warpgroup):
        del ctx
        sums = unpack(sums)
        slot, place, row, warpgroup = map(mosaic.scalar, (slot, place, row, warpgroup))
        first, first_token = part_of(config, warpgroup)
        left = descriptor(mosaic.shared_address(weights_smem) + (slot * (config.blocks * config.rows) + first) * BLOCK)
        # Whole eights of tokens further, which the swizzle does not notice.
        right = descriptor(mosaic.shared_address(x_smem) + (slot * (config.blocks * config.tile) + first_token) * BLOCK)
        column = slot * config.tile + first_token + first_column(mosaic.thread_index())
        thread_x_scales = SharedWords(x_scales_smem).part((column << 2) + place)
        if matrices == 2:
            # A warp has 16 of the strip's rows, if any; and no more of a matrix than 128 are in a strip.
            which = [((mosaic.thread_index() >> 5) // (config.rows // 32)).min(1) << 3]
        elif not straddles(config.rows):
            which = [first // BLOCK]
        else:
            # Of a warp's 16 rows, the first eight have one scale, and the others may have the next.
            first_of_thread = (row & (BLOCK - 1)) + first + first_row(mosaic.thread_index() & 127)
            together = config.rows % 16 == 0 and config.warpgroup_rows % 16 == 0
            which = [(first_of_thread + below) // BLOCK for below in ((0,) if together else (0, 8))]
        thread_scales = [SharedWords(scales_smem).part((slot * (8 * matrices) + i) * GROUP + place) for i in which]

        def start(block):
            a = arith.addi(left, mosaic.i64(block * config.rows * BLOCK >> 4))
            b = arith.addi(right, mosaic.i64(block * config.tile * BLOCK >> 4))
            return start_product(a, b, config.warpgroup_tokens)

        flying = start(0)
        for block in range(config.blocks):
            product, more = flying, block + 1 < config.blocks
            if more:
                flying = start(block + 1)
            of_rows = [Float.of_bits(scale.load(block)) for scale in thread_scales]
            of_tokens = [
                Float.of_bits(thread_x_scales.load(GROUP * (8 * i + j) + block))
                for i in range(config.warpgroup_tokens // 8)
                for j in range(2)
            ]
            if len(of_rows) == 1:
                of_tokens, of_rows = [x * of_rows[0] for x in of_tokens], []
            product = finish(product, flying=1 if more else 0)
            # A thread's numbers, for each 8 tokens: two tokens of one weight row, then of the row 8 below.
            for i, x in enumerate(product):
                factor = of_tokens[2 * (i // 4) + i % 2]
                sums[i] = Float(x).times_plus(factor * of_rows[i // 2 % 2] if of_rows else factor, sums[i])
        return pack(sums, layout)

    return tile


def interpreted_tile(config: FewRows, matrices: int = 1):
    """Returns the twin of `device_tile`."""
    rows = config.warpgroup_rows

    def tile(weights_smem, x_smem, x_scales_smem, scales_smem, sums, slot, place, row, warpgroup):
        sums = sums.reshape(64, config.warpgroup_tokens)
        first, first_token = part_of(config, warpgroup)
        tokens = pl.ds(first_token, config.warpgroup_tokens)
        left = [weights_smem[slot, i, pl.ds(first, rows), :].astype(jnp.float32) for i in range(config.blocks)]
        right, token_scales = x_smem[slot, :, tokens, :].astype(jnp.float32), x_scales_smem[slot, tokens, :]
        of_strip = first + jnp.arange(rows)
        if matrices == 1:
            which, choices = (of_strip + row % BLOCK) // BLOCK, list(range(scale_rows(config.rows)))
        else:
            which, choices = jnp.where(of_strip >= config.rows // 2, 8, 0), [0, 8]
        by_row = sum(jnp.where(which[:, None] == i, scales_smem[slot, pl.ds(i, 1), :], 0) for i in choices)
        # Ordinary loads, which the next copy into the slot must not overtake.
        plgpu.commit_smem()
        for i in range(config.blocks):
            part = jnp.dot(left[i], right[i].T, precision="highest")
            is_block = jnp.arange(GROUP) == place + i
            column = jnp.where(is_block, by_row, 0).sum(axis=1)[:, None] * jnp.where(is_block, token_scales, 0).sum(
                axis=1
            )
            sums = sums + jnp.pad(part * column, ((0, 64 - rows), (0, 0)))
        return sums.reshape(-1)

    return tile


class Fp8Stage(Stage):
    """The stage of `few_rows`."""

    kernel_name = "few_rows"

    @property
    def copies(self) -> int:
        """Rows and their scales; of each weight scales and, if there are two, lines one by one."""
        weights = self.problem.weights
        return 2 + weights + (1 if weights == 1 else self.problem.config.blocks * weights)

    @property
    def shared(self) -> tuple[Any, ...]:
        """Scales of the rows and of the weights."""
        config = self.problem.config
        return (
            plgpu.SMEM((config.stages, config.tile, GROUP), jnp.float32),
            plgpu.SMEM((config.stages, 8 * self.problem.weights, GROUP), jnp.float32),
        )

    @staticmethod
    def flat_scales(scales: jax.Array) -> jax.Array:
        return scales.reshape(-1, scales.shape[-1])

    @staticmethod
    def whole_strips(values: jax.Array, scales: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
        missing = -values.shape[1] % rows
        values = jnp.pad(values, ((0, 0), (0, missing), (0, 0)))
        return values, jnp.pad(scales, ((0, 0), (0, scale_rows(rows)), (0, 0)))

    def load(self, refs: Refs, slot: Any, expert: Any, token: Any, row: Any, step: Any) -> None:
        problem, config, full_bar = self.problem, self.problem.config, refs.full_bar.at[slot]
        row, block = problem.row_of_each(row), step * config.blocks
        for which, weight_gmem in enumerate(refs.weights_gmem):
            for first, part_smem in self.parts(refs.weight_smem.at[slot], which):
                copy_lines(weight_gmem, expert * problem.rows + row, block + first, part_smem, full_bar)
        copy_lines(refs.x_gmem, token, block, refs.x_smem.at[slot], full_bar)
        x_scales_smem, scales_smem = refs.stage_smem
        group = pl.ds(lax.div(block, jnp.int32(GROUP)) * GROUP, GROUP)
        x_scales_gmem = refs.x_scales_gmem.at[pl.ds(token, config.tile), group]
        plgpu.copy_gmem_to_smem(x_scales_gmem, x_scales_smem.at[slot], full_bar)
        count = scale_rows(problem.share)
        of_expert = refs.scales_gmem[0].shape[0] * problem.rows // refs.weights_gmem[0].shape[0]
        scale_row = pl.ds(expert * of_expert + lax.div(row, jnp.int32(BLOCK)), count)
        for which, scales_gmem in enumerate(refs.scales_gmem):
            part_smem = scales_smem.at[slot, pl.ds(8 * which, count)]  # copies start at multiples of 128 bytes
            plgpu.copy_gmem_to_smem(scales_gmem.at[scale_row, group], part_smem, full_bar)

    def parts(self, strip_smem: Any, which: int) -> list[tuple[int, Any]]:
        """Returns the first line and the place in a strip of each copy of one weight."""
        if self.problem.weights == 1:
            return [(0, strip_smem)]
        rows = pl.ds(which * self.problem.share, self.problem.share)
        return [(i, strip_smem.at[pl.ds(i, 1), rows]) for i in range(self.problem.config.blocks)]

    def add(self, refs: Refs, sums: Any, slot: Any, step: Any, row: Any, warpgroup: Any) -> Any:
        tile = (interpreted_tile if self.problem.interpret else device_tile)(self.problem.config, self.problem.weights)
        place = lax.rem(step * self.problem.config.blocks, jnp.int32(GROUP))
        return tile(refs.weight_smem, refs.x_smem, *refs.stage_smem, sums, slot, place, row, warpgroup)

    def store(self, refs: Refs, epilogue: Epilogue, sums: Any, token: Any, row: Any, warpgroup: Any) -> None:
        epilogue.store(refs.epilogue, sums, token, self.problem.row_of_each(row), warpgroup)
