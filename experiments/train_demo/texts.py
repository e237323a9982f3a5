"""Makes training data without a download: of the user's text files, or of the held-out text that ships.

A folder in that of the run gets the files that `python -m experiments.train_demo data` makes: a tokenizer, `train.npz`,
`held_out.npz`, and for the shipped text questions and answers.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dsv32_jax.common.reading import decoded
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.results import write_json
from dsv32_jax.experiments.studies import held_out
from dsv32_jax.experiments.train_demo import questions
from dsv32_jax.experiments.train_demo import tokenizer as demo_tokenizer
from dsv32_jax.generate.loading import DEMO
from dsv32_jax.generate.tokenizer import Tokenizer

HELD_OUT_SHARE = 0.05
"""The share of each text, at its end, that is not trained on."""
SETTINGS = "text.json"
TOKENIZERS = ("demo", "own")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class Text(NamedTuple):
    """A text and where it comes from."""

    name: str
    text: str


def read(files: Sequence[Path]) -> list[Text]:
    """The texts of UTF-8 files.

    Raises:
      UserError: a file cannot be read, is given twice, is empty, or is no UTF-8 text.
    """
    texts: list[Text] = []
    for file in files:
        if any(file.resolve() == Path(text.name).resolve() for text in texts):
            raise UserError(f"--text {file}: is given twice")
        try:
            text = decoded(file.read_bytes())
        except OSError as error:
            raise UserError(f"--text {file}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise UserError(
                f"--text {file}: is no UTF-8 text (byte {error.start} is {error.object[error.start]:#x})"
            ) from error
        if not text.strip():
            raise UserError(f"--text {file}: is empty")
        texts.append(Text(str(file), text))
    return texts


def split(text: str) -> tuple[str, str]:
    """What is trained on, and the end of the text, which is held out; cut behind a paragraph, a line or a word."""
    cut = round(len(text) * (1 - HELD_OUT_SHARE))
    for gap in ("\n\n", "\n", " "):
        at = text.rfind(gap, round(len(text) * (1 - 2 * HELD_OUT_SHARE)), cut)
        if at >= 0:
            return text[: at + len(gap)], text[at + len(gap) :]
    return text[:cut], text[cut:]


def of_files(folder: Path, files: Sequence[Path], tokenizer: str, vocab_size: int, length: int) -> Path:
    """Makes the data of the user's files; see `_prepared`.

    Args:
      folder: of the data.
      files: UTF-8 texts.
      tokenizer: "demo", the shipped model's, or "own", one that is trained on these texts.
      vocab_size: of the model, and of a tokenizer of its own.
      length: tokens of the longest sequences; there must be enough for two.
    """
    if tokenizer not in TOKENIZERS:
        raise UserError(f"--tokenizer {tokenizer}: unknown; it is one of {', '.join(TOKENIZERS)}")
    texts = read(files)
    parts = [split(text.text) for text in texts]
    names = ", ".join(text.name for text in texts)
    return _prepared(folder, f"--text {names}", parts, tokenizer, vocab_size, length)


def shipped(folder: Path, vocab_size: int, length: int) -> Path:
    """Makes the data of the shipped held-out text: the end of each document is held out again.

    Questions and answers are made from the documents, and greetings written by hand.
    """
    documents = held_out.documents()
    pairs = [*questions.greetings_pairs(), *questions.select({**d, "split": "train"} for d in documents)]
    parts = [split(document["text"]) for document in documents]
    return _prepared(folder, held_out.HELD_OUT.name, parts, "demo", vocab_size, length, pairs)


def _prepared(
    folder: Path,
    name: str,
    parts: Sequence[tuple[str, str]],
    tokenizer: str,
    vocab_size: int,
    length: int,
    pairs: Sequence[questions.Pair] = (),
) -> Path:
    """Makes the folder as a whole or not at all, unless it exists.

    Raises:
      UserError: the folder holds the data of another text, or there are too few tokens.
    """
    digest = hashlib.sha256(repr((parts, pairs)).encode()).hexdigest()
    settings = {"text": name, "sha256": digest, "tokenizer": tokenizer, "vocab_size": vocab_size}
    if (folder / SETTINGS).exists():
        present = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if {**settings, "text": ""} != {**present, "text": ""}:
            raise UserError(
                f"{folder.parent}: holds a run on another text ({present['text']}) or with another tokenizer; give "
                f"another --run or remove it"
            )
        return folder
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    new_parents = [parent for parent in fresh.parents if not parent.exists()]
    fresh.mkdir(parents=True)
    try:
        if tokenizer == "own":
            demo_tokenizer.write(fresh, [text for text, _ in parts], vocab_size)
        else:
            for file in TOKENIZER_FILES:
                shutil.copyfile(DEMO / file, fresh / file)
        encode = demo_tokenizer.load(fresh)
        train = demo_tokenizer.encode(encode, [text for text, _ in parts], name)
        min_tokens = 2 * (length - 1) + 1
        if len(train["tokens"]) < min_tokens:
            raise UserError(
                f"{name}: {len(train['tokens'])} tokens to train on are too few for sequences of {length}; there must "
                f"be {min_tokens}, about {4 * min_tokens} characters"
            )
        demo_tokenizer.save(fresh / "train.npz", **train)
        held_out_texts = [text for _, text in parts if text]
        demo_tokenizer.save(fresh / "held_out.npz", **demo_tokenizer.encode(encode, held_out_texts, "held out"))
        if pairs:
            demo_tokenizer.save(fresh / "questions.npz", **questions.encode_pairs(Tokenizer(fresh), pairs))
        write_json(fresh / SETTINGS, settings)
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        for parent in new_parents:
            with contextlib.suppress(OSError):  # a folder that is no longer empty stays
                parent.rmdir()
    return folder
