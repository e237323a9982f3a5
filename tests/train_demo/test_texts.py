"""Data for training from the shipped text and from files of one's own, whole or not there."""

import json

import numpy as np
import pytest

from dsv32_jax.errors import UserError
from dsv32_jax.experiments.studies import held_out
from dsv32_jax.experiments.train_demo import texts
from dsv32_jax.experiments.train_demo.batches import Batches
from dsv32_jax.experiments.train_demo.sizes import SIZES
from dsv32_jax.experiments.train_demo.stages import Training
from dsv32_jax.generate.tokenizer import Tokenizer
from tests.harness import TEXT

TINY = SIZES["tiny"]
LENGTH = max(stage.length for stage in TINY.stages)


def of_files(folder, *files, tokenizer="demo", length=LENGTH):
    return texts.of_files(folder / "data", files, tokenizer, TINY.config.vocab_size, length)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"{n}. {TEXT}" for n in range(12)) + "\nDer Müller mahlt ☃.", encoding="utf-8")
    return path


def test_the_shipped_text_feeds_every_tiny_stage_without_a_download(tmp_path):
    data = texts.shipped(tmp_path / "run" / "data", TINY.config.vocab_size, LENGTH)
    batches = Batches(data)
    for number, stage in enumerate(TINY.stages):
        batch = batches(stage, number, 0)
        assert batch.ids.shape[1] <= stage.length and batch.weights.any()
        assert 0 <= batch.ids.min() and batch.ids.max() < TINY.config.vocab_size
    assert len(batches.question_starts) > 100
    trained = Tokenizer(data).decode(batches.tokens.astype(int).tolist())
    for document in held_out.documents()[:3]:  # its end is held out again
        assert document["text"][:300] in trained and document["text"][-300:] not in trained
    assert texts.shipped(data, TINY.config.vocab_size, LENGTH) == data


def test_a_text_of_ones_own_comes_back_in_two_parts(file, tmp_path):
    data = of_files(tmp_path / "run", file)
    decode = Tokenizer(data).decode
    parts = [
        decode(np.load(data / name)["tokens"][1:-1].astype(int).tolist()) for name in ("train.npz", "held_out.npz")
    ]
    assert "".join(parts) == file.read_text(encoding="utf-8")
    assert 0.02 < len(parts[1]) / len("".join(parts)) < 0.12
    assert not (data / "questions.npz").exists()


def test_a_text_without_questions_leaves_out_the_stages_that_need_them(file, tmp_path, capsys):
    run = Training("tiny", tmp_path / "run", of_files(tmp_path / "run", file))
    assert [stage.name for stage in run.stages] == ["pretrain", "long", "warmup", "sparse"]
    run.tell_plan()
    assert "learn to chat are left out" in capsys.readouterr().out


def test_a_tokenizer_of_its_own_is_trained_on_the_text(file, tmp_path):
    lengths = []
    for tokenizer in texts.TOKENIZERS:
        data = of_files(tmp_path / tokenizer, file, tokenizer=tokenizer)
        lengths.append(len(np.load(data / "train.npz")["tokens"]))
    assert lengths[1] < 0.8 * lengths[0]  # twelve times the same paragraph


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"caf\xe9 " * 500, r"is no UTF-8 text \(byte 3 is 0xe9\)"),
        (b"\xff\xfeh\x00i\x00", "is no UTF-8 text"),
        (b"only a few words", r"\d tokens to train on are too few for sequences of 128; there must be 255"),
        (None, "No such file"),
    ],
)
def test_what_cannot_be_trained_on_is_named_and_nothing_is_left(content, message, tmp_path):
    path = tmp_path / "given.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"--text \S*given\.txt: .*{message}"):
        of_files(tmp_path / "new" / "run", path)
    assert not (tmp_path / "new").exists()


def test_a_folder_a_file_given_twice_and_an_unknown_tokenizer_are_refused(file, tmp_path):
    for files, options, message in (
        ([tmp_path], {}, "Is a directory"),
        ([file, tmp_path / "." / "text.txt"], {}, "given twice"),
        ([file], {"tokenizer": "other"}, "--tokenizer other: unknown"),
    ):
        with pytest.raises(UserError, match=message):
            of_files(tmp_path / "run", *files, **options)
    assert not (tmp_path / "run").exists()


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfabc")
    assert texts.read([path])[0].text == "abc"


def test_a_run_goes_on_with_its_own_text_alone(file, tmp_path):
    run = tmp_path / "run"
    data = of_files(run, file)
    before = (data / "train.npz").stat().st_mtime_ns
    assert of_files(run, file) == data and (data / "train.npz").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds a run on another text"):
        of_files(run, file, tokenizer="own")
    file.write_text(file.read_text(encoding="utf-8") + "More.", encoding="utf-8")
    with pytest.raises(UserError, match=r"holds a run on another text \(--text .*give another --run"):
        of_files(run, file)
    assert (data / "train.npz").stat().st_mtime_ns == before


def test_a_text_splits_behind_a_paragraph_a_line_or_a_word():
    for gap in ("\n\n", "\n", " "):
        first, rest = texts.split(gap.join(["word"] * 100))
        assert first.endswith("word" + gap) and rest.startswith("word")
    assert texts.split("x" * 100) == ("x" * 95, "x" * 5)


def test_settings_say_what_the_data_were_made_of(file, tmp_path):
    settings = json.loads((of_files(tmp_path / "run", file) / texts.SETTINGS).read_text())
    assert str(file) in settings["text"] and settings["tokenizer"] == "demo"
