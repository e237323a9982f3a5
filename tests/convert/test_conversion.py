"""Round trips, bad checkpoints, interruptions, and the memory that a conversion takes."""

import filecmp
import itertools
import json
import shutil
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import dsv32_jax
from dsv32_jax import convert
from dsv32_jax.config import ModelConfig
from dsv32_jax.convert import conversion
from dsv32_jax.convert.contents import contents
from dsv32_jax.convert.huggingface import INDEX, HFReader
from dsv32_jax.convert.tensor_file import DTYPES, read_header, read_into
from dsv32_jax.errors import UserError
from dsv32_jax.model.model import DeepseekV32, abstract_model
from dsv32_jax.model.params import named_parameters
from pallas_kernels.matmul import QTensor

NAMES = ["tiny", "tiny128_bf16", "tiny128_fp8"]
ROUTER = "model.layers.1.mlp.gate.weight"
SCALE = "model.layers.0.self_attn.q_a_proj.weight_scale_inv"


def arrays(path):
    """A file's tensors by name."""
    by_name = {}
    for name, entry in read_header(path)[0].items():
        by_name[name] = np.empty(entry.shape, DTYPES[entry.dtype])
        read_into(by_name[name], path, entry)
    return by_name


def tensors(directory):
    """name -> (shard, dtype, shape, bytes) of a whole checkpoint."""
    by_name = {}
    for path in sorted(directory.glob("*.safetensors")):
        for name, entry in read_header(path)[0].items():
            array = np.empty(entry.shape, DTYPES[entry.dtype])
            read_into(array, path, entry)
            by_name[name] = (path.name, entry.dtype, entry.shape, array.tobytes())
    return by_name


def equal_models(a, b):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(a) == len(b) and all(
        x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True)
    )


@pytest.fixture
def fp8(golden, tmp_path):
    """A copy of the FP8 checkpoint to spoil."""
    return shutil.copytree(golden("tiny128_fp8/model"), tmp_path / "fp8")


def spoil(directory, change):
    """Rewrites the shard that holds the tensors `change` is about: change(dict of NumPy tensors)."""
    for path in directory.glob("*.safetensors"):
        tensors_of_file = arrays(path)
        if change(tensors_of_file) is not False:
            save_file(tensors_of_file, path)
            return
    raise AssertionError("no shard was changed")


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(golden, tmp_path, name):
    """Through Orbax and back, and straight: every tensor's bytes, dtype, shape and shard, and every other file."""
    source = golden(f"{name}/model")
    convert.convert(source, tmp_path / "orbax")
    convert.convert(tmp_path / "orbax", tmp_path / "back", to="hf")
    convert.convert(source, tmp_path / "straight", to="hf")
    for target in ("back", "straight"):
        assert tensors(tmp_path / target) == tensors(source)
        match, mismatch, errors = filecmp.cmpfiles(
            source, tmp_path / target, [path.name for path in source.iterdir()], shallow=False
        )
        assert not mismatch and not errors and len(match) == len(list((tmp_path / target).iterdir()))
    assert equal_models(convert.load_hf(source), convert.load_orbax(tmp_path / "orbax"))
    with safe_open(next((tmp_path / "back").glob("*.safetensors")), framework="np") as file:
        assert file.metadata() == {"format": "pt"}


def test_bf16_export_is_the_dequantised_checkpoint(golden, tmp_path):
    source = golden("tiny128_fp8/model")
    convert.convert(source, tmp_path / "bf16", to="hf", dtype="bf16")
    config = ModelConfig.from_hf(tmp_path / "bf16")
    assert config.quantization_config is None
    source_parameters = named_parameters(convert.load_hf(source))
    for path, leaf in named_parameters(convert.load_hf(tmp_path / "bf16")).items():
        expected = source_parameters[path]
        expected = expected.dequantize() if isinstance(expected, QTensor) else expected
        assert leaf.dtype == (np.float32 if path.endswith(conversion.KEPT_FLOAT32) else ml_dtypes.bfloat16)
        np.testing.assert_array_equal(np.asarray(leaf, np.float32), np.asarray(expected.astype(leaf.dtype), np.float32))


def test_exported_model_loads_as_it_was(tmp_path):
    model = DeepseekV32(ModelConfig.tiny(), nnx.Rngs(3))
    convert.export_model(model, tmp_path / "out")
    assert equal_models(model, convert.load_hf(tmp_path / "out"))


def test_float16_is_accepted(golden, tmp_path):
    source = shutil.copytree(golden("tiny/model"), tmp_path / "f16")
    path = source / "model.safetensors"
    by_name = load_file(path)
    by_name[ROUTER.replace("1", "2")] = by_name[ROUTER.replace("1", "2")].astype(np.float16)
    save_file(by_name, path)
    assert convert.load_hf(source).layers[2].ffn.router.dtype == np.float16


def missing(by_name):
    return False if SCALE not in by_name else by_name.pop(SCALE)


def wrong_shape(by_name):
    if ROUTER not in by_name:
        return False
    by_name[ROUTER] = by_name[ROUTER][:-1].copy()


def wrong_dtype(by_name):
    if ROUTER not in by_name:
        return False
    by_name[ROUTER] = by_name[ROUTER].astype(ml_dtypes.float8_e4m3fn)


def unknown(by_name):
    by_name["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(32, np.float32)


def several(by_name):
    if ROUTER not in by_name:
        return False
    wrong_shape(by_name)
    unknown(by_name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing, rf"{SCALE} is not in .*missing {SCALE}, the scale of an F8_E4M3 weight"),
        (wrong_shape, rf"{ROUTER} has shape \[7, 256\], expected \[8, 256\]"),
        (wrong_dtype, rf"{ROUTER} is F8_E4M3, expected F32 or BF16 or F16"),
        (unknown, r"unexpected model\.layers\.0\.self_attn\.rotary_emb\.inv_freq"),
        (several, rf"(?s){ROUTER} has shape.*unexpected model\.layers\.0\.self_attn\.rotary_emb"),
    ],
)
def test_bad_tensors_are_named(fp8, tmp_path, change, message):
    spoil(fp8, change)
    with pytest.raises(UserError, match=message):
        convert.load_hf(fp8)
    with pytest.raises(UserError, match=message):
        convert.convert(fp8, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_bad_shards_are_named(fp8):
    shard = sorted(fp8.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for content in (whole[:-100], whole[:20], b"\xff" * 64, b""):
        shard.write_bytes(content)
        with pytest.raises(UserError, match=rf"{shard.name}: truncated or corrupt"):
            convert.load_hf(fp8)
    shard.unlink()
    with pytest.raises(UserError, match=rf"missing shard {shard.name}"):
        convert.load_hf(fp8)
    index = json.loads((fp8 / INDEX).read_text())
    for file in ("../elsewhere.safetensors", 1):
        index["weight_map"][ROUTER] = file
        (fp8 / INDEX).write_text(json.dumps(index))
        with pytest.raises(UserError, match="is not a file name"):
            convert.load_hf(fp8)


@pytest.mark.parametrize("weight_map", [["a"], "a", None, {"a": 5}, {"a": "../b"}, {"a": ""}])
def test_an_index_of_another_form_is_named(fp8, weight_map):
    (fp8 / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    for read in (convert.load_hf, lambda directory: contents(directory, ModelConfig.from_hf(directory))):
        with pytest.raises(UserError, match=f"{INDEX}: "):
            read(fp8)


@pytest.mark.parametrize("name", [INDEX, "model-00001-of-00002.safetensors"])
def test_a_link_that_leads_nowhere_is_named(fp8, name):
    (fp8 / name).unlink()
    (fp8 / name).symlink_to("blob")
    with pytest.raises(UserError, match=f"{name}: is a link to blob"):
        convert.load_hf(fp8)


def test_fp8_without_a_quantization_config_is_refused(fp8):
    config = json.loads((fp8 / "config.json").read_text())
    del config["quantization_config"]
    (fp8 / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no quantization_config"):
        convert.load_hf(fp8)


def test_bad_arguments(golden, tmp_path):
    source = golden("tiny/model")
    for arguments, message in [
        ({"to": "gguf"}, "--to gguf"),
        ({"dtype": "int8"}, "--dtype int8"),
        ({"target": source}, "exists"),
        ({"target": source / "config.json" / "below"}, "cannot be written"),
        ({"source": tmp_path / "none"}, "no such directory"),
        ({"source": tmp_path}, "no checkpoint"),
    ]:
        with pytest.raises(UserError, match=message):
            convert.convert(**{"source": source, "target": tmp_path / "out", **arguments})


@pytest.mark.parametrize(("to", "inside"), [("orbax", False), ("hf", False), ("orbax", True)])
def test_an_interrupted_conversion_goes_on(golden, tmp_path, monkeypatch, to, inside):
    """Nothing that loads is left; the second run does not read again what the first had written."""
    source = shutil.copytree(golden("tiny128_fp8/model"), tmp_path / "in")
    target = (source if inside else tmp_path) / "out"
    read, read_paths = HFReader.read, []

    def fail_in_layer_2(self, path):
        read_paths.append(path)
        if path.startswith("layers.2.ffn"):
            raise KeyboardInterrupt
        return read(self, path)

    monkeypatch.setattr(HFReader, "read", fail_in_layer_2)
    with pytest.raises(KeyboardInterrupt):
        convert.convert(source, target, to=to)
    assert not target.exists()
    load = convert.load_orbax if to == "orbax" else convert.load_hf
    for attempt in (convert.checkpoint_kind, load, lambda path: load(path, ModelConfig.from_hf(source))):
        with pytest.raises(UserError, match="unfinished conversion"):
            attempt(target.with_name("out.partial"))
    first = set(read_paths)
    read_paths.clear()
    monkeypatch.setattr(HFReader, "read", lambda self, path: read_paths.append(path) or read(self, path))
    convert.convert(source, target, to=to)
    assert "layers.0.attn.q_a" in first and "layers.0.attn.q_a" not in read_paths and "layers.2.attn.q_a" in read_paths
    assert equal_models(load(target), convert.load_hf(source))
    assert not target.with_name("out.partial").exists()


def test_a_changed_source_starts_anew(golden, tmp_path, monkeypatch):
    source, target = shutil.copytree(golden("tiny128_fp8/model"), tmp_path / "in"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "copy_files", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert.convert(source, target)

    def other_router(by_name):
        if ROUTER not in by_name:
            return False
        by_name[ROUTER] = -by_name[ROUTER]

    spoil(source, other_router)
    convert.convert(source, target)
    assert equal_models(convert.load_orbax(target), convert.load_hf(source))


def test_a_spoilt_orbax_checkpoint_is_refused(golden, tmp_path):
    convert.convert(golden("tiny/model"), tmp_path / "out")
    data = max((tmp_path / "out" / "params" / "embed").rglob("*"), key=lambda path: path.stat().st_size)
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"params/embed: cannot be read"):
        convert.load_orbax(tmp_path / "out")
    data.write_bytes(whole)
    shutil.rmtree(tmp_path / "out" / "params" / "layers.1")
    with pytest.raises(UserError, match=r"missing params/layers\.1"):
        convert.load_orbax(tmp_path / "out")
    (tmp_path / "out" / "dsv32_checkpoint.json").write_text('{"format": 1, "shards": {}}')
    with pytest.raises(UserError, match="has no parameters or index_metadata"):
        convert.load_orbax(tmp_path / "out")


@pytest.fixture(scope="module")
def many_layers(tmp_path_factory):
    """A checkpoint, and the bytes of a layer's experts and of all."""
    config = ModelConfig.tiny(
        num_hidden_layers=8, hidden_size=256, n_routed_experts=32, moe_intermediate_size=256, num_nextn_predict_layers=0
    )
    model = jax.tree.map(lambda leaf: jax.numpy.ones(leaf.shape, leaf.dtype), abstract_model(config))
    path = tmp_path_factory.mktemp("many_layers")
    convert.export_model(model, path / "in")
    return path / "in", conversion.nbytes(model.layers[1].ffn.experts), conversion.nbytes(model)


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_conversion_holds_one_layer_at_a_time(tmp_path, many_layers, to):
    """Host memory: about a layer's experts, however many layers there are."""
    source, layer, total = many_layers
    assert total > 2 * (layer + 2**23)
    tracemalloc.start()
    convert.convert(source, tmp_path / "out", to=to)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < layer + 2**23, f"peak {peak} for layers of {layer} and {total} in all"


def announce(directory, layers):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": layers}))
    return directory


@pytest.mark.parametrize("layout", ["hf", "orbax"])
def test_the_mtp_layer_can_be_left_out(tmp_path, layout):
    """Also where the files and their config disagree about it; then the message says what to do."""
    load = {"hf": convert.load_hf, "orbax": convert.load_orbax}[layout]

    def in_layout(source):
        convert.convert(source, tmp_path / f"{source.name}-{layout}", to=layout)
        return tmp_path / f"{source.name}-{layout}"

    numbers = itertools.count(1)
    whole = jax.tree.map(
        lambda leaf: np.full(leaf.shape, next(numbers), leaf.dtype), abstract_model(ModelConfig.tiny())
    )
    convert.export_model(whole, tmp_path / "whole")
    source = in_layout(tmp_path / "whole")
    without = load(source, mtp=False)
    assert without.mtp is None and not without.config.has_mtp
    assert equal_models(without.layers, whole.layers) and equal_models(without.head, whole.head)
    announce(source, 0)
    with pytest.raises(UserError, match=r"num_nextn_predict_layers is 0: set it to 1 .* --no-mtp"):
        load(source)
    assert equal_models(load(source, mtp=False), without)
    convert.export_model(without, tmp_path / "main")  # as transformers writes it: the layer is announced all the same
    main = announce(in_layout(tmp_path / "main"), 1)
    with pytest.raises(UserError, match=r"num_nextn_predict_layers .*mtp=False, --no-mtp") as refusal:
        dsv32_jax.load(main)
    assert len(str(refusal.value)) < 400  # one line, not one for each tensor
    assert equal_models(dsv32_jax.load(main, mtp=False).model, without)


def test_a_shard_of_the_mtp_layer_alone_may_be_missing(fp8):
    prefix = f"model.layers.{ModelConfig.from_hf(fp8).num_hidden_layers}."
    index = json.loads((fp8 / INDEX).read_text())
    index["weight_map"] = {
        name: "model-mtp.safetensors" if name.startswith(prefix) else file for name, file in index["weight_map"].items()
    }
    (fp8 / INDEX).write_text(json.dumps(index))
    for path in fp8.glob("*.safetensors"):
        save_file({name: array for name, array in arrays(path).items() if not name.startswith(prefix)}, path)
    with pytest.raises(UserError, match=r"missing shard model-mtp.safetensors; num_nextn_predict_layers .*mtp=False"):
        convert.load_hf(fp8)
    assert convert.load_hf(fp8, mtp=False).mtp is None


def test_a_layer_too_many_is_no_mtp_layer(golden, tmp_path):
    directory = shutil.copytree(golden("tiny/model"), tmp_path / "tiny")
    config = json.loads((directory / "config.json").read_text())
    config["num_hidden_layers"] -= 1
    (directory / "config.json").write_text(json.dumps(config))
    for mtp in (True, False):
        with pytest.raises(UserError, match=rf"unexpected model\.layers\.{config['num_hidden_layers']}\."):
            convert.load_hf(directory, mtp=mtp)
