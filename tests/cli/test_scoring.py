"""`dsv32 score` and `dsv32 fidelity` of texts, and what verbs take for a model that is not named."""

import json
import math

import numpy as np
import pytest

from dsv32_jax import fidelity
from dsv32_jax.cli import main
from dsv32_jax.config import ModelConfig
from dsv32_jax.fidelity import EQUAL_FIELDS
from dsv32_jax.generate import loading
from dsv32_jax.generate.language_model import LanguageModel
from tests.harness import one_shape

EXACT = ("--compute-dtype", "float32", "--no-act-quant")
TEXT = "The keeper counted ships, 海. " * 30
"""More tokens than the context of the small model has."""


@pytest.fixture(scope="module", autouse=True)
def programs_for_all_lengths():
    """Commands share the programs of a model, however long their texts are."""
    with one_shape():
        yield


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.txt"


def test_a_long_text_is_scored_in_windows_and_that_is_said(dsv32, tiny, tmp_path, text_file):
    m = loading.load(tiny)
    ids = m.tokenizer.encode(TEXT, bos=True)
    assert len(ids) > m.config.max_position_embeddings
    run = ("score", "--model", tiny, "--text-file", text_file, "--json", *EXACT)
    code, out, err = dsv32(*run, "--save-logits", tmp_path / "logits.npy")
    result, logits = json.loads(out), np.load(tmp_path / "logits.npy")
    assert code == 0 and "windows of 256, each 128 further on" in err
    assert (result["window"], result["stride"]) == (256, 128)
    assert result["windows"] == math.ceil((len(ids) - 256) / 128) + 1
    (likelihoods,) = result["log_likelihoods"]
    assert len(likelihoods) == result["tokens"] == len(ids) - 1
    assert result["bits_per_byte"] == pytest.approx(-sum(likelihoods) / math.log(2) / len(TEXT.encode()))
    assert logits.shape == (1, len(ids), m.config.vocab_size)
    normal = logits[0] - np.log(np.exp(logits[0]).sum(-1, keepdims=True))
    np.testing.assert_allclose(normal[np.arange(len(ids) - 1), ids[1:]], likelihoods, atol=1e-4)


def test_a_text_that_fits_is_scored_whole(dsv32, tiny, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT[:120], encoding="utf-8")
    run = ("score", "--model", tiny, "--text-file", tmp_path / "text.txt", "--json", *EXACT)
    code, out, err = dsv32(*run)
    result = json.loads(out)
    assert (code, err, result["windows"]) == (0, "", 1)
    m = loading.load(tiny, compute_dtype="float32", act_quant=False)
    assert result["log_likelihood"] == m.score([TEXT[:120]]).log_likelihood
    narrow = json.loads(dsv32(*run, "--window", 32, "--stride", 8)[1])
    assert narrow["windows"] > 1 and narrow["tokens"] == result["tokens"]
    assert narrow["log_likelihood"] != result["log_likelihood"]


def test_bits_are_of_the_bytes_that_are_scored(dsv32, tiny, tmp_path):
    bits = []
    for text in ("<｜begin▁of▁sentence｜>The keeper", "The keeper"):  # the same ids
        (tmp_path / "text.txt").write_text(text, encoding="utf-8")
        run = ("score", "--model", tiny, "--text-file", tmp_path / "text.txt", "--json", *EXACT)
        bits.append(json.loads(dsv32(*run)[1])["bits_per_byte"])
    assert bits[0] == bits[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--window", 257), "at most max_position_embeddings = 256"),
        (("--window", 1), "--window 1"),
        (("--stride", 0), "--stride 0"),
        (("--stride", 256), "--stride 256"),
        (("--window", 16, "--stride", 16), "--stride 16"),
    ],
)
def test_wrong_windows(refused, tiny, text_file, flags, message):
    assert message in refused("score", "--model", tiny, "--text-file", text_file, *flags)


def test_windows_go_with_a_text(refused, tiny, tmp_path):
    np.save(tmp_path / "ids.npy", np.ones((1, 3), np.int32))
    assert "--window" in refused("score", "--model", tiny, "--token-ids", tmp_path / "ids.npy", "--window", 8)


def test_fidelity_of_a_text(dsv32, tiny, text_file):
    run = ("fidelity", tiny, tiny, "--text-file", text_file, "--window", 8, "--windows", 2, *EXACT)
    code, out, err = dsv32(*run, "--json")
    assert code == 0 and "the first 2 of " in err
    assert [row["tokens"] for row in json.loads(out)["rows"]] == [8, 8]


@pytest.mark.parametrize("field", EQUAL_FIELDS)
def test_fidelity_refuses_other_sizes_before_it_runs(refused, tiny, text_file, tmp_path, monkeypatch, field):
    monkeypatch.setattr(LanguageModel, "trace", None)
    config = ModelConfig.from_hf(tiny)
    other = config.replace(**{field: getattr(config, field) + 1})
    (tmp_path / "config.json").write_text(json.dumps(other.to_hf()))
    message = refused("fidelity", tiny, tmp_path, "--text-file", text_file)
    assert f"{field} is {getattr(other, field)}, and of {tiny} {getattr(config, field)}" in message


def test_fidelity_says_where_every_token_is_chosen(dsv32, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(LanguageModel, "trace", lambda _, rows: [len(row) for row in rows])
    monkeypatch.setattr(fidelity, "compare", lambda a, b: {"tokens": a, "layers": []})
    topk = loading.load(tiny).config.index_topk
    np.save(tmp_path / "ids.npy", np.arange(topk + 1, dtype=np.int32)[None])
    np.save(tmp_path / "short.npy", np.arange(topk, dtype=np.int32)[None])
    run = ("fidelity", tiny, tiny, "--json", *EXACT)
    _, out, err = dsv32(*run, "--token-ids", tmp_path / "ids.npy")
    assert err == "" and not json.loads(out)["rows"][0]["all_visible_chosen"]
    _, out, err = dsv32(*run, "--token-ids", tmp_path / "short.npy")
    assert f"no sequence is longer than index_topk = {topk}" in err and "recall is 1" in err
    assert json.loads(out)["rows"][0]["all_visible_chosen"]
    _, _, err = dsv32(*run, "--token-ids", tmp_path / "ids.npy", "--index-topk", topk + 1)
    assert "recall is 1" in err


def test_fidelity_takes_a_text_or_ids(refused, tiny, text_file, tmp_path):
    assert "give one of the two" in refused("fidelity", tiny, tiny)
    assert "give one" in refused("fidelity", tiny, tiny, "--text-file", text_file, "--token-ids", tmp_path / "x.npy")
    assert "--window 257" in refused("fidelity", tiny, tiny, "--text-file", text_file, "--window", 257)


# ---- the shipped model ----


def test_info_is_of_the_shipped_model_unless_another_is_named(dsv32, refused):
    by_default, named = dsv32("info", "--json"), dsv32("info", "--model", "demo", "--json")
    assert by_default == named and json.loads(named[1])["max_position_embeddings"] == 4096
    assert "give one of the two" in refused("info", "--model", "demo", "--config", "tiny")


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("generate", ("--prompt", "a")),
        ("chat", ()),
        ("score", ("--text-file", "text.txt")),
        ("tokenize", ("a",)),
        ("info", ()),
        ("convert", ("demo", "out")),
        ("quantize", ("--scheme", "int8", "--out", "out")),
        ("fidelity", ("--text-file", "text.txt")),
        ("serve", ("--port", "0")),
    ],
)
def test_every_verb_takes_the_shipped_model(dsv32, monkeypatch, tmp_path, verb, arguments):
    class Found(Exception):
        pass

    def find(name):
        assert str(name) == "demo"
        raise Found

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a")
    monkeypatch.setattr(loading, "find", find)
    with pytest.raises(Found):
        main([verb, *arguments])


def test_a_part_is_replaced_by_a_variant_or_by_ones_own_function(dsv32, refused, tiny, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 3)

    def perplexity(*arguments):
        code, out, err = dsv32("score", "--model", tiny, "--text-file", text, "--json", *arguments)
        assert code == 0, err
        return json.loads(out)["perplexity"]

    (tmp_path / "own_selection.py").write_text("from dsv32_jax.model.variants import recent as mine\n")
    monkeypatch.chdir(tmp_path)
    recent = perplexity("--part", "index_select=recent")
    assert recent == perplexity("--part", "index_select=own_selection:mine") != perplexity()
    (tmp_path / "broken.py").write_text("def f(*arrays, k):\n    return arrays[6][:, None] + 1\n1 / 0\n")
    message = refused("score", "--model", tiny, "--text-file", text, "--part", "index_select=broken:f")
    assert "--part index_select: broken:f cannot be imported (ZeroDivisionError: division by zero)" in message
    (tmp_path / "future.py").write_text("def f(*arrays, k):\n    return arrays[6][:, None] + 1\n")
    text.write_text(TEXT[:60])  # one window, of which nothing needs to be said
    message = refused("score", "--model", tiny, "--text-file", text, "--part", "index_select=future:f", "--check")
    assert (
        "part index_select (future:f), layers.0.attn: of the token at position 0, the chosen 1 comes after" in message
    )
    message = refused("score", "--model", tiny, "--text-file", text, "--part", "index_select=last")
    assert message.startswith("error: --part index_select: variant 'last' is unknown; it is one of dense, recent,")
