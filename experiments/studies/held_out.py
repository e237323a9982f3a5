"""The held-out text: documents that the demo model never saw, for every figure of accuracy."""

import collections
import json
import lzma
import re
from pathlib import Path
from typing import Any

import numpy as np

from dsv32_jax.common.files import whole_file
from dsv32_jax.common.reading import read_json
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.reading import json_lines
from dsv32_jax.experiments.train_demo import corpus
from dsv32_jax.generate.tokenizer import Tokenizer

HELD_OUT = Path(__file__).parent / "held_out.jsonl.xz"
SHORTEST, LONGEST = 13_000, 16_000
"""Characters of the shortest document that is chosen, and of the longest excerpt: a little more than 4096 tokens of the
demo model."""
PER_PACKAGE = 3
SHORT = 60
"""Characters of a paragraph that is so short that many texts may contain it."""


def documents(path: Path = HELD_OUT) -> list[dict[str, Any]]:
    """Dicts of `package`, `path`, `license` and `text`, in the order of the file."""
    return list(json_lines(path))


def choose(data: Path, path: Path) -> None:
    """Writes the file: long documents of the corpus's held-out split, cut, few of any one package.

    It leaves out paragraphs that a training document contains, whatever their case and punctuation.

    Args:
      data: the folder of `dsv32_jax.experiments.train_demo.corpus`.
      path: of the file.
    """
    manifest = read_json(data / "manifest.json")
    packages = {package["name"]: package for package in manifest["packages"]}
    trained_paragraphs = {
        fingerprint(paragraph)
        for document in corpus.read_documents(data, "train")
        for paragraph in document["text"].split("\n\n")
    }
    excerpts: list[dict[str, Any]] = []
    count: collections.Counter[str] = collections.Counter()
    for document in corpus.read_documents(data, "held-out"):
        name = document["package"]
        if count[name] == PER_PACKAGE:
            continue
        paragraphs = document["text"].split("\n\n")
        text = "\n\n".join(p for p in paragraphs if len(p) <= SHORT or fingerprint(p) not in trained_paragraphs)[
            :LONGEST
        ]
        if len(text) < SHORTEST:
            continue
        count[name] += 1
        source = {"package": name, "version": packages[name]["version"], "path": document["path"]}
        excerpts.append(source | {"license": packages[name]["license"], "text": text[: text.rfind("\n") + 1]})
    with whole_file(path) as temporary, lzma.open(temporary, "wt", encoding="utf-8", preset=9) as file:
        file.writelines(json.dumps(document, ensure_ascii=False) + "\n" for document in excerpts)


def fingerprint(paragraph: str) -> int:
    """A hash that is the same for paragraphs that only differ in case, spaces and punctuation."""
    return hash(re.sub(r"\W+", " ", paragraph).strip().lower())


def windows(tokenizer: Tokenizer, length: int, count: int | None = None) -> np.ndarray:
    """The first `length` tokens (beginning-of-sentence token included) of each document that has as many.

    Returns:
      int32 [windows, length], at most `count`.

    Raises:
      UserError: no document is that long.
    """
    rows = []
    for document in documents():
        ids = tokenizer.encode(document["text"], bos=True)
        if len(ids) >= length:
            rows.append(ids[:length])
        if len(rows) == count:
            break
    if not rows:
        raise UserError(f"length {length}: no held-out document has as many tokens")
    return np.asarray(rows, np.int32)


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """int64 [V]: bytes of text that each id stands for; 0 for special tokens."""
    return np.array([len(tokenizer.token_bytes(id)) for id in range(vocab_size)])
