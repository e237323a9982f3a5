"""Which backend "auto" takes; that a named one runs or raises is tested with each kernel."""

import re

import jax
import pytest

from dsv32_jax.experiments.results import read_result
from pallas_kernels import backend
from pallas_kernels.backend import KERNEL, MEASURED_WITH, resolve, tell_of_reference, tell_of_version


@pytest.fixture
def hopper(monkeypatch):
    """All of JAX's devices are Hopper GPUs, except the one that a test names."""
    monkeypatch.setattr(backend, "_all_hopper", lambda: True)


def test_auto_takes_the_kernel_on_hopper(hopper):
    assert resolve("auto", "op", KERNEL) == "mosaic_gpu"


def test_auto_takes_the_reference_where_there_is_no_kernel_or_it_does_not_take_the_arguments(hopper, caplog):
    assert resolve("auto", "op") == "reference"
    tell_of_reference.cache_clear()
    for _ in range(2):  # told once
        assert resolve("auto", "op", KERNEL, "7 heads; it takes 16") == "reference"
    assert [record.getMessage() for record in caplog.records] == [
        "op runs without its kernel, which does not take 7 heads; it takes 16"
    ]


def test_kernels_on_another_version_of_jax_say_so_once(hopper, caplog, monkeypatch):
    tell_of_version.cache_clear()
    resolve("auto", "op", KERNEL)
    assert (not caplog.records) == (jax.__version__ in MEASURED_WITH)
    caplog.clear()
    monkeypatch.setattr(jax, "__version__", "0.11.9")
    for op in ("op", "another"):
        assert resolve("auto", op, KERNEL) == "mosaic_gpu"
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(
        f"kernels were tested and measured with JAX {', '.join(MEASURED_WITH)}, and this is 0.11.9"
    )
    monkeypatch.setattr(jax, "__version__", "0.11.10")
    assert resolve("reference", "op", KERNEL) == "reference" and len(caplog.records) == 1


def test_the_versions_are_those_of_the_measurements():
    assert set(re.findall(r"'jax': '([^']*)'", str(read_result("kernels")))) == set(MEASURED_WITH)


@pytest.mark.parametrize("device", [jax.devices("cpu")[0], "cpu"], ids=["device", "platform"])
def test_auto_follows_the_default_device(hopper, device):
    with jax.default_device(device):
        assert resolve("auto", "op", KERNEL) == "reference"


def test_auto_takes_the_reference_on_a_cpu():
    assert resolve("auto", "op", KERNEL) == "reference"
