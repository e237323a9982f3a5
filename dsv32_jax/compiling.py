"""Programs that are compiled ahead."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

__all__ = ["all_at_once"]


def all_at_once[Program](jobs: Iterable[Callable[[], Program]]) -> list[Program]:
    """What each job compiles, in their order, several at a time.

    Tracing and lowering hold Python's lock, and XLA does not. JAX finds what was compiled so again when the same is
    compiled or called once more.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: job(), jobs))
