"""Bytes of parameters and caches, and the memory that is free for them."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from dsv32_jax.common.units import human
from dsv32_jax.config import ModelConfig
from dsv32_jax.errors import UserError
from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.params import named_parameters

GPU_BYTES = {"80 GB GPU (H100)": 80e9, "141 GB GPU (H200)": 141e9}
# The rest is left to XLA's temporary buffers and the runtime when memory is planned.
USABLE = 0.9


def parameter_counts(parameters: Mapping[str, Any]) -> tuple[int, dict[str, int]]:
    """(number of parameters, bytes of each dtype) of a model as it is stored; allocates nothing.

    The scales of quantised weights count as bytes but not as parameters.

    Args:
      parameters: by path, abstract or not; of a config, see `dsv32_jax.convert.stored_parameters`.
    """
    count, by_dtype = 0, Counter[str]()
    for leaf in parameters.values():
        count += math.prod(leaf.shape)
        for array in jax.tree.leaves(leaf):
            by_dtype[str(array.dtype)] += math.prod(array.shape) * array.dtype.itemsize
    return count, dict(by_dtype)


def describe(model: Any) -> str:
    """A model in a line: its sizes, and how many bytes lie on which devices."""
    config, parameters = model.config, named_parameters(model)
    count, by_dtype = parameter_counts(parameters)
    arrays = jax.tree.leaves(parameters)
    devices = sorted({str(device) for array in arrays if isinstance(array, jax.Array) for device in array.devices()})
    parts = [
        f"{config.num_hidden_layers} layers{' and MTP' if model.mtp else ''}",
        f"hidden_size {config.hidden_size}",
        f"{config.n_routed_experts} experts",
        f"{count:,} parameters: " + ", ".join(f"{human(size)} {dtype}" for dtype, size in sorted(by_dtype.items())),
    ]
    return f"{config.model_type}, {', '.join(parts)}{' on ' if devices else ''}{', '.join(devices)}"


def cache_bytes_per_token(config: ModelConfig) -> dict[str, int]:
    """Bytes that one token takes in the cache, all layers together, for each form that the cache has."""
    forms = {
        "float32": ("float32", False),
        "bfloat16": ("bfloat16", False),
        "bfloat16, fp8 index keys": ("bfloat16", True),
        "fp8 records, fp8 index keys": ("fp8", True),
    }
    return {name: KVCache.bytes_per_token(config, *form) for name, form in forms.items()}


def available_bytes() -> tuple[float, str]:
    """(free bytes where JAX will put the parameters, the name of that memory)."""
    device = jax.devices()[0]
    statistics = device.memory_stats() if device.platform != "cpu" else None
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0), device.device_kind
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1]), "host memory"
    except OSError:
        pass
    return math.inf, "unknown memory"


def check_room(needed: int, name: str, hint: str = "") -> None:
    """Raises `UserError` where `needed` bytes are not free; `name` and `hint` are the beginning and end of its text."""
    free, place = available_bytes()
    if needed > free:
        raise UserError(f"{name} take {human(needed)} and {place} has {human(free)} free{hint}")


def checkpoint_bytes(directory: Path) -> int:
    """Bytes of a checkpoint's tensor files: parameters keep in memory the dtype that they have in the file."""
    files = list(directory.glob("*.safetensors")) or [path for path in directory.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files)


def tokens_that_fit(parameter_bytes: int, bytes_per_token: int, memory: float) -> int | None:
    """Cache tokens beside the parameters in `memory` bytes; None when the parameters alone do not fit."""
    rest = memory * USABLE - parameter_bytes
    return None if rest < 0 else int(min(rest, 1e18) // bytes_per_token)
