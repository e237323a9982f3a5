"""SwiGLU in a thread's registers, and what becomes of it: shared by the epilogues of both products.

The formula in plain `jax.numpy` is `reference.silu_product`. Here the exponential and the inverse are the hardware's
approximations, with relative errors of some 2^-22; bfloat16 then rounds by up to 2^-8. So a value may be the neighbour
of the reference's where that lies next to the middle between two, about once in some thousand values.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic
from pallas_kernels.mosaic import Float, Word
from pallas_kernels.quantize.reference import GROUP

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
