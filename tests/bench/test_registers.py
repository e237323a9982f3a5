"""Registers and spills of the kernels, as far as no GPU is needed."""

from collections import Counter

import jax
import pytest

from dsv32_jax.experiments.bench import registers
from pallas_kernels.configs import CONFIGS

REPORT = """
ptxas info    : 0 bytes gmem
ptxas info    : Function properties for kernel
    40 bytes stack frame, 96 bytes spill stores, 100 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
ptxas info    : (C7519) warpgroup.arrive is injected
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 44 registers, used 1 barriers
"""


def test_a_report_is_read_kernel_by_kernel():
    first, second = registers.parsed(REPORT)
    assert (first["registers"], first["stack_bytes"], first["spill_store_bytes"]) == (168, 40, 96)
    assert (second["registers"], second["spill_load_bytes"]) == (44, 0)
    assert not first["products_serialised"]
    serialised = registers.parsed(REPORT + "ptxas warning : (C7510) Potential Performance Loss: wgmma is serialized")
    assert serialised[0]["products_serialised"]


def test_every_configuration_is_asked_about():
    found = Counter((op, repr(config)) for op, config, _, _ in registers.programs())
    assert found == Counter((op, repr(config)) for op, configs in CONFIGS.items() for config in configs)


@pytest.mark.parametrize("op", CONFIGS)
def test_what_is_asked_lowers(op):
    """For the first configuration; each op's own tests lower the others."""
    _, _, function, shapes = next(program for program in registers.programs() if program[0] == op)
    text = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
