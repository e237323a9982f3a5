"""Products of rows sorted by expert with stacked expert weights."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic
from pallas_kernels.backend import UNMEASURED_KERNEL, gradient_of_reference, resolve
from pallas_kernels.grouped_matmul import mosaic_gpu, reference
from pallas_kernels.quant_matmul import BLOCK
from pallas_kernels.quant_matmul.reference import quant_matmul
from pallas_kernels.quantize import quantize

__all__ = ["grouped_dense_matmul", "grouped_matmul", "grouped_quant_matmul"]


def grouped_matmul(
    rows: jax.Array,
    weights: object,
    tile_expert: jax.Array,
    product: Callable[[jax.Array, object], jax.Array],
    *,
    backend: str = "auto",
) -> jax.Array:
    """Each tile of rows times the weight of its expert, without a branch or a shape that depends on the routing.

    Any `product` is possible, so there is no kernel for it; `grouped_quant_matmul` and `grouped_dense_matmul` have one.

    Args:
      rows: float [P, K], in the order of a `RoutingPlan`.
      weights: pytree of arrays [E, ...]: the experts' weights, quantised or not.
      tile_expert: int32 [tiles], the expert of each tile of P / tiles rows.
      product: `product(x [M, K], weight) -> [M, N]` of one tile, weight being `weights` without the leading axis.
      backend: "auto" or "reference".

    Returns:
      [P, N].
    """
    resolve(backend, "grouped_matmul")
    return reference.grouped_matmul(rows, weights, tile_expert, product)


def check_tiles(rows: jax.Array, weights: jax.Array, tile_expert: jax.Array) -> None:
    """Raises ValueError if rows [P, K], weights [E, N, K] and tile_expert [tiles] do not fit together."""
    ranks = rows.ndim, weights.ndim, tile_expert.ndim
    if ranks != (2, 3, 1) or rows.shape[1] != weights.shape[2] or rows.shape[0] % max(1, tile_expert.shape[0]):
        raise ValueError(
            f"rows {rows.shape}, weights {weights.shape} and tile_expert {tile_expert.shape} do not fit: they must be "
            f"[P, K], [E, N, K] and [tiles], with P a multiple of tiles"
        )


def grouped_quant_matmul(
    rows: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    tile_expert: jax.Array,
    *,
    quantize_input: bool,
    scale_fmt: str | None = "ue8m0",
    used_tiles: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """`quant_matmul` of each tile of rows with the weight of its expert.

    Args:
      rows: float [P, K], in the order of a `RoutingPlan`.
      values: float8_e4m3fn [E, N, K].
      scales: float32 [E, ceil(N / 128), ceil(K / 128)], multipliers.
      tile_expert: int32 [tiles], the expert of each tile of P / tiles rows.
      quantize_input: quantise rows to FP8 in groups of 128 first, as the official code does.
      scale_fmt: of the rows' scales, see `quantize`.
      used_tiles: int32 [], how many tiles hold a row at all: the first ones. The results of the others are undefined.
      backend: "auto", "mosaic_gpu", "interpret" or "reference". The kernels take quantised bfloat16 rows, N in
        multiples of 64, and K in multiples of 128 in tiles of 64 rows or a multiple, of 512 in tiles of 8, 16 or 32.
        Their gradient is the reference's.

    Returns:
      [P, N] in the rows' dtype, accumulated in float32.

    Raises:
      ValueError: shapes do not fit.
      BackendError: the kernel was asked for and does not take these arguments.
    """
    check_tiles(rows, values, tile_expert)
    grid = (values.shape[0], *(-(-side // BLOCK) for side in values.shape[1:]))
    if scales.shape != grid:
        raise ValueError(f"scales of values {values.shape} must be {grid}, not {scales.shape}")
    reason = mosaic_gpu.unsupported_fp8(rows, values, tile_expert, quantize_input)
    chosen = resolve(backend, "grouped_quant_matmul", UNMEASURED_KERNEL, reason)

    def plain(rows, values, scales, tile_expert, used_tiles):
        del used_tiles

        def product(x, weight):
            return quant_matmul(x, *weight, quantize_input, scale_fmt)

        return reference.grouped_matmul(rows, (values, scales), tile_expert, product)

    def kernel(rows, *others):
        interpret = mosaic.interpreter() if chosen == "interpret" else None
        return mosaic_gpu.grouped_quant_matmul(*quantize(rows, scale_fmt), *others, interpret=interpret)

    op = plain if chosen == "reference" else gradient_of_reference(kernel, plain)
    return op(rows, values, scales, tile_expert, used_tiles)


def grouped_dense_matmul(
    rows: jax.Array,
    weights: jax.Array,
    tile_expert: jax.Array,
    *,
    used_tiles: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """Each tile of rows times the transpose of its expert's weight, which is not quantised.

    Args:
      rows: float [P, K], in the order of a `RoutingPlan`.
      weights: float [E, N, K]; computed with in the rows' dtype.
      tile_expert: int32 [tiles], the expert of each tile of P / tiles rows.
      used_tiles: int32 [], how many tiles hold a row at all: the first ones. The results of the others are undefined.
      backend: "auto", "mosaic_gpu", "interpret" or "reference". The kernel takes bfloat16, N and K in multiples of
        64, and tiles of 64 rows or a multiple. Its gradient is the reference's.

    Returns:
      [P, N] in the rows' dtype, accumulated in float32.

    Raises:
      ValueError: shapes do not fit.
      BackendError: the kernel was asked for and does not take these arguments.
    """
    check_tiles(rows, weights, tile_expert)
    reason = mosaic_gpu.unsupported_bf16(rows, weights, tile_expert)
    chosen = resolve(backend, "grouped_dense_matmul", UNMEASURED_KERNEL, reason)

    def plain(rows, weights, tile_expert, used_tiles):
        del used_tiles

        def product(x, weight):
            return jnp.matmul(x, weight.astype(x.dtype).T, precision="highest")

        return reference.grouped_matmul(rows, weights, tile_expert, product)

    def kernel(*arrays):
        interpret = mosaic.interpreter() if chosen == "interpret" else None
        return mosaic_gpu.grouped_dense_matmul(*arrays, interpret=interpret)

    op = plain if chosen == "reference" else gradient_of_reference(kernel, plain)
    return op(rows, weights, tile_expert, used_tiles)
