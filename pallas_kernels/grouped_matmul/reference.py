"""SwiGLU behind two products, tile by tile: the specification."""

import jax
import jax.numpy as jnp

from pallas_kernels.chunking import map_tiles
from pallas_kernels.quant_matmul.reference import scaled_matmul
from pallas_kernels.quantize import quantize


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up in float32, rounded once to the inputs' dtype."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def grouped_swiglu(rows, row_scales, weights, weight_scales, tile_expert, result):
    """The op's result before it is quantised."""

    def rounded_swiglu(*products):
        # Within one program XLA may drop the rounding of what is widened again at once.
        return jax.lax.optimization_barrier(swiglu(*jax.lax.optimization_barrier(products)))

    def by_expert(f, rows, weights):
        return f(rows, weights) if tile_expert is None else map_tiles(f, rows, tile_expert, weights)

    if not weight_scales:

        def product(x, weight):
            gate, up = (jnp.matmul(x, w.astype(x.dtype).T, precision="highest") for w in weight[0])
            return rounded_swiglu(gate, up)

        return by_expert(product, rows, (weights, ()))

    dtype = rows.dtype
    if row_scales is None:
        rows, row_scales = quantize(rows, result.scale_fmt, backend="reference")
    else:
        dtype, row_scales = jnp.bfloat16, row_scales.T if result.scales_by_group else row_scales

    def scaled_product(x, weight):
        pairs = zip(*weight, strict=True)
        return rounded_swiglu(*(scaled_matmul(*x, values, scales, dtype) for values, scales in pairs))

    return by_expert(scaled_product, (rows, row_scales), (weights, weight_scales))
