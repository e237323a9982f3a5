"""Slots of positions, on the device and on the host."""

import numpy as np

from pallas_kernels.paging import physical_slots, slots_of


def test_slots_on_the_host_are_those_on_the_device():
    rng = np.random.default_rng(0)
    tables = rng.permutation(24).reshape(4, 6).astype(np.int32)
    tables[1, 3:] = -1  # blocks that the sequence does not have
    sequence = rng.integers(0, 4, 200)
    positions = np.where(rng.random(200) < 0.2, -1, rng.integers(0, 6 * 64, 200))
    found = slots_of(positions, sequence, tables)
    np.testing.assert_array_equal(found, physical_slots(positions[:, None], sequence, tables)[:, 0])
    assert set(found[positions < 0]) == {-1} and (found >= 0).sum() > 100
    assert slots_of(np.array([63, 64]), np.array([0, 0]), tables).tolist() == [
        tables[0, 0] * 64 + 63,
        tables[0, 1] * 64,
    ]
