"""JSON and text files: broken links, nesting, byte order marks."""

import json

import pytest

from dsv32_jax.common.reading import DEEPEST, decoded, read_json
from dsv32_jax.convert.unfinished import read_journal
from dsv32_jax.errors import UserError
from dsv32_jax.generate import loading


@pytest.mark.parametrize("depth", [DEEPEST, 900, 100_000])
@pytest.mark.parametrize("bracket", ["[]", "{}"])
def test_nesting_that_python_cannot_walk_is_refused(tmp_path, depth, bracket):
    opening = '{"a":' if bracket == "{}" else "["
    file = tmp_path / "config.json"
    file.write_text('{"a":' + opening * depth + "1" + bracket[1] * depth + "}")
    with pytest.raises(UserError, match=f"{file} is not valid JSON: .*nested more than {DEEPEST}"):
        read_json(file)
    file.rename(tmp_path / ".progress.json")
    assert read_journal(tmp_path) == {}


def test_nesting_up_to_the_limit_is_read(tmp_path):
    (tmp_path / "config.json").write_text('{"a":' * DEEPEST + "1" + "}" * DEEPEST)
    assert read_json(tmp_path) == json.loads((tmp_path / "config.json").read_text())


def test_a_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": "\xef\xbb\xbf"}')
    assert read_json(tmp_path) == {"a": "\ufeff"}
    assert decoded(b"\xef\xbb\xbfab") == "ab"


def test_checkpoints_with_a_link_that_leads_nowhere(tmp_path):
    for name, read in {"config.json": loading.find, "tokenizer.json": loading.read_tokenizer}.items():
        (tmp_path / name).symlink_to("blob")
        with pytest.raises(UserError, match=f"{name}: is a link to blob, which is missing"):
            read(tmp_path)
