"""Wrong input to the command line, in process: one line, and exit code 2."""

import json
import shutil

import numpy as np
import pytest

from dsv32_jax.generate import loading, memory
from tests.cli.shards import read_shard, write_shard
from tests.harness import golden_directory


def swap_shape(tensors):
    dtype, shape, data = tensors["model.layers.0.mlp.gate_proj.weight"]
    tensors["model.layers.0.mlp.gate_proj.weight"] = (dtype, shape[::-1], data)


def unknown_dtype(tensors):
    _, shape, data = tensors["model.norm.weight"]
    tensors["model.norm.weight"] = ("I32", shape, data)


def unknown_tensor(tensors):
    tensors["model.layers.0.mlp.gate_proj.bias"] = ("F32", [1], b"\0\0\0\0")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (swap_shape, "model.layers.0.mlp.gate_proj.weight"),
        (unknown_dtype, "model.norm.weight"),
        (unknown_tensor, "model.layers.0.mlp.gate_proj.bias"),
    ],
)
def test_wrong_tensor(refused, tiny, tmp_path, change, named):
    model = shutil.copytree(tiny, tmp_path / "model")
    tensors = read_shard(model / "model.safetensors")
    change(tensors)
    write_shard(model / "model.safetensors", tensors)
    assert named in refused("generate", "--model", model, "--prompt", "a")


@pytest.fixture
def sharded(tmp_path):
    return shutil.copytree(golden_directory("tiny128_fp8") / "model", tmp_path / "model")


SHARD = "model-00002-of-00002.safetensors"


def test_missing_shard(refused, sharded):
    (sharded / SHARD).unlink()
    assert SHARD in refused("info", "--model", sharded / SHARD)
    assert SHARD in refused("generate", "--model", sharded, "--prompt", "a")


def test_truncated_shard(refused, sharded):
    path = sharded / SHARD
    path.write_bytes(path.read_bytes()[:-100])
    assert SHARD in refused("generate", "--model", sharded, "--prompt", "a")
    path.write_bytes(path.read_bytes()[:5])
    assert SHARD in refused("generate", "--model", sharded, "--prompt", "a")


def test_missing_scale(refused, sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    name = next(name for name in index["weight_map"] if name.endswith("_scale_inv"))
    path = sharded / index["weight_map"].pop(name)
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = read_shard(path)
    del tensors[name]
    write_shard(path, tensors)
    assert name in refused("generate", "--model", sharded, "--prompt", "a")


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"hidden_size": "wide"}, "hidden_size"), ({"index_top_k": 4}, "index_topk"), ({"n_group": 3}, "n_group")],
)
def test_bad_config_field(refused, tiny, tmp_path, changes, named):
    model = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(config))
    assert named in refused("generate", "--model", model, "--prompt", "a")
    assert named in refused("info", "--model", model)


def test_wrong_prompts(refused, tiny, tmp_path):
    run = ("generate", "--model", tiny)
    assert "empty" in refused(*run, "--prompt", "")
    assert "give one of them" in refused(*run)
    assert "max_position_embeddings = 256" in refused(*run, "--prompt", "ship " * 300)
    assert "max_position_embeddings = 256" in refused(*run, "--prompt", "ship", "--max-new-tokens", 256)
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert "latin.txt: not UTF-8" in refused(*run, "--prompt-file", tmp_path / "latin.txt")
    assert "latin.txt: not UTF-8" in refused("score", "--model", tiny, "--text-file", tmp_path / "latin.txt")
    (tmp_path / "empty.txt").touch()
    assert "empty.txt: empty" in refused(*run, "--prompt-file", tmp_path / "empty.txt")
    assert "absent.txt" in refused(*run, "--prompt-file", tmp_path / "absent.txt")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([[1, 512]], np.int32), "token 512 is not in 0..511"),
        (np.array([[1, -1, 2]], np.int32), "-1 in the middle"),
        (np.array([[-1, -1]], np.int32), "empty"),
        (np.array([[1, 2]]), "is int64 [1, 2]; must be int32 [B, T]"),
        (np.array([1, 2], np.int32), "is int32 [2]; must be int32 [B, T]"),
        (np.zeros((0, 4), np.int32), "none given"),
        (np.zeros((1, 300), np.int32), "max_position_embeddings = 256"),
    ],
)
def test_wrong_token_files(refused, tiny, tmp_path, ids, message):
    np.save(tmp_path / "ids.npy", ids)
    for verb in ("generate", "score"):
        assert message in refused(verb, "--model", tiny, "--token-ids", tmp_path / "ids.npy")


def test_a_token_file_that_is_none(refused, tiny, tmp_path):
    (tmp_path / "ids.npy").write_text("1 2 3")
    assert "ids.npy: not an .npy file" in refused("score", "--model", tiny, "--token-ids", tmp_path / "ids.npy")
    assert "no.npy: cannot be read" in refused("score", "--model", tiny, "--token-ids", tmp_path / "no.npy")


def test_unwritable_target_shows_before_the_model_is_loaded(refused, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    run = ("generate", "--model", tiny, "--prompt", "a", "--save-tokens")
    assert "--save-tokens" in refused(*run, tmp_path / "file" / "out.npy")
    assert "--save-tokens" in refused(*run, tmp_path / "absent" / "out.npy")
    assert "is a directory" in refused(*run, tmp_path)
    np.save(tmp_path / "ids.npy", np.ones((1, 3), np.int32))
    options = ("--token-ids", tmp_path / "ids.npy", "--save-logits", tmp_path / "file" / "out.npy")
    assert "--save-logits" in refused("score", "--model", tiny, *options)


def test_a_failed_run_leaves_the_old_file(refused, tiny, tmp_path):
    (tmp_path / "out.npy").write_text("old")
    refused("generate", "--model", tiny, "--prompt", "ship " * 300, "--save-tokens", tmp_path / "out.npy")
    assert (tmp_path / "out.npy").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.npy"]


def test_wrong_flags(refused, tiny, tmp_path):
    run = ("generate", "--model", tiny, "--prompt", "a")
    assert "compute_dtype 'float8'" in refused(*run, "--compute-dtype", "float8")
    assert "attention 'full'" in refused(*run, "--attention", "full")
    assert "backend 'cuda'" in refused(*run, "--backend", "cuda")
    assert "--backend rope=reference: rope has no kernel" in refused(*run, "--backend", "rope=reference")
    both = ("--part", "experts=ragged", "--backend", "experts=reference")
    assert "--backend experts=...: --part replaces experts as well" in refused(*run, *both)
    assert "the kernel of index_select does not" in refused(*run, "--backend", "index_select=mosaic_gpu")
    assert "the kernel of cache_write does not take kv_a of shape" in refused(*run, "--backend", "mosaic_gpu")
    assert "index_topk" in refused(*run, "--index-topk", 0)
    assert "temperature" in refused(*run, "--temperature", -1)
    assert "--to" in refused("convert", tiny, tmp_path / "out", "--to", "gguf")
    assert "presets are" in refused("info", "--config", "70b")


def test_wrong_models(refused, tmp_path, monkeypatch):
    assert "no such directory" in refused("generate", "--model", tmp_path / "absent", "--prompt", "a")
    assert "no config.json" in refused("generate", "--model", tmp_path, "--prompt", "a")
    monkeypatch.setattr(loading, "DEMO", tmp_path / "absent")
    assert "install it again" in refused("generate", "--prompt", "a")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "hf download nobody/nothing --local-dir DIR" in refused(
        "generate", "--model", "nobody/nothing", "--prompt", "a"
    )


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(refused, tiny, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: (1000, "host memory"))
    assert "host memory has 1.0 kB free" in refused("generate", "--model", tiny, "--prompt", "a")


@pytest.mark.parametrize("verb", ["info", "convert", "quantize", "fidelity", "score"])
def test_a_config_of_another_model_is_refused_at_every_door(refused, tiny, tmp_path, verb):
    model = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"indexer_rope_interleave": True}))
    np.save(tmp_path / "ids.npy", np.zeros((1, 4), np.int32))
    arguments = {
        "info": ("--model", model),
        "convert": (model, tmp_path / "out"),
        "quantize": ("--model", model, "--scheme", "int8", "--out", tmp_path / "out"),
        "fidelity": (model, model, "--token-ids", tmp_path / "ids.npy"),
        "score": ("--model", model, "--token-ids", tmp_path / "ids.npy"),
    }[verb]
    assert "indexer_rope_interleave is true; it must be false or absent" in refused(verb, *arguments)
    assert not (tmp_path / "out").exists()
