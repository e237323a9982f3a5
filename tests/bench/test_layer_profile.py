"""What is made of a profile of the layer and of ncu's counters."""

import pytest

from experiments.bench import layer_profile


def kernel(start, us):
    return {"name": "k", "stream": "s", "start_us": start, "us": us}


def test_overlap():
    kernels = [kernel(0, 10), kernel(4, 2), kernel(8, 6), kernel(20, 5)]
    assert layer_profile.overlap(kernels) == {"whole_us": 25, "busy_us": 19, "overlapping_us": 4}
    assert layer_profile.overlap([]) == {"whole_us": 0, "busy_us": 0, "overlapping_us": 0}


def test_kernels_one_after_another_do_not_overlap():
    assert layer_profile.overlap([kernel(0, 3), kernel(3, 2)])["overlapping_us"] == 0


NAMES = '"ID","Kernel Name",' + ",".join(
    f'"{name}"' for name in (layer_profile.MEMORY, layer_profile.DURATION, layer_profile.TENSOR)
)
CSV = f"""==PROF== Connected
{NAMES}
"","","%","us","%"
"0","a","10.0","1,000.0","50.0"
"1","b","50.0","3,000.0","10.0"
"""


def test_counters_are_weighted_by_time():
    found = layer_profile.counters_of(CSV)
    assert found["kernels"] == 2
    assert found["seconds"] == pytest.approx(4e-3)
    assert found["matrix_units_busy"] == pytest.approx(0.2)
    assert found["memory_throughput"] == pytest.approx(0.4)


def test_no_counters():
    assert layer_profile.counters_of("==ERROR== no permission") is None
