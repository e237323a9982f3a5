"""The shared list of shapes: names, and the keys by which it is joined with other libraries' times."""

import dataclasses

import pytest

from dsv32_jax.experiments.bench import run
from dsv32_jax.experiments.bench.shapes import SHAPES, SMALL, TINY
from dsv32_jax.experiments.bench.targets import PEERS, TARGETS, PeerRow, peers_of, target_of

ALL = [(op, shape) for grid in (SHAPES, TINY, SMALL) for op in grid for shape in grid[op]]


def test_names_are_unique_and_ops_are_their_own():
    for grid in (SHAPES, TINY, SMALL):
        for op, shapes in grid.items():
            assert {shape.op for shape in shapes} == {op}
            assert len({shape.name for shape in shapes}) == len(shapes)


def test_dims_are_sizes_alone():
    shape = SHAPES["top_k"][0]
    assert shape.dims() == {"tokens": 1, "context": 131072, "chosen": 2048}


def test_a_shape_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SHAPES["top_k"][0].tokens = 2


def test_peer_keys_are_those_of_the_peers_script():
    """Written out, because the script that makes the rows is not in this repository."""
    rows = {row for alternatives in PEERS.values() for rows in alternatives for row in rows}
    assert PeerRow("FlashMLA", "sparse_mla prefill bf16", "T=4096 L=65536 K=2048 H=128") in rows
    assert PeerRow("FlashMLA", "sparse_mla decode fp8 cache", "T=128 L=32768 K=2048 H=128") in rows
    assert PeerRow("DeepGEMM", "indexer_logits fp8 prefill", "T=4096 L=131072 heads=64") in rows
    assert PeerRow("DeepGEMM", "indexer_logits fp8 paged", "T=64 L=32768 heads=64") in rows
    assert PeerRow("FlashInfer", "topk 2048", "T=1024 L=32768") in rows
    assert PeerRow("torch", "topk 2048", "T=1 L=131072") in rows
    assert PeerRow("DeepGEMM", "quant_matmul fp8_block", "M=128 N=7168 K=16384") in rows
    assert PeerRow("DeepGEMM", "grouped_matmul fp8_block", "E=64 M=65536 N=4096 K=7168") in rows
    assert PeerRow("DeepGEMM", "grouped_matmul fp8_block", "E=256 M=32768 N=7168 K=2048") in rows
    assert PeerRow("DeepGEMM", "grouped_matmul bf16", "E=64 M=65536 N=4096 K=7168") in rows
    assert PeerRow("DeepGEMM", "grouped_matmul fp8 masked", "E=256 used=160 rows=1 N=4096 K=7168") in rows


def test_floors_are_under_goals():
    for _, shape in ALL:
        if (target := target_of(shape)) is not None:
            assert 0 < target.floor < target.goal and target.of in ("peer", "reference", "roofline")
            assert target.of != "peer" or peers_of(shape)


def test_targets_and_peers_are_of_shapes_that_are_measured():
    measured = {(op, shape.name) for op, shapes in SHAPES.items() for shape in shapes}
    assert set(TARGETS) <= measured and set(PEERS) <= measured


@pytest.mark.parametrize("shape", [shape for _, shape in ALL], ids=[f"{op}-{shape.name}" for op, shape in ALL])
def test_every_shape_has_a_config(shape):
    """Of the kernels that have one to choose."""
    chosen = run.module_of(shape).config(shape)
    assert bool(chosen) == (shape.kernel and shape.op != "quantize" and getattr(shape, "step", "plan") == "plan")
