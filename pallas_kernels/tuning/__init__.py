"""Tile sizes of the products: one frozen config a kernel, and which one a shape gets.

The choice is a plain function of shapes, so a program compiles the same kernel on every machine and in every run. Each
config that a function here can return is listed in `CONFIGS`; a test lowers them all.
"""

from pallas_kernels.tuning.base import CONFIGS, SHARED_BYTES, SMS, distinct
from pallas_kernels.tuning.few import FewRows, FewRowsSwiGLU, few_rows, few_rows_swiglu
from pallas_kernels.tuning.four_bits import FewRowsInt4, few_rows_int4
from pallas_kernels.tuning.many import (
    MANY_ROWS,
    MANY_ROWS_INT8,
    MANY_ROWS_SHORT_TILES,
    ManyRowsMatmul,
    many_rows_matmul,
)

__all__ = [
    "CONFIGS",
    "MANY_ROWS",
    "MANY_ROWS_INT8",
    "MANY_ROWS_SHORT_TILES",
    "SHARED_BYTES",
    "SMS",
    "FewRows",
    "FewRowsInt4",
    "FewRowsSwiGLU",
    "ManyRowsMatmul",
    "distinct",
    "few_rows",
    "few_rows_int4",
    "few_rows_swiglu",
    "many_rows_matmul",
]
