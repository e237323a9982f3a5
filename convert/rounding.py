"""Four-bit weights whose rounding knows what they are multiplied with.

Plain rounding takes each weight for itself. Here the columns of a weight are rounded one after the other, and what is
lost with one is made good by those that are still to come, as far as their inputs go together: GPTQ (Frantar et al.,
arXiv 2210.17323, algorithm 1). The range of each group of 128 is searched for, too: a narrower one than from its
smallest to its largest value often loses less.
"""

import jax
import jax.numpy as jnp
from jax import lax

from dsv32_jax.quant import QTensor
from pallas_kernels.quant_matmul import pack_int4
from pallas_kernels.quant_matmul.int4 import GROUP

DAMPING = 0.01
"""Of the mean of the moments' diagonal, added to it: directions that the calibration hardly saw count for little."""
SHARES = tuple(1 - 0.04 * step for step in range(13))
"""Of a group's whole range, which are tried."""


@jax.jit
def round_int4(weight: jax.Array, moments: jax.Array) -> QTensor:
    """A weight in four bits that changes its products the least.

    Args:
      weight: float [..., N, K], K a multiple of 128.
      moments: float32 [..., K, K], sums of x x^T over the inputs; all zero where there were none: plain rounding then,
        with the range that is best for the weight alone.

    Returns:
      A QTensor, "int4".
    """
    lead = weight.shape[:-2]
    flat = weight.astype(jnp.float32).reshape(-1, *weight.shape[-2:])
    values, scales, zeros = lax.map(lambda pair: _round(*pair), (flat, moments.reshape(-1, *moments.shape[-2:])))
    packed, words = pack_int4(values, scales, zeros)
    return QTensor(packed.reshape(*lead, *packed.shape[1:]), words.reshape(*lead, *words.shape[1:]), "int4")


def _round(weight: jax.Array, moments: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of one weight [N, K]: values uint8 [N, K], scales bfloat16 [N, K / 128], zeros uint8 [N, K / 128]."""
    rows, depth = weight.shape
    diagonal = jnp.diagonal(moments)
    mean = diagonal.mean()
    seen = jnp.where(mean > 0, moments / jnp.where(mean > 0, mean, 1), jnp.eye(depth))
    seen = seen + DAMPING * jnp.eye(depth)
    inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(seen), True), jnp.eye(depth))
    upper = jnp.linalg.cholesky((inverse + inverse.T) / 2).T
    importance = jnp.diagonal(seen)

    def one_group(group: jax.Array, state: tuple) -> tuple:
        weight, values, scales, zeros = state
        begin = group * GROUP
        block = lax.dynamic_slice(weight, (0, begin), (rows, GROUP))
        steps = lax.dynamic_slice(upper, (begin, 0), (GROUP, depth))
        within = lax.dynamic_slice(steps, (0, begin), (GROUP, GROUP))
        scale, zero = _range(block, lax.dynamic_slice(importance, (begin,), (GROUP,)))
        step = scale.astype(jnp.float32)

        def one_column(j: jax.Array, inner: tuple) -> tuple:
            block, lost, chosen = inner
            column = block[:, j]
            value = jnp.clip(jnp.round(column / step) + zero, 0, 15)
            error = (column - (value - zero) * step) / within[j, j]
            return block - error[:, None] * within[j], lost.at[:, j].set(error), chosen.at[:, j].set(value)

        empty = jnp.zeros((rows, GROUP))
        _, lost, chosen = lax.fori_loop(0, GROUP, one_column, (block, empty, empty))
        weight = weight - jnp.matmul(lost, steps, precision="highest")
        return (
            weight,
            lax.dynamic_update_slice(values, chosen.astype(jnp.uint8), (0, begin)),
            scales.at[:, group].set(scale),
            zeros.at[:, group].set(zero.astype(jnp.uint8)),
        )

    groups = depth // GROUP
    start = (
        weight,
        jnp.zeros((rows, depth), jnp.uint8),
        jnp.zeros((rows, groups), jnp.bfloat16),
        jnp.zeros((rows, groups), jnp.uint8),
    )
    return lax.fori_loop(0, groups, one_group, start)[1:]


def _range(block: jax.Array, importance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scales bfloat16 [N] and zeros float32 [N] of a group [N, 128] with the least weighted square error."""
    low, high = jnp.minimum(block.min(-1), 0), jnp.maximum(block.max(-1), 0)

    def of_share(share: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        scale = jnp.maximum(share * (high - low) / 15, 1e-8).astype(jnp.bfloat16)
        step = scale.astype(jnp.float32)
        zero = jnp.clip(jnp.round(-share * low / step), 0, 15)
        value = jnp.clip(jnp.round(block / step[:, None]) + zero[:, None], 0, 15)
        error = block - (value - zero[:, None]) * step[:, None]
        return (error**2 * importance).sum(-1), scale, zero

    errors, scales, zeros = lax.map(of_share, jnp.asarray(SHARES))
    best = jnp.argmin(errors, 0)[None]
    return jnp.take_along_axis(scales, best, 0)[0], jnp.take_along_axis(zeros, best, 0)[0]
