"""What an op's arrays must be, by dtype and shape alone: nothing is left of these checks in a compiled program."""

from typing import Any

import jax

FLOATS = ("bfloat16", "float16", "float32", "float64")
"""Not the formats of eight bits and fewer: an op either takes those as such, with scales, or not at all."""
E4M3, FLOAT32, INT32 = ("float8_e4m3fn",), ("float32",), ("int32",)


def check(op: str, **arrays: tuple[Any, tuple[str, ...], str]) -> None:
    """Raises ValueError, which names the array and what it must be, for one of another dtype, rank or fixed size.

    Args:
      op: the op's name.
      **arrays: (array, the dtypes it may have, its axes): "T H D" has three, "blocks 64" two of which one is fixed, and
        "... K" one or more. Arrays of NumPy count as what JAX makes of them: float64 as float32, int64 as int32.
    """
    for name, (array, dtypes, axes) in arrays.items():
        if not hasattr(array, "dtype") or not hasattr(array, "shape"):
            raise ValueError(f"{op} needs {name} as an array, {_words(dtypes, axes)}, not {_kind(array)}")
        dtype = str(array.dtype)
        if dtype in ("float64", "int64", "uint64"):
            dtype = str(jax.dtypes.canonicalize_dtype(array.dtype))
        if dtype not in dtypes or not _fits(array.shape, axes.split()):
            raise ValueError(f"{op} needs {name} {_words(dtypes, axes)}, not {dtype} of shape {tuple(array.shape)}")


def check_axes(op: str, **arrays: tuple[jax.Array, str]) -> None:
    """As `check`, of the rank and fixed sizes alone."""
    for name, (array, axes) in arrays.items():
        if not _fits(array.shape, axes.split()):
            raise ValueError(f"{op} needs {name} [{', '.join(axes.split())}], not of shape {tuple(array.shape)}")


def check_size(op: str, least: int = 1, **numbers: Any) -> None:
    """Raises ValueError for a number that is not a Python int (shapes depend on it) or less than `least`."""
    for name, number in numbers.items():
        if not hasattr(number, "__index__") or isinstance(number, bool) or isinstance(number, jax.Array):
            raise ValueError(f"{op} needs {name} as an int, which is known when the op is traced, not {_kind(number)}")
        if number < least:
            raise ValueError(f"{op} needs {name} >= {least}, not {number}")


def check_layer(op: str, layer: Any, layers: int) -> None:
    """Raises ValueError for a layer that is neither an int within a cache of so many nor a whole number in an array."""
    if hasattr(layer, "dtype"):
        if not jax.numpy.issubdtype(layer.dtype, jax.numpy.integer) or layer.size != 1:
            raise ValueError(f"{op} needs layer as an int or an int32 array of one, not {layer.dtype} of {layer.shape}")
        return
    check_size(op, 0, layer=layer)
    if layer >= layers:
        raise ValueError(f"{op}: layer {layer} is not in a cache of {layers} layers")


def _fits(shape: tuple[int, ...], axes: list[str]) -> bool:
    if axes and axes[0] == "...":
        axes = axes[1:]
        shape = shape[max(0, len(shape) - len(axes)) :]
    sizes = zip(axes, shape, strict=False)
    return len(shape) == len(axes) and all(size == int(axis) for axis, size in sizes if axis.isdigit())


def _words(dtypes: tuple[str, ...], axes: str) -> str:
    kinds = [dtype for dtype in dtypes if dtype not in FLOATS] if set(FLOATS) <= set(dtypes) else list(dtypes)
    kinds = ["float", *kinds] if len(kinds) < len(dtypes) else kinds
    return f"{' or '.join(kinds)} [{', '.join(axes.split())}]"


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"[:80]
