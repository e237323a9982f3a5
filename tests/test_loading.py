"""`load`: what the files beside the weights say reaches the model."""

import json
import shutil

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
