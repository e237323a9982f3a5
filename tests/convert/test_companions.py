"""What goes along with the tensors, and what config.json says of them."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import pytest

from dsv32_jax import convert
from dsv32_jax.convert.quantization import PROVENANCE, quantize_checkpoint
from dsv32_jax.errors import UserError
from dsv32_jax.model.params import named_parameters, replace_parameters
from tests.convert.test_conversion import tensors
from tests.harness import load_golden

COPIED = [
    *("LICENSE", "license-code.txt", "NOTICE", "README.md", "generation_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
    *("additional_chat_templates/tools.jinja", "encoding/encoding_dsv32.py", "encoding/tests/case.json"),
    *("modeling_custom.py", "tokenization_custom.py"),
]
LEFT = ["pytorch_model.bin", "inference/model.py", "encoding/__pycache__/a.pyc", "notes.txt", ".gitattributes"]


@pytest.fixture
def source(golden, tmp_path):
    directory = shutil.copytree(golden("tiny/model"), tmp_path / "in")
    for name in (*COPIED, *LEFT):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)
    return directory


@pytest.mark.parametrize("name", ["LICENSE", "vocab.json", "encoding/encoding_dsv32.py"])
def test_a_companion_that_is_a_link_to_nothing_is_named(source, tmp_path, name):
    (source / name).unlink()
    (source / name).symlink_to("blob")
    with pytest.raises(UserError, match=f"{name}: is a link to blob"):
        convert.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def beside(directory):
    """Files that are neither tensors nor this project's own."""
    names = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    return {name for name in names if not name.startswith(("params/", "model.safetensors", "dsv32_"))}


def test_companions_go_along_in_both_layouts(source, tmp_path):
    convert.convert(source, tmp_path / "orbax")
    convert.convert(tmp_path / "orbax", tmp_path / "back")
    quantize_checkpoint(source, tmp_path / "bf16", {"layers.0.attn.o": "bf16"})
    convert.export_model(convert.load_hf(source), tmp_path / "export", tokenizer_files=source)
    expected = {*COPIED, "config.json", "tokenizer.json", "tokenizer_config.json"}
    for target in ("orbax", "back", "bf16", "export"):
        assert beside(tmp_path / target) == expected, target
        for name in COPIED:
            assert (tmp_path / target / name).read_text() == name


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def claim(directory, **fields):
    """Changes fields of config.json; None removes one."""
    config = {name: value for name, value in (config_of(directory) | fields).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("to", ["hf", "orbax"])
@pytest.mark.parametrize(
    "fields", [{"torch_dtype": "float32"}, {"torch_dtype": None, "dtype": "float32"}, {"dtype": "float32"}]
)
def test_the_config_says_the_dtype_of_the_new_files(source, tmp_path, to, fields):
    claim(source, **fields)
    convert.convert(source, tmp_path / "out", to=to, dtype="bf16")
    new = config_of(tmp_path / "out")
    assert new["torch_dtype"] == "bfloat16" and new.get("dtype", "bfloat16") == "bfloat16"
    assert ("dtype" in new) == ("dtype" in fields)


def test_a_quantised_checkpoint_says_what_is_not_quantised(golden, tmp_path):
    """Not the dtype that the source's config says."""
    for name, dtype in (("tiny", "float32"), ("tiny128_fp8", "bfloat16")):
        source = shutil.copytree(golden(f"{name}/model"), tmp_path / name)
        claim(source, torch_dtype="float16", dtype="float16")
        quantize_checkpoint(source, tmp_path / f"{name}-out", {"layers.0.attn.o": "bf16"})
        new = config_of(tmp_path / f"{name}-out")
        assert new["torch_dtype"] == new["dtype"] == dtype
        assert {stored for _, stored, shape, _ in tensors(tmp_path / f"{name}-out").values() if len(shape) > 1} >= {
            {"float32": "F32", "bfloat16": "BF16"}[dtype]
        }
    assert PROVENANCE in new
    convert.convert(tmp_path / "tiny128_fp8-out", tmp_path / "plain", to="hf", dtype="bf16")
    assert PROVENANCE not in config_of(tmp_path / "plain")


def test_an_export_says_the_dtype_of_the_model(tmp_path):
    model = load_golden("tiny")
    half = {path: jnp.asarray(leaf, jnp.bfloat16) for path, leaf in named_parameters(model).items()}
    convert.export_model(replace_parameters(model, half), tmp_path / "out")
    assert model.config.torch_dtype == "float32" and config_of(tmp_path / "out")["torch_dtype"] == "bfloat16"


def test_a_plain_copy_keeps_its_config(source, tmp_path):
    claim(source, torch_dtype="float16")
    convert.convert(source, tmp_path / "out", to="hf")
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert jax.tree.leaves(convert.load_hf(tmp_path / "out"))[0].dtype == jnp.float32
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
