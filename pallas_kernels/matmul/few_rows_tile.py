"""A warpgroup's sums in products of few rows: how they lie in its registers, and how they are stored.

The sums of a warpgroup are [64 weight rows, its tokens of the tile]; a thread has, for each 8 tokens, 2 of them for 2
weight rows, which is how wgmma leaves them. A warpgroup whose own rows are fewer uses a part of that: the product reads
rows past them, whatever is there, and nobody looks at the result.
"""

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import mosaic
from pallas_kernels.matmul.config import FewRows, FewRowsInt4
from pallas_kernels.mosaic import REF, SCALAR, Float, Word
from pallas_kernels.mosaic.wgmma import first_row

Config = FewRows | FewRowsInt4


def layout_of(config: Config) -> Any:
    """Returns the layout of a warpgroup's sums: an array that gives each thread its own."""
    return plgpu.Layout.WG_STRIDED((64 * config.warpgroup_tokens,), vec_size=4)


def zeros(config: Config, dtype: Any = jnp.float32) -> Any:
    """Returns sums of nothing."""
    return plgpu.layout_cast(jnp.zeros((64 * config.warpgroup_tokens,), dtype), layout_of(config))


def part_of(config: Config, warpgroup: Any) -> tuple[Any, Any]:
    """Returns a warpgroup's first row of a strip, and its first token of a tile."""
    if config.token_parts == 1:
        return warpgroup * config.warpgroup_rows, 0
    return (
        warpgroup // config.token_parts * config.warpgroup_rows,
        warpgroup % config.token_parts * config.warpgroup_tokens,
    )


def unpack(array: Any, kind: Any = Float) -> list[Any]:
    """Returns a thread's numbers: `Float`s, or `Word`s of an int32 array."""
    return [kind(llvm.extractelement(x, mosaic.i32(i))) for x in array.registers.flat for i in range(4)]


def pack(numbers: list[Any], layout: Any) -> Any:
    """Returns the array of a thread's numbers: the inverse of `unpack`."""
    registers = []
    for i in range(0, len(numbers), 4):
        register = llvm.mlir_undef(ir.VectorType.get((4,), numbers[i].value.type))
        for j in range(4):
            register = llvm.insertelement(register, numbers[i + j].value, mosaic.i32(j))
        registers.append(register)
    return mgpu.FragmentedArray(
        _registers=np.array(registers, dtype=object),
        _layout=layout.to_mgpu(),
        _is_signed=True if isinstance(numbers[0], Word) else None,
    )


def first_column(thread: Word) -> Word:
    """Returns, of each 8 tokens, the first of the thread's two."""
    return (thread & 3) << 1


def store_number(address: ir.Value, x: Float, predicate: Word, dtype: Any) -> None:
    """Stores a float32 or bfloat16 in device memory."""
    text = "{ .reg .pred p; setp.ne.b32 p, $2, 0; "
    if dtype == jnp.float32:
        text += "@p st.global.f32 [$0], $1; }"
    else:
        text += ".reg .b16 h; cvt.rn.bf16.f32 h, $1; @p st.global.b16 [$0], h; }"
    mosaic.ptx(text, address, x.value, predicate.to_word())


def device_store(config: Config, tokens: int, rows: int, dtype: Any):
    """Returns `store(out_gmem [tokens, rows], sums, token, row, warpgroup)`, of a strip and a tile that start there.

    It stores in `dtype`, and nothing of a strip's rows past the end.
    """
    layout = layout_of(config)
    size = jnp.dtype(dtype).itemsize

    @plgpu.inline_mgpu(arg_types=(REF, layout, SCALAR, SCALAR, SCALAR))
    def store(ctx, out_gmem, sums, token, row, warpgroup):
        del ctx
        token, row, warpgroup = map(mosaic.scalar, (token, row, warpgroup))
        thread = mosaic.thread_index() & 127
        row_of_thread = first_row(thread)
        first, first_token = part_of(config, warpgroup)
        row = row + first + row_of_thread
        token = token + first_token + first_column(thread)
        address = mosaic.offset(mosaic.global_address(out_gmem), token, rows * size)
        address = mosaic.offset(address, row, size)
        exists = [(row_of_thread + below < config.warpgroup_rows) & (row + below < rows) for below in (0, 8)]
        for i, x in enumerate(unpack(sums)):
            column, below = 8 * (i // 4) + i % 2, i // 2 % 2
            at = arith.addi(address, mosaic.i64((column * rows + 8 * below) * size))
            store_number(at, x, (token + column < tokens) & exists[below], dtype)

    return store


def interpreted_store(config: Config, tokens: int, rows: int, dtype: Any):
    """Returns the twin of `device_store`; whole tiles and strips only."""
    rows, tokens = config.warpgroup_rows, config.warpgroup_tokens

    def store(out_gmem, sums, token, row, warpgroup):
        first, first_token = part_of(config, warpgroup)
        part = sums.reshape(64, tokens)[:rows].T.astype(dtype)
        out_gmem[pl.ds(token + first_token, tokens), pl.ds(row + first, rows)] = part

    return store
