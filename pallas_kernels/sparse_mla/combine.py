"""The exact sum of attention over several splits of the keys, from their outputs and lse."""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

THREADS = 128


def _body(parts_gmem, lse_gmem, out_gmem, lse_out_gmem, *, heads_per_cta: int):
    _, splits, heads, width = parts_gmem.shape
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=width // THREADS)
    cta = lax.axis_index("cta")

    def one(i, _):
        row = cta * heads_per_cta + i
        token, head = lax.div(row, jnp.int32(heads)), lax.rem(row, jnp.int32(heads))
        # All loads of all splits are under way before the first is used.
        numbers = [lse_gmem[token, split, head] for split in range(splits)]
        values = [
            plgpu.load(parts_gmem.at[token, split, head], layout=layout, optimized=False) for split in range(splits)
        ]
        top = functools.reduce(jnp.maximum, numbers)
        shift = jnp.where(top == -jnp.inf, 0.0, top)  # -inf less -inf is NaN
        weights = [jnp.exp(number - shift) for number in numbers]
        total = functools.reduce(operator.add, weights)
        inverse = jnp.where(total > 0, 1.0 / total, 0.0)
        # The output of a split without keys was never written: it is left out_gmem, not multiplied by 0.
        everywhere = functools.partial(jnp.broadcast_to, shape=(width,))
        terms = [
            jnp.where(everywhere(number) > -jnp.inf, value.astype(jnp.float32) * everywhere(weight * inverse), 0.0)
            for number, weight, value in zip(numbers, weights, values, strict=True)
        ]
        out_gmem.at[token, head][...] = functools.reduce(operator.add, terms).astype(out_gmem.dtype)
        lse_out_gmem[token, head] = top + jnp.log(total)

    lax.fori_loop(0, heads_per_cta, one, None)


def combine(
    parts: jax.Array, lse: jax.Array, dtype: Any, *, heads_per_cta: int = 1, interpret: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the outputs of splits, weighted by their share of the whole sum.

    Args:
      parts: bf16 or float32 [T, S, H, D], D a multiple of 128; undefined where a split has no keys.
      lse: float32 [T, S, H], -inf where a split has no keys.
      dtype: of the result.
      heads_per_cta: must divide H; one is best for few tokens.
      interpret: parameters of Pallas' interpreter, or None.

    Returns:
      out [T, H, D] in `dtype` and lse float32 [T, H]; 0 and -inf where no split has keys.
    """
    tokens, _, heads, width = parts.shape
    return plgpu.kernel(
        functools.partial(_body, heads_per_cta=heads_per_cta),
        out_type=(
            jax.ShapeDtypeStruct((tokens, heads, width), dtype),
            jax.ShapeDtypeStruct((tokens, heads), jnp.float32),
        ),
        grid=(tokens * heads // heads_per_cta,),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=interpret,
        kernel_name="sparse_mla_combine",
    )(parts, lse)
