"""The ceilings and the time that they allow."""

import pytest

from dsv32_jax.experiments.bench import roofline
from dsv32_jax.experiments.bench.peers import Peers
from dsv32_jax.experiments.bench.timer import WallTimer

CEILINGS = {"copy": 4e12, "bf16": 800e12, "fp8": 1600e12}


def test_the_longer_of_computing_and_moving_bounds():
    seconds, by = roofline.bound({"bf16": 8 * 10**12}, 4 * 10**9, CEILINGS)
    assert (seconds, by) == (pytest.approx(10e-3), "compute")
    seconds, by = roofline.bound({"bf16": 8 * 10**9}, 4 * 10**9, CEILINGS)
    assert (seconds, by) == (pytest.approx(1e-3), "memory")
    assert roofline.bound({}, 8 * 10**9, CEILINGS) == (pytest.approx(2e-3), "memory")


def test_products_of_both_kinds_share_the_tensor_cores():
    seconds, _ = roofline.bound({"bf16": 8 * 10**12, "fp8": 16 * 10**12}, 0, CEILINGS)
    assert seconds == pytest.approx(20e-3)


def test_no_bound_without_the_ceiling_that_it_needs():
    assert roofline.bound({"fp8": 1}, 1, {**CEILINGS, "fp8": None}) is None
    assert roofline.bound({"bf16": 1}, 1, {**CEILINGS, "fp8": None}) is not None
    assert roofline.bound({}, 1, {"copy": None, "bf16": 1.0}) is None


def test_measured_ceilings():
    found = roofline.measure(WallTimer(), Peers(), tiny=True)
    methods = found["methods"]
    assert set(methods["copy"]) == {"copy", "x + 1"}
    assert found["ceilings"]["copy"] == max(entry["rate"] for entry in methods["copy"].values())
    assert found["ceilings"]["bf16"] == pytest.approx(2 * 256**3 / methods["bf16"]["matmul"]["seconds"])
    assert found["timer_check"] == {}  # small products are not what PyTorch timed


def test_a_cpu_has_products_in_float32_and_may_count_what_is_read():
    measured = roofline.measure(WallTimer(), Peers(), kinds=("copy", "float32"), side=64, size=2**16, reads=True)
    methods = measured["methods"]
    assert set(methods) == {"copy", "float32"} and set(methods["copy"]) == {"copy", "x + 1", "sum"}
    assert measured["ceilings"]["float32"] == pytest.approx(2 * 64**3 / methods["float32"]["matmul"]["seconds"])
    assert measured["ceilings"]["copy"] == max(entry["rate"] for entry in methods["copy"].values())
    assert methods["copy"]["sum"]["rate"] == pytest.approx(2**16 / methods["copy"]["sum"]["seconds"])


def test_pytorchs_copy_counts_and_checks_the_timer(monkeypatch):
    """The largest rate of any method is the ceiling; the same library call in both timers is their comparison."""
    monkeypatch.setattr(roofline.timing, "seconds", lambda timer, run, repetitions=20: [2e-3])
    monkeypatch.setattr(roofline.jax.random, "bits", lambda *_: roofline.jnp.zeros(8))
    monkeypatch.setattr(roofline.jax.random, "normal", lambda *_: roofline.jnp.zeros((8, 8), roofline.jnp.bfloat16))
    rows = {roofline.TORCH["copy"]: 1e-3, roofline.TORCH["bf16"]: 4e-3}
    found = roofline.measure(WallTimer(), Peers(rows))
    assert found["ceilings"]["copy"] == pytest.approx(2 * 2**31 / 1e-3)
    assert found["ceilings"]["bf16"] == pytest.approx(2 * 8192**3 / 2e-3)
    assert {name: entry["ratio"] for name, entry in found["timer_check"].items()} == {
        "copy (copy)": pytest.approx(2.0),
        "bf16 (matmul)": pytest.approx(0.5),
    }
