"""Compiles programs ahead, several at a time."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from dsv32_jax.common.progress import progress_bar

__all__ = ["THREADS", "all_at_once"]

THREADS = "dsv32-compile"
"""Prefix of the names of the threads that compile."""


def all_at_once[Program](jobs: Iterable[Callable[[], Program]]) -> list[Program]:
    """Runs jobs that compile programs in several threads, and returns their results in the jobs' order.

    Tracing and lowering hold Python's lock, and XLA does not. JAX caches the programs, so that the same function is not
    compiled again when it is called. An interrupt, or the first job that fails, ends the call at once; compilations
    that XLA has begun cannot be stopped and end in their threads.
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
