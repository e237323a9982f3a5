"""Rounds weights with regard to the inputs that they are multiplied with.

Plain rounding rounds each weight by itself. In four bits, this module rounds the columns of a weight one after the
other, and the columns that follow compensate the error of each as far as their inputs are correlated: GPTQ (Frantar et
al., arXiv 2210.17323, algorithm 1). It searches for the range of each group of 128, too: one that is narrower than from
the smallest to the largest value often loses less. In eight bits it only searches for the range of each row.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from dsv32_jax.convert.ranges import int4_range, int8_scales, int8_values
from dsv32_jax.errors import UserError
from pallas_kernels.matmul import INT4, INT8, QTensor, pack_int4
from pallas_kernels.matmul.int4 import GROUP, int4_values

DAMPING = 0.01
"""Share of the mean of the moments' diagonal that is added to the diagonal: the moments become positive definite."""


def round_int4(weight: jax.Array, moments: jax.Array | None = None, ranges: str = "mse") -> QTensor:
    """Rounds a weight to four bits so that its products change the least.

    Args:
      weight: float [..., N, K], K a multiple of 128.
      moments: float32 [..., K, K], sums of x x^T over the inputs; all zero where there were none. Those and None give
        plain rounding, with the range that is best for the weight alone.
      ranges: the method that chooses the range of each group, one of `dsv32_jax.convert.ranges.RANGES`.

    Returns:
      A QTensor, "int4".

    Raises:
      UserError: a weight or moments that are NaN or infinite, or moments that are no sums of x x^T.
    """
    check_inputs(weight, moments)
    rounded, solved = _round_int4(weight, moments, ranges)
    if not bool(solved):
        raise UserError("moments: not positive semidefinite; they must be sums of x x^T over inputs x")
    return rounded


@partial(jax.jit, static_argnames="ranges")
def _round_int4(weight: jax.Array, moments: jax.Array | None, ranges: str) -> tuple[QTensor, jax.Array]:
    """Returns the rounded weight, and bool [] whether the moments had a factorisation."""
    lead = weight.shape[:-2]
    flat = weight.astype(jnp.float32).reshape(-1, *weight.shape[-2:])
    if moments is None:
        values, scales, zeros = lax.map(partial(_round_alone, ranges=ranges), flat)
        solved = jnp.bool_(True)
    else:
        flat_moments = moments.reshape(-1, *moments.shape[-2:])
        values, scales, zeros, solved = lax.map(lambda pair: _round(pair[0], pair[1], ranges), (flat, flat_moments))
    packed, words = pack_int4(values, scales, zeros)
    rounded = QTensor(packed.reshape(*lead, *packed.shape[1:]), words.reshape(*lead, *words.shape[1:]), INT4)
    return rounded, solved.all()


def check_inputs(weight: jax.Array, moments: jax.Array | None) -> None:
    """Raises UserError for a weight or moments that are NaN or infinite: rounding would make them finite."""
    for name, array in (("weight", weight), ("moments", moments)):
        if array is not None and not bool(jnp.isfinite(array).all()):
            raise UserError(f"{name}: holds NaN or infinite values; all must be finite")


def _ranges(weight: jax.Array, importance: jax.Array, ranges: str) -> tuple[jax.Array, jax.Array]:
    """Scales bfloat16 [K / 128, N] and zeros float32 [K / 128, N] of the groups of a weight [N, K]."""
    rows, depth = weight.shape
    return lax.map(
        lambda group: int4_range(
            lax.dynamic_slice(weight, (0, group * GROUP), (rows, GROUP)),
            lax.dynamic_slice(importance, (group * GROUP,), (GROUP,)),
            ranges,
        ),
        jnp.arange(depth // GROUP),
    )


def _round_alone(weight: jax.Array, ranges: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`_round` without moments: each value by itself."""
    scales, zeros = _ranges(weight, jnp.ones(weight.shape[1]), ranges)
    step, zero = (jnp.repeat(of.T.astype(jnp.float32), GROUP, axis=1) for of in (scales, zeros))
    return int4_values(weight, step, zero).astype(jnp.uint8), scales.T, zeros.T.astype(jnp.uint8)


def _round(weight: jax.Array, moments: jax.Array, ranges: str) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Rounds one weight [N, K] with GPTQ.

    Columns are rounded by falling mean square of their inputs, whichever group they belong to: the more columns follow,
    the better they compensate an error.

    Returns:
      Values uint8 [N, K], scales bfloat16 [N, K / 128], zeros uint8 [N, K / 128], and bool [] whether the moments had a
      factorisation.
    """
    rows, depth = weight.shape
    diagonal = jnp.diagonal(moments)
    mean = diagonal.mean()
    damped = jnp.where(mean > 0, moments / jnp.where(mean > 0, mean, 1), jnp.eye(depth)) + DAMPING * jnp.eye(depth)
    importance = jnp.diagonal(damped)
    groups = jnp.arange(depth) // GROUP
    scales, zeros = _ranges(weight, importance, ranges)
    order = jnp.argsort(-importance, stable=True)
    damped, weight, group_of = damped[order][:, order], weight[:, order], groups[order]
    inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(damped), True), jnp.eye(depth))
    upper = jnp.linalg.cholesky((inverse + inverse.T) / 2).T

    def one_block(number: jax.Array, state: tuple) -> tuple:
        weight, values = state
        begin = number * GROUP
        block = lax.dynamic_slice(weight, (0, begin), (rows, GROUP))
        steps = lax.dynamic_slice(upper, (begin, 0), (GROUP, depth))
        within = lax.dynamic_slice(steps, (0, begin), (GROUP, GROUP))
        of_groups = lax.dynamic_slice(group_of, (begin,), (GROUP,))

        def one_column(j: jax.Array, inner: tuple) -> tuple:
            block, errors, rounded = inner
            step, zero = scales[of_groups[j]].astype(jnp.float32), zeros[of_groups[j]]
            value = int4_values(block[:, j], step, zero)
            error = (block[:, j] - (value - zero) * step) / within[j, j]
            return block - error[:, None] * within[j], errors.at[:, j].set(error), rounded.at[:, j].set(value)

        empty = jnp.zeros((rows, GROUP))
        _, errors, rounded = lax.fori_loop(0, GROUP, one_column, (block, empty, empty))
        weight = weight - jnp.matmul(errors, steps, precision="highest")
        return weight, lax.dynamic_update_slice(values, rounded.astype(jnp.uint8), (0, begin))

    start = weight, jnp.zeros((rows, depth), jnp.uint8)
    _, values = lax.fori_loop(0, depth // GROUP, one_block, start)
    return values[:, jnp.argsort(order)], scales.T, zeros.T.astype(jnp.uint8), jnp.isfinite(upper).all()


def round_int8(weight: jax.Array, moments: jax.Array | None = None, ranges: str = "mse") -> QTensor:
    """Rounds a weight to eight bits, each row in a range of its own, by default the one with the least error.

    The square error of a column is weighted by the mean square of its input, to which `DAMPING` of the mean over all
    columns is added.

    Args:
      weight: float [..., N, K].
      moments: float32 [..., K, K], sums of x x^T over the inputs; all zero where there were none. Those and None
        weight all columns alike.
      ranges: the method that chooses the range of each row, one of `dsv32_jax.convert.ranges.RANGES`.

    Returns:
      A QTensor, "int8".

    Raises:
      UserError: a weight or moments that are NaN or infinite.
    """
    check_inputs(weight, moments)
    return _round_int8(weight, moments, ranges)


@partial(jax.jit, static_argnames="ranges")
def _round_int8(weight: jax.Array, moments: jax.Array | None, ranges: str) -> QTensor:
    lead, depth = weight.shape[:-2], weight.shape[-1]
    flat = weight.astype(jnp.float32).reshape(-1, *weight.shape[-2:])
    diagonals = jnp.zeros((len(flat), depth))
    if moments is not None:
        diagonals = jnp.diagonal(moments, axis1=-2, axis2=-1).reshape(-1, depth)

    def rounded(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows, diagonal = pair
        mean = diagonal.mean()
        importance = jnp.where(mean > 0, diagonal / jnp.where(mean > 0, mean, 1), 1) + DAMPING
        scales = int8_scales(rows, importance, ranges)
        return int8_values(rows, scales).astype(jnp.int8), scales

    values, scales = lax.map(rounded, (flat, diagonals))
    return QTensor(values.reshape(weight.shape), scales.reshape(*lead, -1), INT8)
