"""The choice of a backend: a named one runs or raises, only "auto" chooses."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

BACKENDS = ("auto", "reference", "interpret", "mosaic_gpu")
KERNEL = ("mosaic_gpu", "interpret", "reference")
"""What an op with a kernel has; "interpret" is that kernel in Pallas' GPU interpreter, for tests."""

MEASURED_WITH = ("0.11.2",)
"""Versions of JAX that the kernels were tested and measured with. Pallas' Mosaic GPU promises nothing between versions:
on another, kernels may not compile, or be slower."""

logger = logging.getLogger("pallas_kernels")


class BackendError(ValueError):
    """The backend that was asked for does not exist, or does not take these arguments."""


def on_hopper() -> bool:
    """Returns whether JAX runs on GPUs that the kernels are written for: compute capability 9.0 (H100, H200).

    Under `jax.default_device` it is that device which counts.
    """
    chosen = jax.config.jax_default_device
    if chosen is None:
        return _all_hopper()
    devices = jax.local_devices(backend=chosen) if isinstance(chosen, str) else [chosen]
    return all(map(_is_hopper, devices))


@functools.cache
def _all_hopper() -> bool:
    return all(map(_is_hopper, jax.local_devices()))


def _is_hopper(device: jax.Device) -> bool:
    return getattr(device, "compute_capability", None) == "9.0"


def resolve(backend: str, op: str, available: tuple[str, ...] = ("reference",), unsupported: str | None = None) -> str:
    """Returns the backend that `op` shall run on.

    Args:
      backend: one of `BACKENDS`.
      op: the op's name, for the error.
      available: what the op has: `KERNEL`, or the reference alone.
      unsupported: what the op's kernel does not take of these arguments, and what it would take; None if it takes all.

    Returns:
      "mosaic_gpu", "interpret" or "reference". "auto" takes the kernel on a Hopper GPU if it takes the arguments; if it
      does not, that is logged as a warning, once: a step may take several times as long. So is a version of JAX that
      the kernels were not measured with.

    Raises:
      BackendError: no such backend, the op does not have it, its kernel does not take these arguments, or JAX's GPUs
        are none that the kernels are written for. `launched` tells where there is no GPU.
    """
    if backend not in BACKENDS:
        raise BackendError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        if "mosaic_gpu" not in available or not on_hopper():
            return "reference"
        if unsupported is not None:
            tell_of_reference(op, unsupported)
            return "reference"
        tell_of_version(jax.__version__)
        return "mosaic_gpu"
    if backend not in available:
        raise BackendError(f"{op} has no {backend!r} backend; it has {', '.join(available)} (or use 'auto')")
    if backend != "reference" and unsupported is not None:
        raise BackendError(f"the kernel of {op} does not take {unsupported}; use backend='auto' or 'reference'")
    if backend == "mosaic_gpu" and jax.local_devices()[0].platform == "gpu" and not _all_hopper():
        raise BackendError(_needs_hopper(op, "on another GPU"))
    return backend


@functools.cache
def tell_of_reference(op: str, unsupported: str) -> None:
    """Warns, the first time, that a kernel is not taken."""
    logger.warning("%s runs without its kernel, which does not take %s", op, unsupported)


@functools.cache
def tell_of_version(version: str) -> None:
    """Warns, the first time, that kernels run on a version of JAX that they were not measured with."""
    if version not in MEASURED_WITH:
        measured = ", ".join(MEASURED_WITH)
        logger.warning(
            "kernels were tested and measured with JAX %s, and this is %s: they may fail or be slower; "
            "backend='reference' runs none",
            measured,
            version,
        )


def launched(kernel: Callable[..., Any], op: str, chosen: str) -> Callable[..., Any]:
    """`kernel(*arrays)`; on the backend "mosaic_gpu" it raises BackendError where it is compiled for a CPU.

    Not where it is traced: a program may be traced on one device and compiled for another.
    """
    if chosen != "mosaic_gpu":
        return kernel

    def marked(*arrays: Any) -> Any:
        (first, *others), tree = jax.tree.flatten(arrays)
        try:
            return kernel(*jax.tree.unflatten(tree, [_for_gpu.bind(first, op=op), *others]))
        except ValueError as error:  # Pallas', which is lowered at once where nothing is traced
            if "Only interpret mode is supported" not in str(error):
                raise
            raise BackendError(_needs_hopper(op, "on a CPU")) from error

    return marked


_for_gpu = Primitive("for_gpu")
"""An array as it is, in a program that can be lowered for a GPU alone; nothing is left of it there."""
_for_gpu.def_impl(lambda array, *, op: array)
_for_gpu.def_abstract_eval(lambda array, *, op: array)
batching.primitive_batchers[_for_gpu] = lambda arrays, axes, *, op: (_for_gpu.bind(arrays[0], op=op), axes[0])


def _refuse(context: mlir.LoweringRuleContext, array: Any, *, op: str) -> Any:
    raise BackendError(_needs_hopper(op, "on a CPU" if context.module_context.platforms == ("cpu",) else "elsewhere"))


mlir.register_lowering(_for_gpu, _refuse)
mlir.register_lowering(_for_gpu, lambda context, array, *, op: [array], platform="cuda")


def _needs_hopper(op: str, place: str) -> str:
    return (
        f"{op}: backend 'mosaic_gpu' is a kernel for an H100 or H200 GPU, and this runs {place}; use backend='auto' or "
        f"'reference' ('interpret' is the same kernel, slowly, for tests)"
    )


def gradient_of_reference(kernel: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel(*arrays)`, whose gradient is that of `reference(*arrays)`."""
    op = jax.custom_vjp(kernel)
    op.defvjp(lambda *arrays: (kernel(*arrays), arrays), lambda arrays, ct: jax.vjp(reference, *arrays)[1](ct))
    return op


NO_GRADIENT_OF_WEIGHT = (
    "a quantised weight has no gradient: it would be rounded to 0 in its own dtype; dequantise it first "
    "(dsv32_jax: `load(..., dequantize='float32')` or `m.dequantized()`), or differentiate other parameters only"
)
NO_GRADIENT_OF_ROUNDING = (
    "rounding activations has no gradient: what passes through quantised values would be 0; leave them unquantised "
    "(dsv32_jax: `load(..., act_quant=False)`, or `load(..., dequantize='float32')`, which does both)"
)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def refuse_gradient(x: jax.Array, reason: str) -> jax.Array:
    """`x` as it is; raises NotImplementedError with the reason when it is differentiated, instead of a silent 0."""
    return x


@refuse_gradient.defjvp
def _(reason: str, primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(reason)


def without_gradient(kernel: Callable[..., Any], op: str) -> Callable[..., Any]:
    """`kernel(*arrays)`, which says so when it is differentiated."""

    def refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(f"the kernel of {op} has no gradient; use backend='reference'")

    wrapped = jax.custom_jvp(kernel)
    wrapped.defjvp(refuse)
    return wrapped
