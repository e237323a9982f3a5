"""The end of an int8 product of many rows: sums of whole numbers, times the scales of their rows and columns."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quant_matmul.accumulate import COLUMNS, MATRIX

ROW = MATRIX.reduce(1)
"""The layout of an array with a value for each row of a matrix in registers."""
COLUMN = MATRIX.reduce(0)
"""The same for each column."""


def whole_columns(scales: jax.Array) -> jax.Array:
    """Columns' scales [..., N], padded to whole tiles, whose columns past the end nobody stores."""
    return jnp.pad(scales, (*[(0, 0)] * (scales.ndim - 1), (0, -scales.shape[-1] % COLUMNS)))


def load(scales: Any, layout: Any, interpret: bool) -> Any:
    """float32 scales from device memory, in `ROW` or `COLUMN`."""
    return scales[...] if interpret else plgpu.load(scales, layout=layout, optimized=False)


def scaled(sums: Any, row_scales: Any, column_scales: Any) -> Any:
    """int32 [64, 128] -> float32: as the reference, times the product of both scales."""
    rows = lax.broadcast_in_dim(row_scales, sums.shape, [0])
    columns = lax.broadcast_in_dim(column_scales, sums.shape, [1])
    return sums.astype(jnp.float32) * (rows * columns)
