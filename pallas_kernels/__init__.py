"""Kernels of DeepSeek-V3.2, one folder an op, usable without the rest of this project.

    import pallas_kernels as pk

    positions = pk.top_k(scores, 2048)
    y = pk.matmul(x, pk.matmul.quantize_weight(weight, "int8"))

`pk.top_k` is the package `pallas_kernels.top_k`, and so is what `from pallas_kernels import top_k` gives. It is called
like the function of its name, `pallas_kernels.top_k.top_k`, and holds what else belongs to the op. All of `__all__` are
such packages; `moe_dispatch` alone has no function of its own name, but several: `pk.moe_dispatch.route(...)`.

Every op is a function with one `backend` argument: "reference" is the specification in plain `jax.numpy`, runs anywhere
and is differentiable; a named kernel backend runs or raises; "auto" takes the best that is available. Arrays of a dtype
or a shape that the op does not take are refused by name, while it is called or traced.
"""

import importlib
from typing import Any

__all__ = [
    "cache_write",
    "index_select",
    "indexer_logits",
    "matmul",
    "moe_dispatch",
    "quantize",
    "sparse_mla",
    "top_k",
]

# Beside the ops: what they are called with or refer to.
_HELPERS = ("backend", "cache_format", "configs", "paging", "rowwise", "shapes")


def __getattr__(name: str) -> Any:
    # Late, so that `import pallas_kernels` does not import jax.
    if name in __all__ or name in _HELPERS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted((*__all__, *_HELPERS))
