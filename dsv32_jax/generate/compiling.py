"""Programs that are compiled ahead."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from dsv32_jax.common.progress import progress_bar

__all__ = ["THREADS", "all_at_once"]

THREADS = "dsv32-compile"
"""How the names of the threads begin that compile."""


def all_at_once[Program](jobs: Iterable[Callable[[], Program]]) -> list[Program]:
    """What each job compiles, in their order, several at a time.

    Tracing and lowering hold Python's lock, and XLA does not. JAX finds what was compiled so again when the same is
    compiled or called once more. An interrupt, or the first job that fails, ends the call at once; what XLA is at
    cannot be stopped and ends in its threads.
    """
    pending = list(jobs)
    pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix=THREADS)
    try:
        with progress_bar("compiling", len(pending), "programs") as advance:
            futures = [pool.submit(job) for job in pending]
            for future in futures:
                future.add_done_callback(lambda _: advance(1))
            return [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
