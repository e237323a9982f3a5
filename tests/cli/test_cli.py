"""The command line, in process: what the verbs print and write."""

import functools
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.main import get_command

import dsv32_jax
from dsv32_jax import convert
from dsv32_jax.cli.verbs import app
from dsv32_jax.common.files import locked
from dsv32_jax.convert import calibration
from dsv32_jax.errors import UserError
from dsv32_jax.generate import loading
from tests.cli.shards import read_shard
from tests.harness import golden_directory, load_oracle, one_shape

EXACT = ("--compute-dtype", "float32", "--no-act-quant")


@pytest.fixture(scope="module", autouse=True)
def programs_for_all_lengths():
    """Commands share the programs of a model, however long their prompts are."""
    with one_shape():
        yield


def token_file(path, oracle):
    ids = np.where(np.arange(oracle.ids.shape[1]) < oracle.lengths[:, None], oracle.ids, -1).astype(np.int32)
    np.save(path, ids)
    return path


# ---- generate ----


@pytest.mark.parametrize("name", ["tiny", "tiny128_bf16", "tiny128_fp8"])
def test_generate_golden_tokens(dsv32, tmp_path, name):
    oracle, model = load_oracle(name), golden_directory(name) / "model"
    ids, out = token_file(tmp_path / "ids.npy", oracle), tmp_path / "out.npy"
    options = ("--max-new-tokens", 16, "--temperature", 0, "--ignore-eos", "--save-tokens", out, *EXACT)
    code, _, err = dsv32("generate", "--model", model, "--token-ids", ids, *options)
    assert code == 0, err
    saved = np.load(out)
    assert saved.dtype == np.int32
    np.testing.assert_array_equal(saved, oracle.gen)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.npy", "out.npy"]


def test_generate_json(dsv32, tiny):
    options = ("--max-new-tokens", 4, "--ignore-eos", "--json", *EXACT)
    code, out, _ = dsv32("generate", "--model", tiny, "--prompt", "The keeper", "--prompt", "a", *options)
    result = json.loads(out)
    assert code == 0
    assert set(result) == {
        "tokens", "texts", "finish_reasons", "prompt_tokens", "seconds", "tokens_per_second", "temperature", "top_p",
        "seed", "ignore_eos",
    }  # fmt: skip
    assert result["tokens_per_second"] * result["seconds"] == pytest.approx(8)
    assert [len(row) for row in result["tokens"]] == [4, 4]
    assert result["finish_reasons"] == ["length", "length"]


def test_generate_streams_the_same_text(dsv32, tiny, tmp_path):
    (tmp_path / "prompt.txt").write_text("海风 and the lamp", encoding="utf-8")
    options = ("--model", tiny, "--max-new-tokens", 8, "--prompt-file", tmp_path / "prompt.txt", *EXACT)
    _, streamed, err = dsv32("generate", *options, "--save-tokens", tmp_path / "tokens.npy")
    _, out, _ = dsv32("generate", *options, "--json")
    result = json.loads(out)
    assert streamed == result["texts"][0] + "\n"
    assert [token for token in np.load(tmp_path / "tokens.npy")[0] if token >= 0] == result["tokens"][0]
    assert re.fullmatch(rf"{len(result['tokens'][0])} tokens in \d+\.\d\d s, \d+\.\d tokens/s\n", err)


def test_generate_several_prompts_and_a_chat(dsv32, tiny):
    options = ("--model", tiny, "--max-new-tokens", 4, *EXACT)
    _, out, _ = dsv32("generate", *options, "--prompt", "one", "--prompt", "two")
    assert out.startswith("--- 0\n") and "\n--- 1\n" in out
    _, plain, _ = dsv32("generate", *options, "--prompt", "one", "--json")
    _, chat, _ = dsv32("generate", *options, "--prompt", "one", "--system", "You keep a lighthouse.", "--json")
    assert json.loads(chat)["prompt_tokens"][0] > json.loads(plain)["prompt_tokens"][0] + 5


def test_generation_config_gives_defaults_and_flags_go_first(dsv32, tiny, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "model")
    settings = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 3}
    (model / "generation_config.json").write_text(json.dumps(settings))
    run = ("generate", "--model", model, "--prompt", "a", "--ignore-eos", "--json", *EXACT)
    result = json.loads(dsv32(*run)[1])
    assert (result["temperature"], result["top_p"], len(result["tokens"][0])) == (0.7, 0.9, 3)
    result = json.loads(dsv32(*run, "--temperature", 0, "--max-new-tokens", 2)[1])
    assert (result["temperature"], len(result["tokens"][0])) == (0, 2)


# ---- chat ----


def test_chat_from_a_pipe(dsv32, tiny, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Which boats were green?\n\nAnd in 1903?\n/exit\nnot read\n"))
    code, out, _ = dsv32("chat", "--model", tiny, "--system", "Short.", "--max-new-tokens", 5, "--json", *EXACT)
    messages = json.loads(out)["messages"]
    assert code == 0
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    monkeypatch.setattr("sys.stdin", io.StringIO("Which boats were green?\nAnd in 1903?\n"))
    _, out, _ = dsv32("chat", "--model", tiny, "--system", "Short.", "--max-new-tokens", 5, *EXACT)
    assert out == "".join(message["content"] + "\n" for message in messages if message["role"] == "assistant")


# ---- score ----


def test_score_saves_golden_logits(dsv32, tmp_path, tiny):
    oracle = load_oracle("tiny")
    ids = token_file(tmp_path / "ids.npy", oracle)
    options = ("--save-logits", tmp_path / "logits.npy", "--json", *EXACT)
    code, out, err = dsv32("score", "--model", tiny, "--token-ids", ids, *options)
    assert code == 0, err
    logits, present = np.load(tmp_path / "logits.npy"), np.load(ids) >= 0
    assert logits.dtype == np.float32 and logits.shape == oracle.logits.shape
    assert np.abs(logits - oracle.logits)[present].max() <= 1e-3 * oracle.logits[present].std()
    assert (logits[~present] == 0).all()
    result = json.loads(out)
    assert set(result) == {"perplexity", "bits_per_byte", "tokens", "log_likelihood", "log_likelihoods"}
    assert [len(row) for row in result["log_likelihoods"]] == (oracle.lengths - 1).tolist()
    assert result["bits_per_byte"] is None


def test_score_text(dsv32, tiny, tmp_path):
    text = "The keeper counted ships, 海."
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    run = ("score", "--model", tiny, "--text-file", tmp_path / "text.txt", *EXACT)
    result = json.loads(dsv32(*run, "--json")[1])
    total = sum(result["log_likelihoods"][0])
    assert len(result["log_likelihoods"][0]) == result["tokens"]
    assert result["perplexity"] == pytest.approx(math.exp(-total / result["tokens"]))
    assert result["bits_per_byte"] == pytest.approx(-total / math.log(2) / len(text.encode()))
    assert f"perplexity      {result['perplexity']:.6g}" in dsv32(*run)[1]


# ---- info, fidelity ----


def test_info_of_the_full_model(dsv32, monkeypatch):
    monkeypatch.setattr(convert, "stored_parameters", functools.cache(convert.stored_parameters))
    code, out, _ = dsv32("info", "--config", "671b", "--memory", "--json")
    result = json.loads(out)
    assert code == 0
    assert 671e9 < result["parameters"] < 690e9  # 671B and the MTP layer
    assert result["bytes"] == sum(result["bytes_by_dtype"].values())
    assert result["cache_bytes_per_token"]["bfloat16, fp8 index keys"] == 78324
    assert result["cache_bytes_per_token"]["fp8 records, fp8 index keys"] == 48068
    assert result["memory"]["141 GB GPU (H200)"]["needed_for_weights"] == 6
    _, text, _ = dsv32("info", "--config", "671b", "--memory")
    assert f"{result['parameters']:,}" in text and "48,068" in text


def test_info_counts_a_checkpoint(dsv32, tiny):
    result = json.loads(dsv32("info", "--model", tiny, "--json")[1])
    tensors = read_shard(golden_directory("tiny") / "model" / "model.safetensors")
    assert result["parameters"] == sum(math.prod(shape) for _, shape, _ in tensors.values())
    assert result["max_position_embeddings"] == 256


def test_info_is_of_the_files(dsv32, refused, tiny, tmp_path):
    """It names where the config differs; without a name it describes the demo model."""
    spoilt = shutil.copytree(tiny, tmp_path / "spoilt")
    config = json.loads((spoilt / "config.json").read_text())
    (spoilt / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    info = json.loads(dsv32("info", "--model", spoilt, "--json")[1])
    assert info["layout"] == "hf" and set(info["bytes_by_dtype"]) == {"float32"} == set(info["weights"])
    assert ["torch_dtype is bfloat16" in line for line in info["disagreements"]] == [True]
    assert "disagreement: config.json: torch_dtype is bfloat16" in dsv32("info", "--model", spoilt)[1]
    demo = json.loads(dsv32("info", "--json")[1])
    assert demo["weights"]["fp8_block"]["tensors"] > 100 and demo["disagreements"] == []
    (spoilt / "model.safetensors").unlink()
    assert "no checkpoint" in refused("info", "--model", spoilt)
    assert "--config" in refused("info", "--model", tiny, "--config", "tiny")


def test_fidelity_of_a_checkpoint_with_itself(dsv32, tiny, tmp_path):
    ids = token_file(tmp_path / "ids.npy", load_oracle("tiny"))
    code, out, err = dsv32("fidelity", tiny, tiny, "--token-ids", ids, "--json", *EXACT)
    assert code == 0, err
    for row in json.loads(out)["rows"]:
        assert row["kl"] == 0 and all(layer["topk_recall"] == 1 for layer in row["layers"])
    assert "topk_recall" in dsv32("fidelity", tiny, tiny, "--token-ids", ids, *EXACT)[1]


def test_convert_then_generate_is_the_same(dsv32, tiny, tmp_path):
    assert dsv32("convert", tiny, tmp_path / "converted")[0] == 0
    run = ("generate", "--prompt", "The keeper", "--max-new-tokens", 4, "--json", *EXACT, "--model")
    results = [json.loads(dsv32(*run, model)[1]) for model in (tmp_path / "converted", tiny)]
    assert results[0]["tokens"] == results[1]["tokens"] and results[0]["texts"] == results[1]["texts"]


def test_convert_takes_names_and_writes_the_other_layout(dsv32, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "DEMO", Path(tiny))
    _, out, _ = dsv32("convert", "demo", tmp_path / "orbax", "--json")
    assert json.loads(out) == {"source": "demo", "target": str(tmp_path / "orbax"), "to": "orbax"}
    assert dsv32("convert", tmp_path / "orbax", tmp_path / "hf")[1] == f"wrote {tmp_path / 'hf'} (hf)\n"
    dsv32("convert", tmp_path / "orbax", tmp_path / "copy", "--to", "orbax")
    kinds = {name: convert.checkpoint_kind(tmp_path / name) for name in ("orbax", "hf", "copy")}
    assert kinds == {"orbax": "orbax", "hf": "hf", "copy": "orbax"}
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == Path(tiny, "model.safetensors").read_bytes()


def test_a_target_that_somebody_writes_is_refused_at_once(refused, tiny, tmp_path, monkeypatch):
    """The refusal comes before the calibration on a text."""
    monkeypatch.setattr(calibration, "calibrate", lambda *_: 1 / 0)
    (tmp_path / "text").write_text("The keeper")
    quantize = ("quantize", "--model", tiny, "--scheme", "int8", "--calibration", tmp_path / "text")
    with locked(tmp_path / "out"):
        for command in (("convert", tiny, tmp_path / "out"), (*quantize, "--out", tmp_path / "out")):
            message = refused(*command)
            assert f"{tmp_path / 'out'}: process {os.getpid()} is writing it" in message
    (tmp_path / "out").mkdir()
    assert "exists" in refused(*quantize, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    "verb",
    ["generate", "chat", "score", "tokenize", "info", "convert", "quantize", "fidelity", "diagnose", "serve", "bench"],
)
def test_help_has_an_example(dsv32, verb):
    code, out, _ = dsv32(verb, "--help")
    assert code == 0 and f"Example: dsv32 {verb}" in out


def test_every_verb_has_a_json_form(dsv32):
    commands = get_command(app).commands
    assert len(commands) >= 10
    for verb in commands:
        assert "--json" in dsv32(verb, "--help")[1], verb
    shapes = json.loads(dsv32("bench", "top_k", "--list", "--json")[1])["shapes"]
    assert shapes and {"op", "shape"} < set(shapes[0])


@pytest.mark.parametrize(
    ("words", "expected"),
    [("dsv32 gene", ["generate"]), ("dsv32 generate --prom", ["--prompt", "--prompt-file"])],
)
def test_shells_complete_verbs_and_flags(dsv32, monkeypatch, words, expected):
    monkeypatch.setenv("_DSV32_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    assert dsv32()[1].split() == expected


def test_python_m_is_the_same_command():
    command = [sys.executable, "-m", "dsv32_jax", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(dsv32_jax.__file__).parents[1])
    assert (done.returncode, done.stdout) == (0, f"dsv32-jax {dsv32_jax.__version__}\n"), done.stderr


def test_version_and_unknown_flag(dsv32):
    assert dsv32("--version")[:2] == (0, f"dsv32-jax {dsv32_jax.__version__}\n")
    assert dsv32("generate", "--no-such-flag")[0] == 2


def test_interrupted(dsv32, tiny, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "load", interrupt)
    assert dsv32("generate", "--model", tiny, "--prompt", "a")[0] == 130


@pytest.mark.parametrize("verb", ["generate", "chat", "score", "fidelity", "serve"])
def test_every_verb_that_loads_can_leave_out_the_mtp_layer(refused, tmp_path, monkeypatch, verb):
    def load(name, *, mtp, **_):
        raise UserError(f"loaded with mtp={mtp}")

    monkeypatch.setattr(loading, "load", load)
    np.save(tmp_path / "ids.npy", np.zeros((1, 4), np.int32))
    ids = ("--token-ids", tmp_path / "ids.npy")
    arguments = {"chat": (), "fidelity": ("a", "b", *ids), "serve": ("--port", 0)}.get(verb, ids)
    assert "loaded with mtp=False" in refused(verb, *arguments, "--no-mtp")
    assert "loaded with mtp=True" in refused(verb, *arguments)


def test_fields_that_nobody_knows_are_one_line_of_warning(dsv32, tiny, tmp_path):
    config = json.loads((golden_directory("tiny") / "model" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"frobnication": 1}))
    code, _, err = dsv32("info", "--config", tmp_path / "config.json")
    assert code == 0 and err.startswith("warning: ") and err.endswith("passed over: frobnication\n")
    assert err.count("\n") == 1
