"""`load`: what the files beside the weights say reaches the model."""

import json
import shutil

import chex
import pytest

import dsv32_jax
from tests.harness import golden_directory


@pytest.fixture
def directory(tmp_path):
    return shutil.copytree(golden_directory("tiny") / "model", tmp_path / "model")


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


def test_prompts_begin_with_the_bos_token_whatever_tokenizer_files_there_are(directory):
    """Without it a model reads what it was never trained on; config.json alone is enough to know it."""
    prompt = "The lighthouse keeper"
    expected = dsv32_jax.load(directory).rows(prompt)
    assert expected[0][0] == 0
    tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    write(directory / "tokenizer.json", tokenizer | {"truncation": truncation})
    write(directory / "tokenizer_config.json", {"bos_token": None})
    assert dsv32_jax.load(directory).rows(prompt) == expected
    (directory / "tokenizer_config.json").unlink()
    assert dsv32_jax.load(directory).rows(prompt) == expected


def test_nulls_in_generation_config_do_not_hide_the_config(directory):
    nulls = ("temperature", "top_p", "eos_token_id", "max_new_tokens", "do_sample")
    write(directory / "generation_config.json", dict.fromkeys(nulls))
    m = dsv32_jax.load(directory)
    assert (m.generation_config, m.eos_ids) == ({}, (1,))


def test_an_fp8_checkpoint_as_transformers_writes_it_is_the_same_model(tmp_path):
    source = golden_directory("tiny128_fp8") / "model"
    directory = shutil.copytree(source, tmp_path / "fp8")
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]["fmt"]
    config["quantization_config"]["modules_to_not_convert"] = None
    write(directory / "config.json", config)
    loaded, expected = dsv32_jax.load(directory, mtp=False), dsv32_jax.load(source, mtp=False)
    assert loaded.options == expected.options
    chex.assert_trees_all_equal(dict(loaded.weights), dict(expected.weights))
