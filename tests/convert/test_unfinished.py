"""Directories in the making: one writer, and nothing of another run in what is finished."""

import json
import os
import shutil
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax import convert
from dsv32_jax.convert import conversion, quantization
from dsv32_jax.convert.huggingface import HFReader
from dsv32_jax.convert.quantization import quantize_checkpoint, quantize_model
from dsv32_jax.convert.statistics import Statistics
from dsv32_jax.convert.unfinished import JOURNAL
from dsv32_jax.errors import UserError
from dsv32_jax.generate import loading
from tests.convert.test_conversion import equal_models
from tests.harness import golden_directory, load_golden

IN_THE_MIDDLE = "layers.2.attn.q_a"


@pytest.fixture
def source(golden, tmp_path):
    """A copy of a checkpoint of two shards."""
    return shutil.copytree(golden("tiny128_fp8/model"), tmp_path / "in")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """That checkpoint converted by itself, by layout."""
    folder = tmp_path_factory.mktemp("alone")
    for to in ("hf", "orbax"):
        convert.convert(golden_directory("tiny128_fp8") / "model", folder / to, to=to)
    return folder


@pytest.mark.parametrize("target", ["", ".", "./", "/", "..", "sub/.."])
def test_a_target_without_a_name_of_its_own_is_refused(refused, tiny, tmp_path, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    assert "has no name of its own" in refused("convert", tiny, target)
    with pytest.raises(UserError, match="has no name of its own"):
        convert.export_model(load_golden("tiny"), target)
    assert "has no name of its own" in refused("quantize", "--model", tiny, "--scheme", "int8", "--out", target)
    assert not list(tmp_path.iterdir())


def test_an_unfinished_conversion_is_called_one(tmp_path):
    (tmp_path / JOURNAL).write_text("{}")
    with pytest.raises(UserError, match="an unfinished conversion"):
        loading.find(tmp_path)


def content(directory):
    """Every file's bytes by its path; of Orbax's items, which have random names within, the names alone."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and "params" not in path.parts
    } | {path.name: b"" for path in directory.glob("params/*")}


def meanwhile(monkeypatch, act):
    """Has `act` called in the middle of the next reading of a checkpoint."""
    original, acts = HFReader.read, [act]

    def read(self, path):
        if path == IN_THE_MIDDLE and acts:
            acts.pop()()
        return original(self, path)

    monkeypatch.setattr(HFReader, "read", read)


def interrupt():
    raise KeyboardInterrupt


def interrupted(monkeypatch, call):
    """Runs it until the middle."""
    meanwhile(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        call()


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_a_target_has_one_writer(source, tmp_path, monkeypatch, alone, to):
    """Others are refused meanwhile, in its thread and in another, whatever they would write there."""
    target = tmp_path / "out"
    model = load_golden("tiny")
    refusals = []

    def others():
        for write in (
            lambda: convert.convert(source, target, to=to),
            lambda: convert.convert(source, target, to="hf", dtype="bf16"),
            lambda: quantize_checkpoint(source, target, {"layers.0.attn.o": "int8"}),
            lambda: convert.export_model(model, target),
        ):
            with pytest.raises(UserError, match=rf"^{target}: process {os.getpid()} is writing it"):
                write()
            refusals.append(write)

    def here_and_in_a_thread():
        others()
        thread = threading.Thread(target=others)
        thread.start()
        thread.join()

    meanwhile(monkeypatch, here_and_in_a_thread)
    convert.convert(source, target, to=to)
    assert len(refusals) == 8
    assert content(target) == content(alone / to)
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_what_another_run_left_is_not_mixed_in(source, tmp_path, monkeypatch, alone):
    """Other options, other arrays of the same kind, other package versions."""
    target = tmp_path / "out"
    interrupted(monkeypatch, lambda: convert.convert(source, target, to="hf", dtype="bf16"))
    assert (tmp_path / "out.partial").is_dir()
    interrupted(monkeypatch, lambda: convert.convert(source, target, to="orbax"))
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "__version__", "0.0.0")
        interrupted(patch, lambda: convert.convert(source, target, to="hf"))
    read_paths = []
    read = HFReader.read
    monkeypatch.setattr(HFReader, "read", lambda self, path: read_paths.append(path) or read(self, path))
    convert.convert(source, target, to="hf")
    assert "layers.0.attn.q_a" in read_paths and content(target) == content(alone / "hf")
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_other_statistics_or_weights_begin_anew(source, tmp_path, monkeypatch):
    model, paths = load_golden("tiny128_fp8"), ("layers.0.attn.o", "layers.2.attn.o")
    schemes = dict.fromkeys(paths, "int8")

    def statistics(seed):
        x = np.random.default_rng(seed).standard_normal((300, model.layers[0].attn.o.shape[1])).astype(np.float32)
        of_linear = Statistics(jnp.float32(300), jnp.abs(x).max(0), jnp.asarray(x.T @ x * np.exp(x[0])), jnp.zeros(65))
        return dict.fromkeys(paths, of_linear)

    def quantise(seed):
        quantize_checkpoint(source, tmp_path / "out", schemes, statistics=statistics(seed))

    interrupted(monkeypatch, lambda: quantise(1))
    quantise(2)
    loaded = convert.load_hf(tmp_path / "out")
    assert equal_models(loaded, quantize_model(model, schemes, statistics(2)))
    assert not equal_models(loaded, quantize_model(model, schemes, statistics(1)))
    first, second = ({"weights": {"a": jnp.zeros(2) + value}} for value in (0, 1))
    assert quantization.digest(first) != quantization.digest(second) and quantization.digest({"weights": {}}) is None


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_leftovers_do_not_stay(source, tmp_path, monkeypatch, alone, to):
    """Of a run that was killed: unfinished items and files, other shards; the finished part is gone on with."""
    target, work = tmp_path / "out", tmp_path / "out.partial"
    interrupted(monkeypatch, lambda: convert.convert(source, target, to=to))
    for name in ("model-00007-of-00009.safetensors", "..progress.0.part.json", "tokenizer.json", "params/x.tmp/d/a"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).touch()
    read_paths, read = [], HFReader.read
    monkeypatch.setattr(HFReader, "read", lambda self, path: read_paths.append(path) or read(self, path))
    convert.convert(source, target, to=to)
    assert IN_THE_MIDDLE in read_paths and "layers.0.attn.q_a" not in read_paths
    assert content(target) == content(alone / to)


@pytest.mark.parametrize("spoil", ["remove", "shorten", "other header"])
def test_files_that_were_lost_are_written_again(source, tmp_path, monkeypatch, alone, spoil):
    interrupted(monkeypatch, lambda: convert.convert(source, tmp_path / "out", to="hf"))
    shard = min((tmp_path / "out.partial").glob("*.safetensors"))
    data = shard.read_bytes()
    shard.unlink()
    if spoil != "remove":
        shard.write_bytes(data[:-1] if spoil == "shorten" else data.replace(b"BF16", b"F16 ", 1))
    convert.convert(source, tmp_path / "out", to="hf")
    assert content(tmp_path / "out") == content(alone / "hf")


def test_a_source_that_changes_meanwhile_is_refused(source, tmp_path, monkeypatch):
    meanwhile(monkeypatch, lambda: (source / "config.json").touch())
    with pytest.raises(UserError, match="in: was changed while it was read"):
        convert.convert(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


def test_other_peoples_directories_stay(source, tmp_path):
    foreign = tmp_path / "out.partial"
    foreign.mkdir()
    (foreign / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"out\.partial: is no unfinished conversion"):
        convert.convert(source, tmp_path / "out")
    with pytest.raises(UserError, match=r"end in \.partial"):
        convert.convert(source, tmp_path / "other.partial")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="link: exists"):
        convert.convert(source, tmp_path / "link")
    assert sorted(os.listdir(tmp_path)) == ["in", "link", "out.partial"]
    assert os.listdir(foreign) == ["model.safetensors"]


def test_killed_at_its_last_step_it_is_finished(source, tmp_path, alone):
    finished = shutil.copytree(alone / "hf", tmp_path / "out")
    (finished / JOURNAL).write_text(json.dumps({"identity": None, "done": [], "complete": True}))
    assert equal_models(convert.load_hf(finished), convert.load_hf(source))
    with pytest.raises(UserError, match="out: exists"):
        convert.convert(source, finished)
    assert content(finished) == content(alone / "hf")


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    model = load_golden("tiny")
    monkeypatch.setattr(conversion, "write_config", lambda *_: interrupt())
    with pytest.raises(KeyboardInterrupt):
        convert.export_model(model, tmp_path / "out")
    assert not os.listdir(tmp_path)
