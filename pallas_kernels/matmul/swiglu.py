"""SwiGLU in a thread's registers, and what becomes of it: shared by the epilogues of both products.

The formula in plain `jax.numpy` is `reference.silu_product`. Here the exponential and the inverse are the hardware's
approximations, with relative errors of some 2^-22; bfloat16 then rounds by up to 2^-8. So a value may be the neighbour
of the reference's where that lies next to the middle between two, about once in some thousand values.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic
from pallas_kernels.mosaic import Float, Word
from pallas_kernels.quantize.reference import GROUP
from pallas_kernels.quantize.reference import quantize as quantize_reference

LOG2_E = 1.4426950408889634


@dataclasses.dataclass(frozen=True)
class Result:
    """What is made of the product of the gate and up.

    Attributes:
      quantized: e4m3 values and scales; else bfloat16.
      scale_fmt: see `quantize`.
      scales_by_group: scales as [groups, rows], else as [rows, groups].
    """

    quantized: bool
    scale_fmt: str | None
    scales_by_group: bool

    def outputs(self, rows: int, width: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns the shapes of values, and of scales if quantised."""
        if not self.quantized:
            return (jax.ShapeDtypeStruct((rows, width), jnp.bfloat16),)
        shape = (rows, width // GROUP)
        return (
            jax.ShapeDtypeStruct((rows, width), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct(shape[::-1] if self.scales_by_group else shape, jnp.float32),
        )


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What the epilogues of both kernels share. `problem`: of the kernel; `result`: what becomes of the product.

    Warpgroups exchange their sums in shared memory. The last of the scratch is the barrier of those that have read it.
    """

    problem: Any
    result: Result

    @property
    def outputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return self.result.outputs(*self.problem.result_shape)

    def begin(self, refs: tuple[Any, ...]) -> None:
        """Marks the shared memory as free."""
        plgpu.barrier_arrive(refs[-1])

    def end(self, refs: tuple[Any, ...]) -> None:
        """Waits for the last phase, before the barrier's memory goes."""
        plgpu.barrier_wait(refs[-1])


def store_reference(result: Result, outputs: Sequence[Any], values: Any, rows: Any, columns: Any, group: Any) -> None:
    """Stores a part of the result in the interpreter, whose columns are a group of the quantisation if there is one."""
    if result.quantized:
        values, scales = quantize_reference(values, result.scale_fmt, GROUP)
        outputs[1][(group, rows) if result.scales_by_group else (rows, group)] = scales[:, 0]
    outputs[0][rows, columns] = values


def silu(x: Float) -> Float:
    """Returns x / (1 + e^-x)."""
    power = mosaic.ptx_float("ex2.approx.ftz.f32 $0, $1;", x * -LOG2_E)
    return x * mosaic.ptx_float("rcp.approx.ftz.f32 $0, $1;", power + 1.0)


def silu_product(gate: Sequence[Word], up: Sequence[Word]) -> list[Word]:
    """Returns silu(gate) * up of packed bfloat16 values, in float32 in between."""
    pairs = zip(mosaic.unpack_bf16(gate), mosaic.unpack_bf16(up), strict=True)
    return mosaic.pack_bf16([silu(g) * u for g, u in pairs])


def transpose_in_quad(words: Sequence[Word], lane: Word) -> list[Word]:
    """Returns, of four words in each of four neighbouring lanes, the i-th words by lane in lane i."""
    odd, high = (lane & 1).differs(0), (lane & 2).differs(0)
    pairs = []
    for even_word, odd_word in (words[:2], words[2:]):
        received = mosaic.shuffle("bfly", odd.where(even_word, odd_word), 1)
        pairs.append((odd.where(received, even_word), odd.where(odd_word, received)))
    low_pair, high_pair = pairs
    others = [mosaic.shuffle("bfly", high.where(x, y), 2) for x, y in zip(low_pair, high_pair, strict=True)]
    first = [high.where(x, y) for x, y in zip(others, low_pair, strict=True)]
    second = [high.where(x, y) for x, y in zip(high_pair, others, strict=True)]
    return [*first, *second]


def low_halves(x: Word, y: Word) -> Word:
    """Returns both words' lower 16 bits, x's first."""
    return mosaic.ptx_word("prmt.b32 $0, $1, $2, 0x5410;", x, y)


def high_halves(x: Word, y: Word) -> Word:
    """Returns both words' upper 16 bits, x's first."""
    return mosaic.ptx_word("prmt.b32 $0, $1, $2, 0x7632;", x, y)
