"""The comparison of two models: what it says, and what it refuses."""

import json

import pytest

from dsv32_jax.errors import UserError
from dsv32_jax.experiments.workbench import compare as module
from dsv32_jax.experiments.workbench.compare import compare, lines
from dsv32_jax.experiments.workbench.cost import Work, alternately, ratio
from dsv32_jax.experiments.workbench.settings import Setting
from dsv32_jax.experiments.workbench.tables import WIDEST, number, times
from tests.harness import TEXT


def test_models_of_other_shapes_are_refused(small, monkeypatch):
    other = type(small)(small.model, small.config.replace(vocab_size=300), small.tokenizer)
    with pytest.raises(UserError, match="B: vocab_size is 300, and of A 512"):
        compare((small, other), (Setting(), Setting()), None, Work(1, 64, 16))


def test_steps_take_turns_and_a_difference_is_beyond_the_spread(monkeypatch):
    calls = []

    class Timer:
        name = "planted"

        def once(self, run, spin):
            calls.append(run())
            return {"slow": 2.0, "fast": 1.0}[calls[-1]]

    slow, fast = alternately(Timer(), [lambda: "slow", lambda: "fast"], 3)
    assert calls == ["slow", "fast", "fast", "slow", "slow", "fast"]
    assert ratio(slow, fast) == {"median": 2, "min": 2, "max": 2, "differs": True}
    drifting = ratio([1.0, 2.0, 3.0], [0.9, 1.8, 2.7])  # faster each time, by less than the times are apart
    assert not drifting["differs"] and drifting["median"] == pytest.approx(1 / 0.9)
    noise = ratio([1.0, 1.1, 0.9], [1.0, 1.0, 1.0])
    assert not noise["differs"] and times(noise) == "(1.00x)"
    assert times(ratio([1.0], [2.0])) == "0.500x"


def test_numbers_of_a_table():
    assert [number(x) for x in (None, 0, 0.01234, 12.345, 123.4, 12345)] == [
        "-",
        "0.00",
        "0.0123",
        "12.3",
        "123",
        "12,345",
    ]


def test_the_command_names_what_is_wrong(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "compare", lambda *_: pytest.fail("measured all the same"))
    assert "--set topk=4" in refused("compare", "demo", "--set", "topk=4")
    assert "--set-a topk=4" in refused("compare", "demo", "--set-a", "topk=4")
    assert "is a directory" in refused("compare", "demo", "--out", tmp_path)
    assert "full-width:N" in refused("compare", "full-width")
    assert "context 100" in refused("compare", "demo", "--context", 100)
    assert "at most max_position_embeddings" in refused("compare", "demo", "--context", 64 * 4096)


def test_one_model_under_two_settings(dsv32, small, monkeypatch, tmp_path):
    monkeypatch.setattr("dsv32_jax.experiments.workbench.models.model_named", lambda name, mtp: small)
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text(TEXT)
    sizes = ("--context", 64, "--prompt-tokens", 16, "--rounds", 1, "--window", 32, "--windows", 1, "--needles", 0)
    change = ("--set", "index_topk=4", "--part", "index_select=recent")
    code, stdout, err = dsv32("compare", *change, "--text-file", text, *sizes, "--out", out, "--json")
    assert code == 0, err
    content = json.loads(stdout)
    assert content == json.loads(out.read_text())
    a, b = content["rows"]
    assert content["changed"] == ["options.index_topk", "parts.index_select"]
    assert content["texts"] == {"source": "text.txt", "windows": 1, "tokens": 32, "needles": 0}
    assert (a["quality"]["kl"], a["quality"]["recall"]) == (0, 1)
    assert b["quality"]["kl"] > 0 and b["quality"]["recall"] <= 0.5  # 4 of 8 positions at most
    assert a["memory"]["weights"] == b["memory"]["weights"] > 0
    assert content["device"] and content["date"] and content["versions"]["jax"]
    table = lines(content)
    assert max(map(len, table)) <= WIDEST
    assert any(line.startswith("recall of A's chosen positions") and "100.0%" in line for line in table)
    assert any("quality is left out" in line for line in lines({**content, "texts": None}))
