"""What is made of profiles."""

import jax
import jax.numpy as jnp
import pytest

from dsv32_jax.experiments.workbench import profile
from dsv32_jax.experiments.workbench.profile import Event, times_by


def kernel(start, us):
    return {"name": "k", "stream": "s", "start_us": start, "us": us}


def test_overlap():
    kernels = [kernel(0, 10), kernel(4, 2), kernel(8, 6), kernel(20, 5)]
    assert profile.overlap(kernels) == {"whole_us": 25, "busy_us": 19, "overlapping_us": 4}
    assert profile.overlap([]) == {"whole_us": 0, "busy_us": 0, "overlapping_us": 0}


def test_kernels_one_after_another_do_not_overlap():
    assert profile.overlap([kernel(0, 3), kernel(3, 2)])["overlapping_us"] == 0


def test_kernels_are_added_up_by_name():
    several = [kernel(0, 3) | {"name": "a"}, kernel(3, 9) | {"name": "b"}, kernel(12, 5) | {"name": "a"}]
    assert profile.by_name(several, calls=2) == [
        {"name": "b", "times": 0.5, "us": 4.5, "longest_us": 9},
        {"name": "a", "times": 1.0, "us": 4.0, "longest_us": 5},
    ]


def event(name, start, end, line="s"):
    return Event(name, "jit_f", line, start, end, name)


def by_event_name(events, waits=(), window=None):
    return times_by(events, lambda each: each.name, lambda each: each.name in waits, window)


def test_an_operation_inside_another_of_its_line_counts_once():
    took, idle = by_event_name([event("loop", 0, 10), event("a", 2, 5), event("b", 5, 6), event("c", 3, 4)])
    assert (took, idle) == ({"loop": 6, "a": 2, "b": 1, "c": 1}, 0)


def test_lines_share_the_time_in_which_they_run_at_once():
    took, idle = by_event_name([event("a", 0, 6), event("b", 4, 10, "t"), event("c", 12, 13)])
    assert (took, idle) == ({"a": 5, "b": 5, "c": 1}, 2)


def test_a_loop_counts_only_where_nothing_runs_that_it_waits_for():
    took, idle = by_event_name([event("loop", 0, 10), event("a", 1, 4, "t"), event("b", 6, 10, "u")], waits=("loop",))
    assert (took, idle) == ({"loop": 3, "a": 3, "b": 4}, 0)


def test_the_window_is_parts_and_idle_time():
    events = [event("a", -5, 3), event("b", 8, 9), event("c", 8.5, 30, "t"), event("a", 40, 41)]
    took, idle = by_event_name(events, window=(0, 20))
    assert took == {"a": 3, "b": 0.75, "c": 11.25}
    assert sum(took.values()) + idle == 20
    assert by_event_name([], window=(2, 5)) == ({}, 3)


class FakeEvent:
    def __init__(self, name, start_ns, duration_ns, **stats):
        self.name, self.start_ns, self.duration_ns, self.stats = name, start_ns, duration_ns, stats.items()


class Named:
    def __init__(self, name, items):
        self.name, self.lines, self.events, self.planes = name, items, items, items


def test_kernels_of_a_gpu_have_the_names_of_their_operations():
    kernel = FakeEvent("loop_add_fusion_2", 5, 10, hlo_op="loop_add_fusion.2", hlo_module="jit_f")
    replayed = FakeEvent("sm90_gemm", 20, 10)
    planes = [
        Named("/host:CPU", [Named("t", [FakeEvent("add.1", 0, 9, hlo_op="add.1", hlo_module="jit_f")])]),
        Named("/device:GPU:0", [Named("Stream #7", [kernel, replayed]), Named("XLA Ops", [kernel])]),
    ]
    first, second = profile.events_of(Named("data", planes))
    assert first == Event("loop_add_fusion.2", "jit_f", "Stream #7", 5, 15, "loop_add_fusion_2")
    assert second == Event("sm90_gemm", "", "Stream #7", 20, 30, "sm90_gemm")
    assert [kernel["start_us"] for kernel in profile.kernels_of([second, first])] == [0, 0.015]


@pytest.mark.parametrize(
    ("start", "duration", "window"),
    [(0, 100, (0, 100)), (12, 83, (10, 95)), (12, 20, (10, 90)), (5000, 100, (10, 90)), (None, 0, (10, 90))],
)
def test_the_calls_last_as_their_annotation_and_all_that_ran(start, duration, window):
    host = [] if start is None else [FakeEvent(profile.WINDOW, start, duration)]
    data = Named("data", [Named("/host:CPU", [Named("python", host)])])
    assert profile.window_of(data, [event("a", 10, 20), event("b", 15, 90)]) == window


def test_an_operation_that_ends_in_another_thread_of_a_cpu_lasts_until_then():
    stats = {"hlo_op": "sort.1", "hlo_module": "jit_f"}
    lines = [
        Named("a", [FakeEvent("Runtime", 0, 99), FakeEvent("sort.1", 1000, 500, **stats, _p=7)]),
        Named("b", [FakeEvent("end: sort.1", 8000, 100, _c=7)]),
    ]
    took, idle = by_event_name(profile.events_of(Named("data", [Named("/host:CPU", lines)])))
    assert (took, idle) == ({"sort.1": 7100}, 0)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU has other names")
def test_calls_are_recorded_with_the_names_of_their_operations():
    product = jax.jit(lambda x: jnp.sort(x @ x))
    x = jnp.ones((100, 100))
    names = set(product.lower(x).compile().as_text().split())
    recorded = profile.record(lambda: product(x), calls=3)
    assert recorded.calls == 3 and recorded.events
    for each in recorded.events:
        assert f"%{each.name}" in names or each.name in names
        assert each.program.startswith("jit_") and recorded.start < each.start < each.end < recorded.end
