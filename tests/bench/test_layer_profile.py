"""What is made of a profile of the layer."""

from dsv32_jax.experiments.bench import layer_profile


def kernel(start, us):
    return {"name": "k", "stream": "s", "start_us": start, "us": us}


def test_overlap():
    kernels = [kernel(0, 10), kernel(4, 2), kernel(8, 6), kernel(20, 5)]
    assert layer_profile.overlap(kernels) == {"whole_us": 25, "busy_us": 19, "overlapping_us": 4}
    assert layer_profile.overlap([]) == {"whole_us": 0, "busy_us": 0, "overlapping_us": 0}


def test_kernels_one_after_another_do_not_overlap():
    assert layer_profile.overlap([kernel(0, 3), kernel(3, 2)])["overlapping_us"] == 0


def test_kernels_are_added_up_by_name():
    several = [kernel(0, 3) | {"name": "a"}, kernel(3, 9) | {"name": "b"}, kernel(12, 5) | {"name": "a"}]
    assert layer_profile.by_name(several, calls=2) == [
        {"name": "b", "times": 0.5, "us": 4.5, "longest_us": 9},
        {"name": "a", "times": 1.0, "us": 4.0, "longest_us": 5},
    ]
