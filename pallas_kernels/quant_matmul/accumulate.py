"""One step of K of an FP8 product with scales: a warpgroup's fresh product, scaled and added to sums in registers."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels import mosaic
from pallas_kernels.mosaic import REF, SCALAR, Float, SharedWords
from pallas_kernels.mosaic.wgmma import DIM, SWIZZLED, descriptor, finish, first_row, floats, numbers_of, start_product

BLOCK = 128
"""Values of K that share a row's scale; rows and columns of a block of the weight that share one."""
PART = 64
"""Rows of a product."""
COLUMNS = 256
"""Of a tile."""
MATRIX = plgpu.Layout.WGMMA


def matrix_of(numbers: list[ir.Value], like: Any) -> Any:
    """The inverse of `numbers_of`, in the layout of `like`."""
    registers, at = np.empty(like.registers.shape, dtype=object), 0
    for index, register in np.ndenumerate(like.registers):
        size = ir.VectorType(register.type).shape[0]
        registers[index] = vector.from_elements(register.type, numbers[at : at + size])
        at += size
    return mgpu.FragmentedArray(_registers=registers, _layout=like.layout, _is_signed=None)


def accumulate_function(rows: int):
    """`accumulate(left, right, row_scales, sums, weight_scale, slot, warpgroup) -> sums`, a function of a warpgroup.

    Arguments:
      left, right: e4m3 [stages, rows, 128] and [stages, 256, 128] in shared memory.
      row_scales: float32 [stages, rows] there.
      sums: float32 [64, 128] in registers for each 64 rows.
      weight_scale: float32, of the warpgroup's 128 columns.
      slot: which stage.
      warpgroup: 0 or 1.
    """
    parts = rows // PART
    result = plgpu.ShapeDtypeStruct((PART, BLOCK), jnp.float32, layout=MATRIX)

    @plgpu.inline_mgpu(
        arg_types=(SWIZZLED, SWIZZLED, REF, (MATRIX,) * parts, SCALAR, SCALAR, SCALAR),
        return_type=(result,) * parts,
    )
    def accumulate(ctx, left, right, row_scales, sums, weight_scale, slot, warpgroup):
        del ctx
        weight_scale = Float(weight_scale.registers.item())
        slot, warpgroup = mosaic.scalar(slot), mosaic.scalar(warpgroup)
        a = descriptor(mosaic.shared_address(left) + slot * (rows * DIM))
        b = descriptor(mosaic.shared_address(right) + slot * (COLUMNS * DIM) + warpgroup * (BLOCK * DIM))
        thread = mosaic.thread_index() & 127
        own = first_row(thread)  # and the row 8 further on
        scales_at = SharedWords(row_scales).part(slot * rows + own)
        product: list[ir.Value] | None = None
        added = []
        for part in range(parts):
            product = start_product(arith.addi(a, mosaic.i64(part * PART * DIM >> 4)), b, BLOCK, into=product)
            at = [scales_at.address(part * PART + i) for i in (0, 8)]
            scales = [Float(floats("ld.shared.f32 $0, [$1];", 1, x)[0]) * weight_scale for x in at]
            product = finish(product, flying=0)
            total = [
                Float(x).times_plus(scales[(i >> 1) & 1], Float(before)).value
                for i, (x, before) in enumerate(zip(product, numbers_of(sums[part]), strict=True))
            ]
            added.append(matrix_of(total, sums[part]))
        return tuple(added)

    return accumulate


def accumulate_twin(rows: int):
    """`accumulate_function` for the interpreter."""

    def accumulate(left, right, row_scales, sums, weight_scale, slot, warpgroup):
        a = left[slot].astype(jnp.float32)
        b = right[slot, pl.ds(warpgroup * BLOCK, BLOCK), :].astype(jnp.float32)
        scales = row_scales[slot] * weight_scale
        # Ordinary loads, which the next copy into the slot must not overtake.
        plgpu.commit_smem()
        product = jnp.dot(a, b.T, precision="highest") * scales[:, None]
        return tuple(x + product[i * PART : (i + 1) * PART] for i, x in enumerate(sums))

    return accumulate


def start(rows: int, interpret: bool) -> tuple[jax.Array, ...]:
    """The sums before the first step."""
    empty = jnp.zeros((PART, BLOCK), jnp.float32)
    return tuple(empty if interpret else plgpu.layout_cast(empty, MATRIX) for _ in range(rows // PART))
