"""Seconds of a call on the device: cold L2, launch hidden, bursts.

`StampTimer` does what CUDA events around a call do in PyTorch: it queues a read of 256 MB (so that L2 holds nothing of
the call's, nor anything that would have to be written back while the call runs), a kernel that spins while the host
launches what follows, a kernel that reads the device's clock, the call, and a second such kernel. Gaps between the
call's own kernels count; the host's work does not, unless the call waits for the device in the middle. JAX runs what
one thread dispatches to a device in order.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

FLUSH_BYTES = 256 * 2**20
FLUSH = "read"
"""How L2 is emptied. A write would leave it full of lines that the measured call pays for: up to 50 MB of writes."""
LEAST_SPIN, MOST_SPIN = 1_000_000, 20_000_000
"""Nanoseconds for which the device waits before a call."""
BURST_SECONDS = 0.06
"""Device time of all repetitions together: sustained load meets the power limit, which a single call does not."""
FEWEST = 3
"""Repetitions of a call so long that `BURST_SECONDS` would allow fewer."""


class Timer(Protocol):
    """Measures calls whose results are JAX arrays."""

    name: str

    def once(self, run: Callable[[], Any], spin: int) -> float:
        """Seconds of one call; `spin` are the nanoseconds that its launch may take unseen."""
        ...


class WallTimer:
    """The host's clock around a call and the wait for its result: for machines without the kernels' GPU."""

    name = "host clock"

    def once(self, run: Callable[[], Any], spin: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - start


class QueueTimer:
    """The host's clock over several flushes and calls, less that over the flushes alone; where stamps do not work."""

    name = "host clock over queued calls, L2 emptied by reading, the flushes' own time subtracted"

    def __init__(self, calls: int = 5) -> None:
        self.calls = calls
        self.flush = flusher()

    def once(self, run: Callable[[], Any], spin: int) -> float:
        both, alone = self._queue(run), self._queue(lambda: None)
        return max(both - alone, 1e-9) / self.calls

    def _queue(self, run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        for _ in range(self.calls):
            last = self.flush(), run()
        jax.block_until_ready(last)
        return time.perf_counter() - start


class StampTimer:
    """The device's nanosecond clock, read before and after a call."""

    name = "device clock, L2 emptied by reading, launch hidden"

    def __init__(self) -> None:
        stamp, spin = clock_kernels()
        self.stamp, self.spin = jax.jit(stamp), jax.jit(spin)
        self.flush = flusher()
        waiting = nanoseconds(MOST_SPIN)
        jax.block_until_ready((self.flush(), self.spin(waiting), self.stamp()))
        start = time.perf_counter()
        jax.block_until_ready(self.spin(waiting))
        host = time.perf_counter() - start
        device = self.once(lambda: self.spin(waiting), LEAST_SPIN)
        if not all(0.95 < seconds / (MOST_SPIN * 1e-9) < 1.5 for seconds in (host, device)):
            raise RuntimeError(f"a wait of {MOST_SPIN} ns took {host} s by the host's clock and {device} s by stamps")

    def once(self, run: Callable[[], Any], spin: int) -> float:
        waiting = nanoseconds(spin)  # ready before the rest is queued, so that nothing can overtake
        self.flush()
        self.spin(waiting)
        before = self.stamp()
        out = run()
        after = self.stamp()
        jax.block_until_ready((out, after))
        return (to_nanoseconds(after) - to_nanoseconds(before)) * 1e-9


def device_timer() -> tuple[Timer, str | None]:
    """The best timer for this machine, and why it is not `StampTimer` where a GPU is."""
    if jax.default_backend() != "gpu":
        return WallTimer(), None
    try:
        return StampTimer(), None
    except Exception as error:  # whatever stops two small kernels shall not stop the measurement
        return QueueTimer(), f"{type(error).__name__}: {error}"[:300]


def seconds(timer: Timer, run: Callable[[], Any], repetitions: int = 20) -> list[float]:
    """Device seconds of each repetition of a call.

    Args:
      timer: what measures.
      run: the call; it has been called before, so that nothing is compiled here.
      repetitions: at most so many; fewer if they would be a sustained load, but not under `FEWEST`.
    """
    start = time.perf_counter()
    out = run()
    launch = int((time.perf_counter() - start) * 1e9)
    jax.block_until_ready(out)
    del out
    spin = min(max(LEAST_SPIN, 2 * launch), MOST_SPIN)
    pilot = timer.once(run, spin)
    count = min(repetitions, max(FEWEST, int(BURST_SECONDS / max(pilot, 1e-9))))
    return [timer.once(run, spin) for _ in range(count)]


def summary(times: list[float]) -> dict[str, Any]:
    """Median and spread, as results carry them."""
    ordered = sorted(times)
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else [ordered[0]] * 3
    return {
        "median": statistics.median(ordered),
        "min": ordered[0],
        "max": ordered[-1],
        "quartiles": [quartiles[0], quartiles[2]],
        "repetitions": len(ordered),
    }


def flusher() -> Callable[[], jax.Array]:
    """A call that reads `FLUSH_BYTES`, so that L2 holds nothing else, and writes nothing but a number."""
    resident = jax.block_until_ready(jnp.zeros(FLUSH_BYTES // 4, jnp.int32))
    read = jax.jit(jnp.max)
    return lambda: read(resident)


def nanoseconds(value: int) -> jax.Array:
    """The argument of the spinning kernel, on the device."""
    return jax.block_until_ready(jnp.full(1, value, jnp.int32))


def to_nanoseconds(stamp: jax.Array) -> int:
    """What `stamp` read, as one number."""
    low, high = (int(word) for word in stamp)
    return (high << 32) | low


def clock_kernels() -> tuple[Callable[[], jax.Array], Callable[[jax.Array], jax.Array]]:
    """`stamp() -> uint32 [2]` (low and high word of the device's clock) and `spin(int32 [1])`, one CTA each."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    from pallas_kernels import mosaic
    from pallas_kernels.mosaic import REF, ptx_word, ptx_words, repeat_while, store_global, thread_index, when

    def clock() -> Any:
        return ptx_word("mov.u32 $0, %globaltimer_lo;")

    @plgpu.inline_mgpu(arg_types=(REF,))
    def write_clock(ctx: Any, out: Any) -> None:
        words = ptx_words("{ .reg .b64 now; mov.u64 now, %globaltimer; mov.b64 {$0, $1}, now; }", 2)
        when(thread_index().equals(0), lambda: store_global(mosaic.global_address(out), words))

    @plgpu.inline_mgpu(arg_types=(REF, REF))
    def wait(ctx: Any, duration: Any, out: Any) -> None:
        (until,) = mosaic.load_global(mosaic.global_address(duration))
        start = clock()

        def again(elapsed: Any) -> Any:
            elapsed = clock() - start
            return elapsed < until, elapsed

        (elapsed,) = repeat_while([0], again)
        when(thread_index().equals(0), lambda: store_global(mosaic.global_address(out), [elapsed]))

    def kernel(body: Callable[..., None], words: int) -> Callable[..., jax.Array]:
        return plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct((words,), jnp.uint32),
            grid=(1,),
            grid_names=("cta",),
            num_threads=1,
            thread_name="wg",
            compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        )

    return kernel(lambda out: write_clock(out), 2), kernel(lambda duration, out: wait(duration, out), 1)
