"""Pallas' GPU interpreter, in which kernels run on a CPU and races are detected."""

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu


def interpreter(detect_races: bool = True) -> Any:
    """Returns parameters for `plgpu.kernel(interpret=...)`."""
    return plgpu.InterpretGPUParams(detect_races=detect_races)


def interpret_on(backend: str) -> Any:
    """Returns `interpret` of a kernel on the backend that was chosen: None on a GPU."""
    return interpreter() if backend == "interpret" else None
