"""Tokenizer and chat template against what transformers made of the same files; streaming."""

import json
import shutil
from pathlib import Path

import pytest

from dsv32_jax.errors import UserError
from dsv32_jax.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "data" / "golden" / "tiny"
CASES = json.loads((GOLDEN / "tokenizer_cases.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(GOLDEN / "model")


@pytest.fixture
def directory(tmp_path):
    """A checkpoint directory whose files a test may change."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "model" / name, tmp_path)
    return tmp_path


def change_settings(directory, **changes):
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(
        json.dumps({name: value for name, value in settings.items() if value is not None}), encoding="utf-8"
    )


@pytest.mark.parametrize("case", CASES["texts"], ids=lambda case: repr(case["text"][:12]))
def test_text_ids(tokenizer, case):
    assert tokenizer.encode(case["text"]) == case["ids"]


@pytest.mark.parametrize("case", CASES["chats"], ids=lambda case: str(len(case["messages"])))
def test_chats(tokenizer, case):
    options = {"add_generation_prompt": case["add_generation_prompt"]}
    assert tokenizer.render_chat(case["messages"], **options) == case["rendered"]
    assert tokenizer.encode_chat(case["messages"], **options) == case["ids"]


def test_bos_is_put_in_front_once(tokenizer):
    plain = tokenizer.encode("hi")
    assert tokenizer.encode("hi", bos=True) == [tokenizer.bos_id, *plain]
    assert tokenizer.encode("<｜begin▁of▁sentence｜>hi", bos=True) == [tokenizer.bos_id, *plain]


@pytest.mark.parametrize("case", CASES["texts"], ids=lambda case: repr(case["text"][:12]))
def test_streaming_joins_to_the_decoded_text(tokenizer, case):
    decoder = tokenizer.stream_decoder()
    pieces = [decoder.add(id) for id in case["ids"]]
    assert "".join(pieces) + decoder.finish() == tokenizer.decode(case["ids"])
    assert not any("\ufffd" in piece for piece in pieces)


def test_streaming_holds_back_part_of_a_character(tokenizer):
    ids = tokenizer.encode("🙂")
    assert len(ids) > 1  # otherwise nothing is held back
    decoder = tokenizer.stream_decoder()
    assert [decoder.add(id) for id in ids[:-1]] == [""] * (len(ids) - 1)
    assert decoder.add(ids[-1]) == "🙂"
    assert decoder.add(ids[0]) == ""
    assert decoder.finish() == "\ufffd"


def test_ids_without_a_token_have_no_text(tokenizer):
    assert tokenizer.decode([511, -1, tokenizer.eos_id]) == ""
    decoder = tokenizer.stream_decoder()
    assert decoder.add(511) + decoder.add(tokenizer.eos_id) == ""


def test_every_token_streams_as_it_decodes(tokenizer):
    for id in range(tokenizer.vocab_size):
        decoder = tokenizer.stream_decoder()
        assert decoder.add(id) + decoder.finish() == tokenizer.decode([id])


SYSTEM, HI = {"role": "system", "content": "SYS"}, {"role": "user", "content": "Hi"}


def test_built_in_template_where_the_checkpoint_has_none(directory):
    change_settings(directory, chat_template=None)
    tokenizer = Tokenizer(directory)
    start = "<｜begin▁of▁sentence｜>SYS<｜User｜>Hi<｜Assistant｜>"
    assert tokenizer.render_chat([SYSTEM, HI]) == start + "</think>"
    assert tokenizer.render_chat([SYSTEM, HI], thinking=True) == start + "<think>"
    past = [SYSTEM, SYSTEM, HI, {"role": "assistant", "content": "reasons</think>answer"}, HI]
    assert tokenizer.render_chat(past, add_generation_prompt=False) == (
        "<｜begin▁of▁sentence｜>SYS\n\nSYS<｜User｜>Hi<｜Assistant｜></think>answer<｜end▁of▁sentence｜><｜User｜>Hi"
    )


def test_template_file_goes_first(directory):
    (directory / "chat_template.jinja").write_text("{{ messages | length }} {{ messages[0] | tojson }}")
    assert Tokenizer(directory).render_chat([HI]) == '1 {"role": "user", "content": "Hi"}'


def test_template_whitespace_as_transformers_trims_it(directory):
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}\n  {% if true %}\nx\n  {% endif %}\n{% endfor %}"
    )
    assert Tokenizer(directory).render_chat([HI, HI]) == "x\nx\n"


def test_bad_files_are_named(directory):
    with pytest.raises(UserError, match="unknown role tool"):
        Tokenizer(directory).render_chat([{"role": "tool", "content": ""}])
    (directory / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(UserError, match="chat_template"):
        Tokenizer(directory).render_chat([HI])
    (directory / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config"):
        Tokenizer(directory)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a readable tokenizer"):
        Tokenizer(directory)
