"""Which part of every array a device has, and the tests that need several devices in a process of their own."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from dsv32_jax.config import ModelConfig
from dsv32_jax.errors import UserError
from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.mesh import MeshShape
from dsv32_jax.model.model import Options, abstract_model, step
from dsv32_jax.model.moe import MoE
from dsv32_jax.model.numerics import Numerics
from dsv32_jax.model.params import Init, path_name
from dsv32_jax.model.parts import MODEL_PARTS
from dsv32_jax.model.seams import Seams
from dsv32_jax.model.sequence import Run
from dsv32_jax.model.sharding import bytes_per_device, specs_of
from pallas_kernels import moe_dispatch
from tests.harness import EXACT, Piece, flat_batch, load_golden, tables_of

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_several_devices(which):
    """`pytest tests/mesh`, which says what failed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    command = [sys.executable, "-m", "pytest", "tests/mesh", "-q", "-x", "-m", which, "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout


@pytest.mark.parametrize(
    ("text", "mesh", "axes"),
    [
        ("ep=8", MeshShape(8), ("ep",)),
        ("host=2,ep=8", MeshShape(8, 2), ("host", "ep")),
        (" ep=4, host=1 ", MeshShape(4), ("ep",)),
    ],
)
def test_a_mesh_has_a_text(text, mesh, axes):
    assert MeshShape.parse(text) == mesh
    assert mesh.axes == axes
    assert MeshShape.parse(str(mesh)) == mesh


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8", "mesh '8': '8' is no axis; give ep=8, or host=2,ep=8"),
        ("tp=8", "mesh 'tp=8': 'tp=8' is no axis"),
        ("ep=8,ep=4", "'ep=4' is no axis"),
        ("ep=", "'ep=' is no axis"),
        ("host=2", "mesh 'host=2': lacks ep"),
        ("ep=0", "mesh: ep: 0; must be at least 1"),
    ],
)
def test_another_text_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        MeshShape.parse(text)


def test_other_values_are_refused():
    with pytest.raises(UserError, match="exchange 'ring' is unknown; it is one of auto, gather, dispatch"):
        MeshShape(8, exchange="ring")
    with pytest.raises(UserError, match="mesh: 'ep=8'; must be a MeshShape"):
        Options(mesh="ep=8")
    with pytest.raises(UserError, match="mesh ep=2: the form for whole sequences runs on one device"):
        Run.of(Options(mesh=MeshShape(2)))
    with pytest.raises(UserError, match=f"mesh ep=64: needs 64 devices, and JAX has {jax.device_count()}"):
        MeshShape(64).on_devices()


def test_only_experts_are_in_parts():
    """Values and scales of the stacked experts, of MTP too."""
    model = abstract_model(ModelConfig.tiny(num_nextn_predict_layers=1))
    mesh = MeshShape(4)
    specs = jax.tree_util.tree_leaves_with_path(specs_of(model, mesh))
    parts = {path_name(path) for path, spec in specs if spec == jax.sharding.PartitionSpec(("ep",))}
    assert parts == {
        f"{layer}.ffn.experts.{name}.{array}"
        for layer in ("layers.1", "mtp.layer")
        for name in ("gate", "up", "down")
        for array in ("values", "scales")
    }
    assert {spec for path, spec in specs if path_name(path) not in parts} == {jax.sharding.PartitionSpec()}
    whole, experts = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for tree in (model, (model.layers[1].ffn.experts, model.mtp.layer.ffn.experts))
    )
    assert bytes_per_device(model, mesh) == whole - experts * 3 // 4


def test_blocks_and_tokens_are_in_parts():
    model, mesh = load_golden("tiny128_fp8"), MeshShape(4, 2)
    cache = KVCache.shapes(model.config, 16, "float32", fp8_index=False)
    part = jax.sharding.PartitionSpec(None, ("host", "ep"))
    assert jax.tree.leaves(specs_of(cache, mesh)) == [part, part]
    assert bytes_per_device(cache, mesh) * 8 == sum(leaf.size * 4 for leaf in jax.tree.leaves(cache))
    with pytest.raises(UserError, match=r"mesh ep=3: KVCache\.kv has 16 in axis 1; must be a multiple of 3 devices"):
        specs_of(cache, MeshShape(3))
    with pytest.raises(UserError, match=r"layers\.1\.ffn\.experts\.down\.values has 8 in axis 0; must be a multiple"):
        specs_of(model, MeshShape(3))


def test_tiles_are_for_a_devices_share_of_the_choices():
    """With all choices a plan for 32 of 256 experts would have tiles of 128 rows where 32 an expert are expected."""
    tiles = []

    def make_plan(experts, valid, num_experts, tile, backend):
        tiles.append(tile)
        return moe_dispatch.make_plan(experts, valid, num_experts, tile, backend=backend)

    config = ModelConfig.full_width(4, n_routed_experts=32)
    moe = jax.eval_shape(lambda: MoE(config, Init(config, nnx.Rngs(0))))
    numerics = Numerics(True, "ue8m0", "mosaic_gpu", Seams(MODEL_PARTS.with_parts({"make_plan": make_plan})))
    x, choices = jax.ShapeDtypeStruct((1024, 7168), "bfloat16"), jax.ShapeDtypeStruct((1024, 8), "int32")
    weights, present = jax.ShapeDtypeStruct((1024, 8), "float32"), jax.ShapeDtypeStruct((1024,), bool)
    for devices in (8, 1):
        jax.eval_shape(lambda *arrays, n=devices: moe.routed(*arrays, numerics, n), x, choices, weights, present)
    assert tiles == [64, 128]


def test_without_a_mesh_nothing_is_added():
    """The lowered step is that of the model called as it is; with a mesh of one device it is another."""
    model = load_golden("tiny128_fp8")
    batch = flat_batch([Piece(np.arange(2, 18))], tables_of(1, 1))
    cache = KVCache.create(model.config, 1, EXACT)
    plain = jax.jit(lambda model, batch, cache: model(batch, cache, EXACT), donate_argnums=2)
    text = step.lower(model, batch, cache, EXACT).as_text()
    assert text == plain.lower(model, batch, cache).as_text().replace("@jit__lambda", "@jit_step")
    assert not any(name in text for name in ("shard", "manual", "all_gather"))
    over_one = step.lower(model, batch, cache, dataclasses.replace(EXACT, mesh=MeshShape(1))).as_text()
    assert "all_gather" in over_one
