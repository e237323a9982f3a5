"""Weights whose rounding knows what they are multiplied with.

Plain rounding takes each weight for itself. Here, in four bits, the columns of a weight are rounded one after the
other, and what is lost with one is made good by those that are still to come, as far as their inputs go together: GPTQ
(Frantar et al., arXiv 2210.17323, algorithm 1). The range of each group of 128 is searched for, too: a narrower one
than from its smallest to its largest value often loses less. In eight bits only the range of each row is searched for.
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
"""Of the mean of the moments' diagonal, added to it: directions that the calibration hardly saw count for little."""


def round_int4(weight: jax.Array, moments: jax.Array | None = None, ranges: str = "mse") -> QTensor:
    """A weight in four bits that changes its products the least.

    Args:
      weight: float [..., N, K], K a multiple of 128.
      moments: float32 [..., K, K], sums of x x^T over the inputs; all zero where there were none. Plain rounding for
        those and for None, with the range that is best for the weight alone.
      ranges: how the range of each group is found, one of `dsv32_jax.convert.ranges.RANGES`.

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
    """Also whether the moments could be solved for."""
    lead = weight.shape[:-2]
    flat = weight.astype(jnp.float32).reshape(-1, *weight.shape[-2:])
    if moments is None:
        values, scales, zeros = lax.map(partial(_round_alone, ranges=ranges), flat)
        solved = jnp.bool_(True)
    else:
        seen = moments.reshape(-1, *moments.shape[-2:])
        values, scales, zeros, solved = lax.map(lambda pair: _round(*pair, ranges), (flat, seen))
    packed, words = pack_int4(values, scales, zeros)
    rounded = QTensor(packed.reshape(*lead, *packed.shape[1:]), words.reshape(*lead, *words.shape[1:]), INT4)
    return rounded, solved.all()


def check_inputs(weight: jax.Array, moments: jax.Array | None) -> None:
    """Raises UserError for a weight or moments that are NaN or infinite: rounding would make numbers of them."""
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
    """`_round` without inputs."""
    scales, zeros = _ranges(weight, jnp.ones(weight.shape[1]), ranges)
    step, zero = (jnp.repeat(of.T.astype(jnp.float32), GROUP, axis=1) for of in (scales, zeros))
    return int4_values(weight, step, zero).astype(jnp.uint8), scales.T, zeros.T.astype(jnp.uint8)


def _round(weight: jax.Array, moments: jax.Array, ranges: str) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of one weight [N, K]: values uint8 [N, K], scales bfloat16 [N, K / 128], zeros uint8 [N, K / 128], bool [].

    The last says whether the moments had a factorisation.

    Columns are taken by falling mean square of their inputs, whichever group they are of: what comes first has most
    others left to make its error good.
    """
    rows, depth = weight.shape
    diagonal = jnp.diagonal(moments)
    mean = diagonal.mean()
    seen = jnp.where(mean > 0, moments / jnp.where(mean > 0, mean, 1), jnp.eye(depth)) + DAMPING * jnp.eye(depth)
    importance = jnp.diagonal(seen)
    groups = jnp.arange(depth) // GROUP
    scales, zeros = _ranges(weight, importance, ranges)
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
            value = int4_values(block[:, j], step, zero)
            error = (block[:, j] - (value - zero) * step) / within[j, j]
            return block - error[:, None] * within[j], lost.at[:, j].set(error), chosen.at[:, j].set(value)

        empty = jnp.zeros((rows, GROUP))
        _, lost, chosen = lax.fori_loop(0, GROUP, one_column, (block, empty, empty))
        weight = weight - jnp.matmul(lost, steps, precision="highest")
        return weight, lax.dynamic_update_slice(values, chosen.astype(jnp.uint8), (0, begin))

    start = weight, jnp.zeros((rows, depth), jnp.uint8)
    _, values = lax.fori_loop(0, depth // GROUP, one_block, start)
    return values[:, jnp.argsort(order)], scales.T, zeros.T.astype(jnp.uint8), jnp.isfinite(upper).all()


def round_int8(weight: jax.Array, moments: jax.Array | None = None, ranges: str = "mse") -> QTensor:
    """A weight in eight bits, each row with a range of its own, by default the one that loses the least.

    An error counts as much as its column's input has mean square, to which `DAMPING` of the mean of all is added.

    Args:
      weight: float [..., N, K].
      moments: float32 [..., K, K], sums of x x^T over the inputs; all zero where there were none. Columns count alike
        for those and for None.
      ranges: how the range of each row is found, one of `dsv32_jax.convert.ranges.RANGES`.

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
