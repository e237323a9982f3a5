"""The choice of a backend: a named one runs or raises, only "auto" chooses."""

BACKENDS = ("auto", "reference", "interpret", "mosaic_gpu")


def resolve(backend: str, op: str, available: tuple[str, ...] = ("reference",)) -> str:
    """The backend that `op` shall run on.

    Args:
      backend: one of `BACKENDS`.
      op: the op's name, for the error.
      available: what the op has, best first; the last is what "auto" falls back to.

    Raises:
      ValueError: no such backend, or the op does not have it.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return available[0]
    if backend not in available:
        raise ValueError(f"{op} has no {backend!r} backend; it has {', '.join(available)} (or use 'auto')")
    return backend
