"""What Pallas has no word for: device code on a thread's own registers, inside `plgpu.inline_mgpu`.

Pallas' own arrays, copies and barriers carry the kernels. Where a kernel needs a thread's own registers (a gather, a
histogram, a warp vote), it has a small `inline_mgpu` function, written with what is here:

  words.py          words and predicates, and PTX on them
  mlir.py           operations whose types jaxlib tells wrongly
  floats.py         float32, and packed bfloat16 and e4m3
  control.py        loops and branches; what warps, CTAs and clusters do together
  memory.py         loads and stores by address
  wgmma.py          tensor-core products of FP8 and int8
  fp8.py            quantisation of values in a warp's registers
  interpreting.py   Pallas' interpreter

**Twins.** The interpreter runs a kernel on a CPU and detects races, but it cannot run `inline_mgpu`. What uses it
comes twice, by one convention: `device_x(...)` returns the function for a GPU, and `interpreted_x(...)`, right below
it and of the same arguments, returns its twin, of the same signature, in plain `jax.numpy` on refs. Several functions
with a common state are classes `DeviceX` and `InterpretedX` with the same methods. The kernel around them, its copies
and its barriers are the same for both: it takes `(interpreted_x if interpret else device_x)(...)`. A twin is narrow:
it reads and writes what the device code does, between the same barriers, so that a race of the kernel is one there
too.
"""

from pallas_kernels.mosaic.control import (
    barrier,
    branch,
    cluster_barrier,
    loop,
    repeat_while,
    shuffle,
    thread_index,
    warp_prefix_sum,
    warp_reduce,
    warp_sum,
    warp_votes,
    when,
)
from pallas_kernels.mosaic.floats import (
    Float,
    as_float,
    pack_bf16,
    pack_e4m3,
    ptx_float,
    unpack_bf16,
    unpack_e4m3,
    zero_after,
)
from pallas_kernels.mosaic.interpreting import interpret_on, interpreter
from pallas_kernels.mosaic.memory import (
    SharedWords,
    global_address,
    load_global,
    load_read_only,
    offset,
    parts_of,
    shared_address,
    store_global,
)
from pallas_kernels.mosaic.mlir import constant, f32, if_else
from pallas_kernels.mosaic.words import (
    INT32,
    REF,
    SCALAR,
    Word,
    as_word,
    i32,
    i64,
    integer,
    opaque_zero,
    ptx,
    ptx_word,
    ptx_words,
    scalar,
    splat,
    total,
    vector_operand,
)

__all__ = [
    "INT32",
    "REF",
    "SCALAR",
    "Float",
    "SharedWords",
    "Word",
    "as_float",
    "as_word",
    "barrier",
    "branch",
    "cluster_barrier",
    "constant",
    "f32",
    "global_address",
    "i32",
    "i64",
    "if_else",
    "integer",
    "interpret_on",
    "interpreter",
    "load_global",
    "load_read_only",
    "loop",
    "offset",
    "opaque_zero",
    "pack_bf16",
    "pack_e4m3",
    "parts_of",
    "ptx",
    "ptx_float",
    "ptx_word",
    "ptx_words",
    "repeat_while",
    "scalar",
    "shared_address",
    "shuffle",
    "splat",
    "store_global",
    "thread_index",
    "total",
    "unpack_bf16",
    "unpack_e4m3",
    "vector_operand",
    "warp_prefix_sum",
    "warp_reduce",
    "warp_sum",
    "warp_votes",
    "when",
    "zero_after",
]
