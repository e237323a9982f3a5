"""Multi-head latent attention over each token's own chosen keys."""

import jax

from pallas_kernels.backend import resolve
from pallas_kernels.chunking import CHUNK_BYTES
from pallas_kernels.sparse_mla import reference
from pallas_kernels.sparse_mla.reference import dense_mla

__all__ = ["dense_mla", "sparse_mla"]


def sparse_mla(
    queries: jax.Array,
    kv: jax.Array,
    layer: int,
    slots: jax.Array,
    *,
    scale: float,
    rope_dim: int,
    chunk_bytes: int = CHUNK_BYTES,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of absorbed queries over the rows in `slots`; keys are whole rows, values their latent part.

    Source: DeepSeek-V3.2-Exp report, section 1 (MQA form of MLA).

    Args:
      queries: [T, H, latent + rope].
      kv: the latent cache, all layers (see `cache_write`).
      layer: which layer.
      slots: int32 [T, K] physical slots; -1 is absent; a duplicate counts twice.
      scale: of the scores; no default, since YaRN changes it.
      rope_dim: width of the rope part.
      chunk_bytes: budget for the gathered rows of a chunk of tokens.
      backend: "auto" or "reference".

    Returns:
      out [T, H, latent] in the queries' dtype and lse float32 [T, H] (natural logarithm). A token without any slot has
      out 0 and lse -inf.
    """
    resolve(backend, "sparse_mla")
    return reference.sparse_mla(queries, kv, layer, slots, scale, rope_dim, chunk_bytes)
