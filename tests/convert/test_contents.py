"""What `dsv32 info` says of a directory is what its files hold; where others say otherwise, that is named."""

import json
import shutil

import pytest

from dsv32_jax import convert
from dsv32_jax.config import ModelConfig
from dsv32_jax.convert.contents import contents
from dsv32_jax.convert.huggingface import INDEX
from dsv32_jax.convert.orbax import DESCRIPTION
from dsv32_jax.convert.quantization import quantize_checkpoint
from dsv32_jax.convert.stored import stored_parameters
from dsv32_jax.errors import UserError
from dsv32_jax.generate.memory import parameter_counts
from pallas_kernels.matmul import scheme_name
from tests.convert.test_companions import claim
from tests.harness import golden_directory

MIXED = {"layers.0.attn.o": "int8", "layers.1.ffn.experts.up": "int4", "layers.1.attn.o": "bf16"}


def contents_of(directory):
    return contents(directory, ModelConfig.from_hf(directory))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A checkpoint with every scheme, by layout."""
    folder = tmp_path_factory.mktemp("mixed")
    quantize_checkpoint(golden_directory("tiny128_fp8") / "model", folder / "hf", MIXED)
    convert.convert(folder / "hf", folder / "orbax")
    return folder


@pytest.mark.parametrize("layout", ["hf", "orbax"])
def test_schemes_and_bytes_are_those_of_the_files(mixed, layout):
    result = contents_of(mixed / layout)
    config = ModelConfig.from_hf(mixed / layout)
    stored = stored_parameters(config)
    count, by_dtype = parameter_counts(stored)
    assert result.layout == layout and result.disagreements == [] and result.parameters == count
    assert sum(scheme["bytes"] for scheme in result.weights.values()) == sum(result.bytes_by_dtype.values())
    experts = config.n_routed_experts
    assert result.weights["int8"]["tensors"] == 1 and result.weights["int4"]["tensors"] == experts
    fp8 = [leaf.shape for leaf in stored.values() if scheme_name(leaf) == "fp8_block"]
    assert result.weights["fp8_block"]["tensors"] == sum(1 if len(shape) == 2 else shape[0] for shape in fp8)
    assert result.weights["int4"]["parameters"] == experts * config.moe_intermediate_size * config.hidden_size
    if layout == "orbax":
        assert result.bytes_by_dtype == by_dtype
    else:
        headers = sum(path.stat().st_size for path in (mixed / layout).glob("*.safetensors"))
        assert 0 < headers - sum(result.bytes_by_dtype.values()) < 2**17


@pytest.fixture
def spoilt(golden, tmp_path):
    return shutil.copytree(golden("tiny128_fp8/model"), tmp_path / "in")


def test_a_config_that_says_otherwise_is_named(spoilt):
    before = contents_of(spoilt)
    assert before.disagreements == []
    claim(spoilt, quantization_config=None, torch_dtype="float32", dtype="torch.float16")
    after = contents_of(spoilt)
    assert (after.bytes_by_dtype, after.weights) == (before.bytes_by_dtype, before.weights)
    first, *others = after.disagreements
    assert "does not fit its config.json" in first and "q_a_proj.weight is F8_E4M3" in first
    assert others == [
        "config.json: torch_dtype is float32, and the files hold what has no scheme in bfloat16",
        "config.json: dtype is torch.float16, and the files hold what has no scheme in bfloat16",
    ]


def test_an_index_that_says_otherwise_is_named(spoilt):
    total = sum(contents_of(spoilt).bytes_by_dtype.values())
    index = json.loads((spoilt / INDEX).read_text())
    index["metadata"]["total_size"] = 5
    (spoilt / INDEX).write_text(json.dumps(index))
    shutil.copyfile(min(spoilt.glob("*.safetensors")), spoilt / "model-00009-of-00009.safetensors")
    result = contents_of(spoilt)
    assert sum(result.bytes_by_dtype.values()) == total
    assert result.disagreements == [
        f"model-00009-of-00009.safetensors: is not in {INDEX}, and is never read",
        f"{INDEX}: total_size is 5, and the files hold {total} bytes of tensors",
    ]


def test_missing_and_broken_files_are_named(spoilt):
    first, second = sorted(spoilt.glob("*.safetensors"))
    whole = contents_of(spoilt).parameters
    first.write_bytes(first.read_bytes()[:-1])
    assert any(f"{first.name}: truncated" in line for line in contents_of(spoilt).disagreements)
    first.unlink()
    result = contents_of(spoilt)
    assert 0 < result.parameters < whole and f"missing shard {first.name}" in result.disagreements[0]
    second.unlink()
    assert contents_of(spoilt).parameters == 0
    (spoilt / INDEX).unlink()
    with pytest.raises(UserError, match="no checkpoint"):
        contents_of(spoilt)


def test_orbax_that_is_not_what_was_written_is_named(golden, tmp_path):
    convert.convert(golden("tiny/model"), tmp_path / "out")
    whole = contents_of(tmp_path / "out")
    description = json.loads((tmp_path / "out" / DESCRIPTION).read_text())
    description["parameters"]["embed"]["dtype"] = "bfloat16"
    (tmp_path / "out" / DESCRIPTION).write_text(json.dumps(description))
    result = contents_of(tmp_path / "out")
    assert result.weights == whole.weights and result.disagreements[0].startswith("embed: is float32 [512, 64]")
    shutil.rmtree(tmp_path / "out" / "params" / "head")
    (tmp_path / "out" / "params" / "norm" / "_METADATA").unlink()
    named = " ".join(contents_of(tmp_path / "out").disagreements)
    assert "missing params/head" in named and "params/norm: cannot be read" in named
