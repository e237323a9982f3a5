"""Products of rows sorted by expert with stacked expert weights."""

from collections.abc import Callable

import jax

from pallas_kernels.backend import resolve
from pallas_kernels.grouped_matmul import reference


def grouped_matmul(
    rows: jax.Array,
    weights: object,
    tile_expert: jax.Array,
    product: Callable[[jax.Array, object], jax.Array],
    *,
    backend: str = "auto",
) -> jax.Array:
    """Each tile of rows times the weight of its expert, without a branch or a shape that depends on the routing.

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
