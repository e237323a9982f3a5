"""Tensor-core products of FP8, or int8, by hand: operands in shared memory, the result in a thread's registers.

`plgpu.wgmma` keeps its accumulator to itself. These give a warpgroup a fresh product of 128 values of K each time,
which it adds up as it likes while another warpgroup's product runs.
"""

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils as mgu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import mosaic
from pallas_kernels.mosaic import Word

DIM = 128
"""Bytes of a row of an operand."""
SWIZZLE: Any = (plgpu.SwizzleTransform(128),)  # type: ignore[abstract]
"""As rows have 128 bytes, this alone is the layout of wgmma's operands."""
SWIZZLED = plgpu.RefType(SWIZZLE)


def floats(text: str, results: int, *arguments: Word | ir.Value) -> list[ir.Value]:
    """PTX with float32 results, `$0` to `$(results - 1)`."""
    values = mgu.inline_ptx(
        text,
        *[x.value if isinstance(x, Word) else x for x in arguments],
        result_types=(ir.F32Type.get(),) * results,
        has_side_effects=True,
        convergent=True,
    )
    return list(values) if isinstance(values, list | tuple) else [values]


def descriptor(address: Word) -> ir.Value:
    """wgmma's operand of rows of 128 bytes, 128-byte swizzle, 1024 bytes between groups of 8 rows."""
    return arith.ori((address >> 4).wide(), mosaic.i64((1 << 62) | (64 << 32) | (1 << 16)))


def start_product(
    left: ir.Value,
    right: ir.Value,
    columns: int,
    into: list[ir.Value] | None = None,
    *,
    int8: bool = False,
    add: bool = False,
) -> list[ir.Value]:
    """Starts D[64, columns] = left[64, 128] right[columns, 128]^T; a thread's part of it is there after `finish`.

    Args:
      left: descriptor of e4m3 in shared memory, or of int8.
      right: the same.
      columns: of the product, a multiple of 8 up to 256.
      into: an older product, done with, whose registers to use. Products of a loop's body that each have their own are
        laid out so badly that sums beside them are spilled.
      int8: whole numbers, with int32 results (`into` is needed); else e4m3 and float32.
      add: to what is in the registers `into`, which an older product may still be adding to.
    """
    count = columns // 2
    operand = count if into is None else 2 * count
    kinds, signs = ("s32.s8.s8", "") if int8 else ("f32.e4m3.e4m3", ", 1, 1")
    names = "{" + ", ".join(f"${i}" for i in range(count)) + "}"
    text = (
        "{ .reg .b64 a, b; .reg .pred first, later; setp.ne.b32 first, 0, 0; setp.ne.b32 later, 1, 0;\n"
        "wgmma.fence.sync.aligned;\n"
    )
    for k in range(DIM // 32):
        text += (
            f"add.s64 a, ${operand}, {2 * k}; add.s64 b, ${operand + 1}, {2 * k};\n"
            f"wgmma.mma_async.sync.aligned.m64n{columns}k32.{kinds} {names}, a, b, "
            f"{'later' if k or add else 'first'}{signs};\n"
        )
    text += "wgmma.commit_group.sync.aligned; }"
    if into is None:
        return floats(text, count, left, right)
    return in_place(text, into, left, right)


def numbers_of(matrix: Any) -> list[ir.Value]:
    """Returns a thread's float32 values of an array, in the order of wgmma's results."""
    numbers = []
    for register in matrix.registers.flat:
        if isinstance(register.type, ir.VectorType):
            size = ir.VectorType(register.type).shape[0]
            numbers += [llvm.extractelement(register, mosaic.i32(i)) for i in range(size)]
        else:
            numbers.append(register)
    return numbers


def first_row(thread: Word) -> Word:
    """Of a product, the first of the two rows that a thread of the warpgroup has; the other is 8 further on."""
    return (thread >> 5) * 16 + ((thread & 31) >> 2)


def in_place(text: str, registers: list[ir.Value], *arguments: ir.Value) -> list[ir.Value]:
    """PTX whose results `$0`... are in the registers of some floats, or words; 64-bit arguments follow them."""
    count, kind = len(registers), registers[0].type
    letter = "f" if isinstance(kind, ir.F32Type) else "r"
    constraints = ",".join([f"={letter}"] * count + [str(i) for i in range(count)] + ["l"] * len(arguments))
    results = llvm.StructType.get_literal([kind] * count)
    struct = llvm.inline_asm(results, [*registers, *arguments], text, constraints, has_side_effects=True)
    return [llvm.extractvalue(kind, struct, [i]) for i in range(count)]


def finish(product: list[ir.Value], flying: int) -> list[ir.Value]:
    """Waits until no more than `flying` younger products are under way."""
    mosaic.ptx(f"wgmma.wait_group.sync.aligned {flying};")
    # The registers become new values here, so that no use of them moves before the wait.
    return in_place("", product)
