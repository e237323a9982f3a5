"""INT8 in products of few rows: the matrix units add up all of K exactly, in int32.

The scales, one a token and one a weight row, come at an item's end.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import mosaic
from pallas_kernels.matmul.config import FewRows
from pallas_kernels.matmul.few_rows import Epilogue, Refs, Stage
from pallas_kernels.matmul.few_rows_tile import first_column, layout_of, pack, part_of, unpack, zeros
from pallas_kernels.matmul.weight_stream import copy_lines
from pallas_kernels.mosaic import REF, SCALAR, Float, Word
from pallas_kernels.mosaic.wgmma import SWIZZLED, descriptor, finish, first_row, start_product

BLOCK = 128
"""Values of K in a line of shared memory."""


def device_stage(config: FewRows):
    """Returns `stage(weight_smem, x_smem, sums, slot, warpgroup)`: its sums and the products of a stage, added up.

    The refs are int8 [stages, blocks, rows, 128] and [stages, blocks, tile, 128]; sums are int32, as `layout_of`.
    """
    layout = layout_of(config)

    @plgpu.inline_mgpu(
        arg_types=(SWIZZLED, SWIZZLED, layout, SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct((64 * config.warpgroup_tokens,), jnp.int32, layout=layout),
    )
    def stage(ctx, weight_smem, x_smem, sums, slot, warpgroup):
        del ctx
        slot, warpgroup = map(mosaic.scalar, (slot, warpgroup))
        first, first_token = part_of(config, warpgroup)
        row = slot * (config.blocks * config.rows) + first
        left = descriptor(mosaic.shared_address(weight_smem) + row * BLOCK)
        right = descriptor(mosaic.shared_address(x_smem) + (slot * (config.blocks * config.tile) + first_token) * BLOCK)
        numbers = [word.value for word in unpack(sums, Word)]
        for block in range(config.blocks):
            a = arith.addi(left, mosaic.i64(block * config.rows * BLOCK >> 4))
            b = arith.addi(right, mosaic.i64(block * config.tile * BLOCK >> 4))
            numbers = start_product(a, b, config.warpgroup_tokens, numbers, int8=True, add=True)
        return pack([Word(x) for x in finish(numbers, flying=0)], layout)

    return stage


def interpreted_stage(config: FewRows):
    """Returns the twin of `device_stage`."""
    own_rows = config.warpgroup_rows

    def stage(weight_smem, x_smem, sums, slot, warpgroup):
        first, first_token = part_of(config, warpgroup)
        left = [weight_smem[slot, i, pl.ds(first, own_rows), :].astype(jnp.int32) for i in range(config.blocks)]
        right = x_smem[slot, :, pl.ds(first_token, config.warpgroup_tokens), :].astype(jnp.int32)
        # Ordinary loads, which the next copy into the slot must not overtake.
        plgpu.commit_smem()
        sums = sums.reshape(64, config.warpgroup_tokens)
        for i in range(config.blocks):
            part = jnp.dot(left[i], right[i].T)
            sums = sums + jnp.pad(part, ((0, 64 - own_rows), (0, 0)))
        return sums.reshape(-1)

    return stage


def device_scale(config: FewRows, tokens: int, rows: int):
    """Returns `scaled(x_scales_gmem [tokens], scales_gmem [rows], sums, token, row, warpgroup)`, of a strip at `row`.

    It gives float32 sums. rows: of all experts; those past the end, and a strip's past its expert's end, get the scale
    of another.
    """
    layout = layout_of(config)

    @plgpu.inline_mgpu(
        arg_types=(REF, REF, layout, SCALAR, SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct((64 * config.warpgroup_tokens,), jnp.float32, layout=layout),
    )
    def scaled(ctx, x_scales_gmem, scales_gmem, sums, token, row, warpgroup):
        del ctx
        token, row, warpgroup = map(mosaic.scalar, (token, row, warpgroup))
        thread = mosaic.thread_index() & 127
        first, first_token = part_of(config, warpgroup)
        token, row = token + first_token + first_column(thread), row + first + first_row(thread)

        def scale(ref, index, count):
            at = mosaic.offset(mosaic.global_address(ref), index.min(count - 1), 4)
            return Float.of_bits(mosaic.load_read_only(at)[0])

        of_rows = [scale(scales_gmem, row + 8 * i, rows) for i in range(2)]
        of_tokens = [
            scale(x_scales_gmem, token + (8 * i + j), tokens)
            for i in range(config.warpgroup_tokens // 8)
            for j in range(2)
        ]
        numbers = [
            Float(arith.sitofp(ir.F32Type.get(), x.value)) * (of_tokens[2 * (i // 4) + i % 2] * of_rows[i // 2 % 2])
            for i, x in enumerate(unpack(sums, Word))
        ]
        return pack(numbers, layout)

    return scaled


def interpreted_scale(config: FewRows, tokens: int, rows: int):
    """Returns the twin of `device_scale`; whole tiles and strips only."""
    del tokens, rows
    own_rows = config.warpgroup_rows

    def scaled(x_scales_gmem, scales_gmem, sums, token, row, warpgroup):
        first, first_token = part_of(config, warpgroup)
        of_tokens = x_scales_gmem[pl.ds(token + first_token, config.warpgroup_tokens)]
        of_rows = scales_gmem[pl.ds(row + first, own_rows)]
        factors = jnp.pad(of_tokens[None] * of_rows[:, None], ((0, 64 - own_rows), (0, 0)))
        return sums.astype(jnp.float32) * factors.reshape(-1)

    return scaled


class Int8Stage(Stage):
    """The stage of `few_rows`."""

    kernel_name = "few_rows_int8"
    copies = 2

    @staticmethod
    def flat_scales(scales: jax.Array) -> jax.Array:
        return scales.reshape(-1)

    @staticmethod
    def whole_strips(values: jax.Array, scales: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
        missing = (0, -values.shape[1] % rows)
        return jnp.pad(values, ((0, 0), missing, (0, 0))), jnp.pad(scales, ((0, 0), missing))

    def load(self, refs: Refs, slot: Any, expert: Any, token: Any, row: Any, step: Any) -> None:
        block, full_bar = step * self.problem.config.blocks, refs.full_bar.at[slot]
        (weight_gmem,) = refs.weights_gmem
        copy_lines(weight_gmem, expert * self.problem.rows + row, block, refs.weight_smem.at[slot], full_bar)
        copy_lines(refs.x_gmem, token, block, refs.x_smem.at[slot], full_bar)

    def start(self) -> Any:
        return zeros(self.problem.config, jnp.int32)

    def add(self, refs: Refs, sums: Any, slot: Any, step: Any, row: Any, warpgroup: Any) -> Any:
        add = (interpreted_stage if self.problem.interpret else device_stage)(self.problem.config)
        return add(refs.weight_smem, refs.x_smem, sums, slot, warpgroup)

    def store(self, refs: Refs, epilogue: Epilogue, sums: Any, token: Any, row: Any, warpgroup: Any) -> None:
        problem, (scales_gmem,) = self.problem, refs.scales_gmem
        scaled = (interpreted_scale if problem.interpret else device_scale)(
            problem.config, problem.tokens, scales_gmem.shape[0]
        )
        first = refs.plan[0][lax.div(token, jnp.int32(problem.config.tile))] * problem.rows if refs.plan else 0
        sums = scaled(refs.x_scales_gmem, scales_gmem, sums, token, row + first, warpgroup)
        epilogue.store(refs.epilogue, sums, token, row, warpgroup)
