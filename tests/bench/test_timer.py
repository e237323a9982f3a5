"""The timers, as far as a CPU can tell: lowering, spread, and how many repetitions a burst has."""

import jax
import jax.numpy as jnp
import pytest

from dsv32_jax.experiments.bench import timer as timing


class Fixed:
    """A timer that says what it is told, and remembers the spins that it was asked for."""

    name = "fixed"

    def __init__(self, seconds):
        self.seconds, self.spins = seconds, []

    def once(self, run, spin):
        run()
        self.spins.append(spin)
        return self.seconds


@pytest.mark.parametrize(("seconds", "repetitions"), [(1e-5, 20), (0.01, 6), (0.5, 3)])
def test_a_burst_is_short(seconds, repetitions):
    calls = []
    times = timing.seconds(Fixed(seconds), lambda: calls.append(1), repetitions=20)
    assert times == [seconds] * repetitions
    assert len(calls) == repetitions + 2  # a call for its launch time and a pilot come before


def test_a_slow_launch_gets_a_longer_spin(monkeypatch):
    clock = iter([0.0, 0.004])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    timer = Fixed(1.0)
    timing.seconds(timer, lambda: None)
    assert set(timer.spins) == {8_000_000}


def test_summary():
    assert timing.summary([3.0, 1.0, 2.0, 4.0]) == {
        "median": 2.5,
        "min": 1.0,
        "max": 4.0,
        "quartiles": [1.75, 3.25],
        "repetitions": 4,
    }
    assert timing.summary([2.0])["quartiles"] == [2.0, 2.0]


def test_the_host_clock_waits_for_the_result():
    x = jnp.ones((300, 300))
    product = jax.jit(lambda x: x @ x @ x)
    product(x)
    assert timing.WallTimer().once(lambda: product(x), 0) > 0


def test_queued_calls_subtract_the_flush(monkeypatch):
    monkeypatch.setattr(timing, "flusher", lambda: lambda: jnp.zeros(1))
    clock = iter([0.0, 0.5, 1.0, 1.1])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert timing.QueueTimer(calls=4).once(lambda: None, 0) == pytest.approx(0.1)


def test_a_stamp_is_one_number():
    assert timing.to_nanoseconds(jnp.array([5, 2], jnp.uint32)) == 2 * 2**32 + 5


def test_the_clock_kernels_lower_for_cuda():
    stamp, spin = timing.clock_kernels()
    lowered = jax.jit(stamp).trace().lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
    argument = jax.ShapeDtypeStruct((1,), jnp.int32)
    assert "mosaic_gpu" in jax.jit(spin).trace(argument).lower(lowering_platforms=("cuda",)).as_text()


def test_without_a_gpu_the_host_clock_is_named():
    timer, trouble = timing.device_timer()
    assert (timer.name, trouble) == ("host clock", None)
