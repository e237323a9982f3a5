"""Tokenizer and chat template against what transformers made of the same files; streaming."""

import copy
import json
import shutil
from pathlib import Path

import pytest

from dsv32_jax.config import ModelConfig
from dsv32_jax.engine.request import SamplingParams
from dsv32_jax.errors import CheckpointWarning, UserError
from dsv32_jax.generate.prompts import rows_of
from dsv32_jax.generate.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "tiny"
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


# ---- what other tools leave in the files ----

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
LONG = "The lighthouse keeper counts the ships that pass in the night. " * 4


def change_tokenizer(directory, change):
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def write(directory, **files):
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


TRUNCATION = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 600}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 2, "pad_type_id": 0,
    "pad_token": "<｜▁pad▁｜>",
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(truncation=TRUNCATION),
        lambda content: content.update(padding=PADDING),
        lambda content: content.update(truncation=TRUNCATION, padding=PADDING),
        lambda content: content["model"].update(dropout=0.9),
    ],
)
def test_what_a_batch_or_a_training_left_in_tokenizer_json_is_not_obeyed(directory, tokenizer, change):
    change_tokenizer(directory, change)
    other = Tokenizer(directory)
    assert other.encode(LONG, bos=True) == tokenizer.encode(LONG, bos=True) and len(other.encode(LONG)) > 8
    assert other.encode_chat([HI]) == tokenizer.encode_chat([HI])


@pytest.mark.parametrize("add_bos_token", [True, False, None])
@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer_config": {}},
        {"tokenizer_config": {"bos_token": None}},
        {"tokenizer_config": {"bos_token": BOS}},
        {"tokenizer_config": {"bos_token": {"content": BOS, "special": True}}},
        {"special_tokens_map": {"bos_token": BOS}, "tokenizer_config": {"bos_token": None}},
        {"special_tokens_map": {"bos_token": {"content": BOS}}, "config": {"bos_token_id": None}},
        {"special_tokens_map": {"bos_token": None}},
    ],
)
def test_the_bos_token_is_found_wherever_a_file_names_it(directory, tokenizer, files, add_bos_token):
    (directory / "tokenizer_config.json").unlink()
    files = {"config": {"bos_token_id": 0, "eos_token_id": [1, 5]}} | files
    if "tokenizer_config" in files and add_bos_token is not None:
        files["tokenizer_config"] = files["tokenizer_config"] | {"add_bos_token": add_bos_token}
    write(directory, **files)
    changed = Tokenizer(directory)
    assert (changed.bos_id, changed.special_tokens["bos_token"]) == (0, BOS)
    assert changed.encode("hi", bos=True) == tokenizer.encode("hi", bos=True)
    if files["config"]["bos_token_id"] == 0:
        assert (changed.eos_id, changed.special_tokens["eos_token"]) == (1, EOS)


def test_a_special_token_that_is_only_in_the_vocabulary_is_one(directory, tokenizer):
    def change(content):
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != BOS]
        content["model"]["vocab"][BOS] = 0

    change_tokenizer(directory, change)
    changed = Tokenizer(directory)
    assert changed.encode(f"{BOS}hi") == tokenizer.encode(f"{BOS}hi")
    assert changed.decode([0]) == changed.stream_decoder().add(0) == ""


def test_tokens_that_only_tokenizer_config_adds_are_known(directory):
    size = Tokenizer(directory).vocab_size
    change_settings(directory, added_tokens_decoder={str(size): {"content": "<extra>", "special": True}})
    write(directory, added_tokens={"<more>": size + 1})
    changed = Tokenizer(directory)
    assert changed.encode("<extra><more>") == [size, size + 1]
    assert changed.decode([size, size + 1]) == "<more>"


def test_a_bos_token_that_is_plain_text_is_none_and_is_said_so(directory):
    change_settings(directory, bos_token=None)
    write(directory, config={"bos_token_id": 40})
    with pytest.warns(CheckpointWarning, match="bos_token_id 40"):
        assert Tokenizer(directory).bos_id is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bos_token": 5}, "bos_token is 5"),
        ({"eos_token": ["a"]}, 'eos_token is \\["a"\\]'),
        ({"pad_token": {"text": "a"}}, "pad_token is .*text"),
        ({"bos_token": "<s>"}, "bos_token '<s>' is no token of tokenizer.json"),
        ({"eos_token": "</s>"}, "eos_token '</s>' is no token of tokenizer.json"),
        ({"bos_token": EOS}, "bos_token .* is token 1, and config.json's bos_token_id is 0"),
        ({"chat_template": 5}, "chat_template is 5"),
        ({"chat_template": [{"name": "default"}]}, "chat_template is"),
        ({"added_tokens_decoder": {"0": {"content": "other"}}}, "'other' is token 0"),
        ({"added_tokens_decoder": {"0": "other"}}, "added_tokens_decoder"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder"),
    ],
)
def test_settings_of_wrong_types_or_that_contradict_are_refused_by_name(directory, settings, words):
    write(directory, config={"bos_token_id": 0})
    change_settings(directory, **{"chat_template": None} | settings)
    with pytest.raises(UserError, match=rf"(tokenizer_config.json: |{directory}: ).*({words})") as refusal:
        Tokenizer(directory)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"special_tokens_map": {"bos_token": EOS}}, "token 0, and special_tokens_map.json names 1"),
        ({"special_tokens_map": {"bos_token": {"content": EOS}}, "config": {}}, "special_tokens_map.json names 1"),
        ({"special_tokens_map": {"bos_token": "<s>"}}, "bos_token '<s>' is no token"),
        ({"config": {"bos_token_id": 1}}, "config.json's bos_token_id is 1"),
        ({"generation_config": {"bos_token_id": 1}}, "generation_config.json's bos_token_id is 1"),
    ],
)
def test_all_that_name_the_bos_token_must_agree(directory, files, words):
    write(directory, **{"config": {"bos_token_id": 0}} | files)
    with pytest.raises(UserError, match=words):
        Tokenizer(directory)


@pytest.mark.parametrize(
    "added", [{"<extra>": 3072.9}, {"<extra>": True}, {"<extra>": "3072"}, {"\ud800": 3072}, {"<extra>": None}]
)
def test_ids_of_added_tokens_are_whole_numbers(directory, added):
    write(directory, added_tokens=added)
    with pytest.raises(UserError, match=r"added_tokens\.json"):
        Tokenizer(directory)


@pytest.mark.parametrize(
    "name",
    ["tokenizer_config", "special_tokens_map", "added_tokens", "config", "generation_config", "chat_template.jinja"],
)
def test_a_link_that_leads_nowhere_is_no_absent_file(directory, name):
    link = directory / (name if "." in name else f"{name}.json")
    link.unlink(missing_ok=True)
    link.symlink_to(directory / "blobs" / "1")
    with pytest.raises(UserError, match=f"{link.name}: is a link to .*blobs/1"):
        Tokenizer(directory)


def test_the_template_named_default_is_used(directory):
    change_settings(
        directory, chat_template=[{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}]
    )
    assert Tokenizer(directory).render_chat([HI]) == "a"
    change_settings(directory, chat_template=[{"name": "tool_use", "template": "b"}])
    with pytest.raises(UserError, match="named default"):
        Tokenizer(directory).render_chat([HI])


FAILING = [
    ("{{ 1/0 }}", "ZeroDivisionError"),
    ("{{ 1 + 'a' }}", "TypeError"),
    ("{{ 10.0 ** 400 }}", "OverflowError"),
    ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
    ("{{ messages[9]['content'] }}", "undefined|no element"),
    ("{{ strftime_now(5) }}", "TypeError"),
    ("{% for %}", "Expected|expected"),
    ("{{ range(10 ** 9) | list }}", "OverflowError"),
]


@pytest.mark.parametrize(("template", "words"), FAILING)
def test_a_template_that_fails_does_so_in_one_line(directory, template, words):
    change_settings(directory, chat_template=template)
    with pytest.raises(UserError, match=f"^chat_template: .*({words})") as refusal:
        Tokenizer(directory).render_chat([HI])
    assert "\n" not in str(refusal.value)


def test_byte_order_marks_are_dropped_from_all_files(directory, tokenizer):
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    write(directory, config={"bos_token_id": 0}, special_tokens_map={}, added_tokens={})
    for path in directory.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    marked = Tokenizer(directory)
    assert marked.encode_chat([HI]) == tokenizer.encode(HI["content"])


@pytest.mark.parametrize("entry", [{"name": "default", "template": 5}, {"name": ["default"], "template": "a"}])
def test_a_template_that_is_no_text_is_refused(directory, tokenizer, entry):
    change_settings(directory, chat_template=[entry])
    with pytest.raises(UserError, match="chat_template is"):
        Tokenizer(directory)
    other = copy.copy(tokenizer)
    other.chat_template = 5
    with pytest.raises(UserError, match="chat_template: 5; must be a text"):
        other.render_chat([HI])


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages: there is none"),
        ("hi", "messages: 'hi'; must be a list"),
        (None, "messages: None"),
        (HI, "messages: {.*; must be a list"),
        ([HI, "hi"], "messages 1: 'hi'; must be a mapping"),
        ([HI, {"content": "a"}], "messages 1: has no role"),
        ([HI, {"role": "user"}], "messages 1: has no content"),
        ([HI, {"role": "user", "content": None}], "messages 1, content: None; must be a text"),
        ([HI, {"role": "user", "content": 5}], "messages 1, content: 5; must be a text"),
        ([HI, {"role": 5, "content": "a"}], "messages 1, role: 5; must be a text"),
        ([HI, {"role": "user", "content": "a\ud800"}], "messages 1, content: character 1 is '.ud800'"),
        ([HI, {"role": "user", "content": [{"type": "image_url"}]}], "messages 1, content: .* parts of type text"),
        ([HI, {"role": "user", "content": [{"type": "text"}]}], "messages 1, content: None; must be a text"),
    ],
)
def test_messages_that_are_none_are_named_by_number(tokenizer, messages, words):
    for use in (tokenizer.render_chat, tokenizer.encode_chat):
        with pytest.raises(UserError, match=f"^{words}") as refusal:
            use(messages)
        assert "\n" not in str(refusal.value)


def test_parts_of_type_text_are_joined_and_tool_calls_are_the_templates(directory, tokenizer):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    joined = tokenizer.encode_chat([{"role": "user", "content": "a\nb"}])
    assert tokenizer.encode_chat([{"role": "user", "content": parts}]) == joined
    change_settings(directory, chat_template="{{ messages[0].content is none }} {{ messages[0].tool_calls }}")
    assert Tokenizer(directory).render_chat([{"role": "assistant", "tool_calls": [1]}]) == "True [1]"


@pytest.mark.parametrize("text", ["a\ud800", "\udfff", 5, None, b"a"])
def test_what_is_no_text_is_not_encoded(tokenizer, text):
    with pytest.raises(UserError, match=r"^text: "):
        tokenizer.encode(text)
    with pytest.raises(UserError, match=r"^stop: "):
        SamplingParams(stop=[text])
    if isinstance(text, str):
        with pytest.raises(UserError, match=r"^prompt 1: "):
            rows_of(["a", text], ModelConfig.tiny(vocab_size=5000), tokenizer)
