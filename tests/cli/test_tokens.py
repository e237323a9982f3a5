"""`dsv32 tokenize`."""

import io
import json
import shutil
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv32_jax.cli.tokens import _ids_of
from dsv32_jax.generate import loading

TEXT = "The keeper <｜User｜> 海风\n"


def test_text_and_ids_are_inverse(dsv32, monkeypatch):
    code, ids, _ = dsv32("tokenize", TEXT)
    tokenizer = loading.read_tokenizer(loading.DEMO)
    assert code == 0 and list(map(int, ids.split())) == tokenizer.encode(TEXT)
    assert dsv32("tokenize", "--decode", *ids.split())[1] == TEXT + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(ids))
    assert dsv32("tokenize", "--decode")[1] == TEXT + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(tokenizer.encode(TEXT))))
    assert dsv32("tokenize", "--decode", "--skip-special-tokens")[1] == "The keeper  海风\n\n"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3071), max_size=9))
def test_ids_are_read_as_they_are_printed(ids):
    tokenizer = loading.read_tokenizer(loading.DEMO)
    for text in (" ".join(map(str, ids)), json.dumps(ids), ",".join(map(str, ids)), "\n".join(map(str, ids)) + "\n"):
        assert _ids_of(text, tokenizer) == ids


def test_tokens_have_texts_and_special_ones_are_marked(dsv32, tmp_path):
    (tmp_path / "text.txt").write_text("ab<｜User｜>", encoding="utf-8")
    run = ("tokenize", "--model", "demo", "--text-file", tmp_path / "text.txt", "--bos")
    result = json.loads(dsv32(*run, "--json")[1])
    assert result["tokens"] == ["<｜begin▁of▁sentence｜>", "ab", "<｜User｜>"]
    assert result["special"] == [True, False, True]
    assert result["ids"][0] == 0 and result["count"] == 3
    assert dsv32(*run, "--count")[1] == "3\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--decode", "3072"), "no token 3072; it has 3072"),
        (("--decode", "-1"), "No such option: -1"),
        (("--decode", "1.5"), "1.5 is no token id"),
        (("--decode", "9" * 40), "no token 999"),
        (("--decode", "9" * 5000), "no token 9999999999999999999999999999999999999999...;"),
        (("--decode", "x" * 5000), "xxx... is no token id"),
        (("--decode", "--bos", "1"), "--bos"),
        (("--skip-special-tokens", "a"), "--skip-special-tokens"),
        (("--text-file", "absent.txt"), "--text-file absent.txt: cannot be read"),
        (("--text-file", "absent.txt", "a"), "give one of the two"),
    ],
)
def test_wrong_input(refused, arguments, message):
    assert message in refused("tokenize", *arguments)


def test_standard_input_that_is_no_text(refused, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert "standard input: not UTF-8 text (byte 2)" in refused("tokenize")


def test_a_byte_order_mark_is_no_text(dsv32, monkeypatch, tmp_path):
    expected = dsv32("tokenize", "ab")[1]
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfab")
    assert dsv32("tokenize", "--text-file", tmp_path / "text.txt")[1] == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfab")))
    assert dsv32("tokenize")[1] == expected


def test_a_checkpoint_without_a_tokenizer(refused, tiny, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "model")
    (model / "tokenizer.json").unlink()
    assert "no tokenizer.json" in refused("tokenize", "--model", model, "a")
