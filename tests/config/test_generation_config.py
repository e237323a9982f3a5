"""generation_config.json: nulls, wrong values, and fields that are not supported."""

import json
import warnings

import pytest

from dsv32_jax.config.generation_config import read_generation_config
from dsv32_jax.errors import CheckpointWarning, UserError


def read(directory, **fields):
    (directory / "generation_config.json").write_text(json.dumps(fields))
    return read_generation_config(directory, vocab_size=512)


def test_nulls_are_left_out(tmp_path):
    nulls = dict.fromkeys(("temperature", "top_p", "eos_token_id", "do_sample", "max_new_tokens", "top_k", "mystery"))
    assert read(tmp_path, **nulls) == {}
    assert read(tmp_path, eos_token_id=[], top_p=None, temperature=0.6) == {"temperature": 0.6}
    assert read_generation_config(tmp_path / "absent") == {}


def test_what_is_right_is_read_without_a_word(tmp_path):
    fields = {
        "do_sample": True, "temperature": 0, "top_p": 1, "max_new_tokens": 5, "eos_token_id": [1, 511],
        "bos_token_id": 0, "pad_token_id": -1, "transformers_version": "5.24.0", "_from_model_config": True,
        "repetition_penalty": 1.0,
        "top_k": 0, "num_beams": 1, "min_p": 0.0, "length_penalty": 2.0, "use_cache": False, "stop_strings": [],
        "max_length": 20,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path, **fields) == fields


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "0.7"), ("temperature", -1), ("temperature", float("nan")), ("temperature", True),
        ("temperature", float("inf")), ("temperature", 10**400), ("top_p", 0), ("top_p", 1.5), ("top_p", "1"),
        ("top_p", [0.9]),
        ("do_sample", "true"), ("do_sample", 1), ("max_new_tokens", 0), ("max_new_tokens", 12.0),
        ("max_new_tokens", "9"),
        ("max_new_tokens", True), ("eos_token_id", True), ("eos_token_id", "1"), ("eos_token_id", 1.0),
        ("eos_token_id", -1), ("eos_token_id", 512), ("eos_token_id", [1, 512]), ("eos_token_id", [1, None]),
        ("eos_token_id", [[1]]), ("eos_token_id", {}), ("bos_token_id", 512),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_by_file_and_field(tmp_path, name, value):
    with pytest.raises(UserError, match=f"generation_config.json: {name} ") as refusal:
        read(tmp_path, **{name: value})
    assert "\n" not in str(refusal.value)


def test_what_is_not_offered_is_named_once(tmp_path):
    fields = {
        "repetition_penalty": 1.1,
        "top_k": 50,
        "min_p": 0.05,
        "num_beams": 4,
        "stop_strings": ["a"],
        "mystery": 1,
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert read(tmp_path, **fields, temperature=1.0) == fields | {"temperature": 1.0}
    (warning,) = caught
    assert warning.category is CheckpointWarning
    assert str(warning.message).endswith(": min_p, mystery, num_beams, repetition_penalty, stop_strings, top_k")
