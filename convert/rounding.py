"""Weights whose rounding knows what they are multiplied with.

Plain rounding takes each weight for itself. Here, in four bits, the columns of a weight are rounded one after the
other, and what is lost with one is made good by those that are still to come, as far as their inputs go together: GPTQ
(Frantar et al., arXiv 2210.17323, algorithm 1). The range of each group of 128 is searched for, too: a narrower one
than from its smallest to its largest value often loses less. In eight bits only the range of each row is searched for.
"""

import jax
import jax.numpy as jnp
from jax import lax

from dsv32_jax.quant import QTensor, quantize_weight
from pallas_kernels.quant_matmul import pack_int4
from pallas_kernels.quant_matmul.int4 import GROUP
from pallas_kernels.quantize.reference import INT8_MAX, divide

DAMPING = 0.01
"""Of the mean of the moments' diagonal, added to it: directions that the calibration hardly saw count for little."""
SHARES = tuple(1 - 0.04 * step for step in range(13))
"""Of a group's whole range, which are tried."""
INT8_SHARES = tuple(1 - 0.02 * step for step in range(26))
"""Of a row's largest magnitude. With 127 steps to it, little is gained by a much narrower range, so these are finer."""


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
    """Of one weight [N, K]: values uint8 [N, K], scales bfloat16 [N, K / 128], zeros uint8 [N, K / 128].

    Columns are taken by falling mean square of their inputs, whichever group they are of: what comes first has most
    others left to make its error good.
    """
    rows, depth = weight.shape
    diagonal = jnp.diagonal(moments)
    mean = diagonal.mean()
    seen = jnp.where(mean > 0, moments / jnp.where(mean > 0, mean, 1), jnp.eye(depth)) + DAMPING * jnp.eye(depth)
    importance = jnp.diagonal(seen)
    groups = jnp.arange(depth) // GROUP
    scales, zeros = lax.map(
        lambda group: _range(
            lax.dynamic_slice(weight, (0, group * GROUP), (rows, GROUP)),
            lax.dynamic_slice(importance, (group * GROUP,), (GROUP,)),
        ),
        jnp.arange(depth // GROUP),
    )  # [K / 128, N]
    order = jnp.argsort(-importance, stable=True)
    seen, weight, group_of = seen[order][:, order], weight[:, order], groups[order]
    inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(seen), True), jnp.eye(depth))
    upper = jnp.linalg.cholesky((inverse + inverse.T) / 2).T

    def one_block(number: jax.Array, state: tuple) -> tuple:
        weight, values = state
        begin = number * GROUP
        block = lax.dynamic_slice(weight, (0, begin), (rows, GROUP))
        steps = lax.dynamic_slice(upper, (begin, 0), (GROUP, depth))
        within = lax.dynamic_slice(steps, (0, begin), (GROUP, GROUP))
        of_groups = lax.dynamic_slice(group_of, (begin,), (GROUP,))

        def one_column(j: jax.Array, inner: tuple) -> tuple:
            block, lost, chosen = inner
            step, zero = scales[of_groups[j]].astype(jnp.float32), zeros[of_groups[j]]
            value = jnp.clip(jnp.round(block[:, j] / step) + zero, 0, 15)
            error = (block[:, j] - (value - zero) * step) / within[j, j]
            return block - error[:, None] * within[j], lost.at[:, j].set(error), chosen.at[:, j].set(value)

        empty = jnp.zeros((rows, GROUP))
        _, lost, chosen = lax.fori_loop(0, GROUP, one_column, (block, empty, empty))
        weight = weight - jnp.matmul(lost, steps, precision="highest")
        return weight, lax.dynamic_update_slice(values, chosen.astype(jnp.uint8), (0, begin))

    start = weight, jnp.zeros((rows, depth), jnp.uint8)
    _, values = lax.fori_loop(0, depth // GROUP, one_block, start)
    return values[:, jnp.argsort(order)], scales.T, zeros.T.astype(jnp.uint8)


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


@jax.jit
def round_int8(weight: jax.Array, moments: jax.Array) -> QTensor:
    """A weight in eight bits, each row with the range that loses the least; never more than by its largest value.

    An error counts as much as its column's input has mean square, to which `DAMPING` of the mean of all is added.

    Args:
      weight: float [..., N, K].
      moments: float32 [..., K, K], sums of x x^T over the inputs; all zero where there were none: columns count alike.

    Returns:
      A QTensor, "int8".
    """
    lead = weight.shape[:-2]
    flat = weight.astype(jnp.float32).reshape(-1, *weight.shape[-2:])
    diagonals = jnp.diagonal(moments, axis1=-2, axis2=-1).reshape(-1, weight.shape[-1])
    values, scales = lax.map(lambda pair: _round_rows(*pair), (flat, diagonals))
    return QTensor(values.reshape(weight.shape), scales.reshape(*lead, -1), "int8")


def _round_rows(weight: jax.Array, diagonal: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of one weight [N, K]: values int8 [N, K] and scales float32 [N]."""
    mean = diagonal.mean()
    importance = jnp.where(mean > 0, diagonal / jnp.where(mean > 0, mean, 1), 1) + DAMPING
    widest = quantize_weight(weight, "int8").scales

    def rounded(scales: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(divide(weight, scales)), -INT8_MAX, INT8_MAX)

    def of_share(share: jax.Array) -> jax.Array:
        scales = share * widest
        return ((weight - rounded(scales) * scales[:, None]) ** 2 * importance).sum(-1)

    shares = jnp.asarray(INT8_SHARES)
    scales = shares[jnp.argmin(lax.map(of_share, shares), 0)] * widest
    return rounded(scales).astype(jnp.int8), scales
