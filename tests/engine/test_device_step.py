"""The flat array in which the host describes a step."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dsv32_jax.engine.device_step import Shape

numbers = st.integers(1, 300)


@given(numbers, numbers, numbers, numbers)
def test_the_parts_share_nothing_and_kernels_can_take_each_where_it_lies(tokens, width, sequences, rows):
    shape = Shape(tokens, width, sequences, rows)
    flat = np.zeros(shape.size, np.int32)
    parts = shape.parts(flat)
    assert all(part.base is flat and (part.ctypes.data - flat.ctypes.data) % 256 == 0 for part in parts.values())
    for part in parts.values():
        part += 1
    assert flat.max() == 1 and sum(part.size for part in parts.values()) == flat.sum()
