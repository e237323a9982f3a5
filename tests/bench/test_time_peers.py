"""That the script for published kernels names each row that a shape stands beside; none of them is here to be run."""

import sys
from unittest.mock import MagicMock

import pytest

from dsv32_jax.experiments.bench import time_peers
from dsv32_jax.experiments.bench.roofline import TORCH
from dsv32_jax.experiments.bench.targets import PEERS, PeerRow

MODULES = ("torch", "torch.nn.attention", "deep_gemm", "deep_gemm.utils", "flash_mla", "flashinfer")


def test_every_row_that_a_shape_wants_is_made(monkeypatch):
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, MagicMock())
    calls = [call for library in time_peers.LIBRARIES.values() for call in library()]
    made = [PeerRow(call.peer, call.op, call.shape) for call in calls]
    wanted = {row for alternatives in PEERS.values() for rows in alternatives for row in rows}
    assert wanted | set(TORCH.values()) <= set(made)
    assert len(made) == len(set(made))


def test_an_unknown_library(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["time_peers", "--only", "torch,cutlass"])
    with pytest.raises(SystemExit):
        time_peers.main()
    assert "--only cutlass: unknown" in capsys.readouterr().err
