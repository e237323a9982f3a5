"""Multi-head latent attention over each token's own chosen keys."""

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import FLOATS, INT32, check, check_layer, check_size
from pallas_kernels.backend import KERNEL, gradient_of_reference, launched, resolve
from pallas_kernels.cache_format import record_bytes
from pallas_kernels.chunking import CHUNK_BYTES
from pallas_kernels.mosaic import interpret_on
from pallas_kernels.operators import callable_package
from pallas_kernels.sparse_mla import mosaic_gpu, reference
from pallas_kernels.sparse_mla.reference import dense_mla

__all__ = ["dense_mla", "sparse_mla"]

callable_package(__name__)


def sparse_mla(
    queries: jax.Array,
    kv: jax.Array,
    layer: int | jax.Array,
    slots: jax.Array,
    *,
    scale: float,
    rope_dim: int,
    lengths: jax.Array | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Computes softmax attention of absorbed queries over the rows in `slots`.

    Keys are whole rows, values their latent part.

    Source: DeepSeek-V3.2-Exp report, section 1 (MQA form of MLA).

    The kernel takes bfloat16 queries, 512 latent and 64 rope columns, up to 128 heads and 2048 keys, and a cache of
    bfloat16 rows or FP8 records. It rounds probabilities and the output to bfloat16, and an FP8 record's scales and
    values to bfloat16 (exact for scales that are powers of two). Its gradient is the reference's.

    Args:
      queries: [T, H, latent + rope].
      kv: the latent cache, all layers (see `cache_format`).
      layer: which layer.
      slots: int32 [T, K] physical slots of that layer; -1 is absent; a duplicate counts twice.
      scale: of the scores; no default, since YaRN changes it.
      rope_dim: width of the rope part.
      lengths: int32 [T], a promise that `slots[t, :lengths[t]]` are all present; none after them counts. Without it any
        slot may be absent, which costs the kernel a look at each.
      chunk_bytes: the reference's budget for the gathered rows of a chunk of tokens.
      backend: "auto", "mosaic_gpu", "interpret" or "reference".

    Returns:
      out [T, H, latent] in the queries' dtype and lse float32 [T, H] (natural logarithm). A token without any slot has
      out 0 and lse -inf.

    Raises:
      ValueError: other dtypes than these, no such layer, or the shapes do not fit together.
      BackendError: the kernel was asked for and does not take these arguments, or there is no such GPU.
    """
    check(
        "sparse_mla",
        queries=(queries, FLOATS, "T H D"),
        kv=(kv, (*FLOATS, "uint8"), "layers blocks block D"),
        slots=(slots, INT32, "T K"),
    )
    if lengths is not None:
        check("sparse_mla", lengths=(lengths, INT32, "T"))
    if slots.shape[0] != queries.shape[0] or (lengths is not None and lengths.shape != slots.shape[:1]):
        raise ValueError(
            f"sparse_mla needs queries [T, H, D], kv [layers, blocks, 64, D], slots [T, K] and lengths [T], not "
            f"{queries.shape}, {kv.shape}, {slots.shape} and {None if lengths is None else lengths.shape}"
        )
    check_layer("sparse_mla", layer, kv.shape[0])
    check_size("sparse_mla", 0, rope_dim=rope_dim)
    backend = resolve(backend, "sparse_mla", KERNEL, mosaic_gpu.unsupported(queries, kv, slots, scale, rope_dim))
    latent = queries.shape[2] - rope_dim
    row = record_bytes(latent, rope_dim) if kv.dtype == jnp.uint8 else queries.shape[2]
    if latent < 1 or kv.shape[3] != row:
        raise ValueError(
            f"sparse_mla: queries of {queries.shape[2]} columns, {rope_dim} of them rope, need rows of {row} in kv "
            f"of {kv.dtype}, not of {kv.shape[3]}"
        )
    if backend == "reference":
        return reference.sparse_mla(queries, kv, layer, slots, lengths, scale, rope_dim, chunk_bytes)
    interpret = interpret_on(backend)

    # What may be a tracer goes in as an argument; a missing array is an empty tree of them.
    def kernel(queries, kv, layer, slots, lengths):
        return mosaic_gpu.sparse_mla(queries, kv, layer, slots, lengths, scale, interpret=interpret)

    def plain(queries, kv, layer, slots, lengths):
        return reference.sparse_mla(queries, kv, layer, slots, lengths, scale, rope_dim, chunk_bytes)

    op = gradient_of_reference(launched(kernel, "sparse_mla", backend), plain)
    return op(queries, kv, jnp.asarray(layer, jnp.int32), slots, lengths)
