"""The demo's tokenizer, byte-level BPE with DeepSeek's turn tokens, and the corpus as token ids."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsv32_jax.common.files import whole_file
from dsv32_jax.common.progress import progress_bar
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.results import write_json
from dsv32_jax.experiments.train_demo import corpus
from dsv32_jax.generate.tokenizer import BUILT_IN_TEMPLATE

# Ids 0 to 6, in this order.
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
SPECIAL = (BOS, EOS, PAD, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
SAMPLE = 40_000_000  # characters that the vocabulary is made from
_PIECE = 4_000  # characters taken at a time, so that every part of the corpus is in the sample
_BATCH = 256  # documents encoded at once


def train(data_dir: Path, vocab_size: int) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, trained on pieces of the training documents.

    `vocab_size` counts the 7 special tokens and the 256 bytes too. Does nothing when the files are there.
    """
    if (data_dir / "tokenizer.json").exists() and (data_dir / "tokenizer_config.json").exists():
        return
    total = sum(len(document["text"]) for document in corpus.read_documents(data_dir, "train"))
    write(data_dir, _sample(data_dir, total), vocab_size)


def write(directory: Path, texts: Iterable[str], vocab_size: int) -> None:
    """Trains on `texts` and writes the two files. Raises `UserError` when `vocab_size` has no room for the bytes."""
    if vocab_size < 256 + len(SPECIAL) or vocab_size > 65_536:
        raise UserError(f"vocab_size: {vocab_size}, but it must be from {256 + len(SPECIAL)} to 65536 (ids are uint16)")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    settings = {
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": False,
        "model_max_length": 4096,
        "chat_template": BUILT_IN_TEMPLATE,
    }
    with whole_file(directory / "tokenizer.json") as temporary:
        temporary.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    write_json(directory / "tokenizer_config.json", settings)


def load(data_dir: Path) -> tokenizers.Tokenizer:
    """The trained tokenizer. Raises `UserError` when there is none."""
    path = data_dir / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{path}: not there; train the tokenizer first")
    return tokenizers.Tokenizer.from_file(str(path))


def encode_corpus(data_dir: Path) -> None:
    """Writes `train.npz` and `held_out.npz`: `tokens` uint16 [N], `starts` int64 [D], `bytes` int64 [D].

    A document is id 0, its tokens, id 1; `starts` are the offsets of the ids 0 and `bytes` the UTF-8 lengths of the
    texts. The documents are shuffled with a fixed seed. A file that is there is not made again.
    """
    tokenizer = load(data_dir)
    for split, name in (("held-out", "held_out.npz"), ("train", "train.npz")):
        if not (data_dir / name).exists():
            texts = [document["text"] for document in corpus.read_documents(data_dir, split)]
            order = np.random.default_rng(0).permutation(len(texts))
            save(data_dir / name, **encode(tokenizer, [texts[n] for n in order], split))


def encode(tokenizer: tokenizers.Tokenizer, texts: list[str], label: str = "encoding") -> dict[str, np.ndarray]:
    """`tokens`, `starts` and `bytes` of `texts`, as in the files."""
    parts: list[np.ndarray] = []
    with progress_bar(label, len(texts), "texts") as advance:
        for batch in itertools.batched(texts, _BATCH):
            # A special token written in a manual must not become one: its text is broken up.
            safe = [_without_special(text) for text in batch]
            for encoding in tokenizer.encode_batch_fast(safe, add_special_tokens=False):
                parts.append(np.array([0, *encoding.ids, 1], np.uint16))
            advance(len(batch))
    return packed(parts) | {"bytes": np.array([len(text.encode()) for text in texts], np.int64)}


def packed(parts: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of ids one behind the other: `tokens` uint16 [N], and `starts` int64, the offset of each."""
    lengths = np.array([len(part) for part in parts], np.int64)
    tokens = np.concatenate(parts) if parts else np.zeros(0, np.uint16)
    return {"tokens": tokens, "starts": np.cumsum(lengths) - lengths}


def save(path: Path, **arrays: np.ndarray) -> None:
    """Writes an `.npz` file, whole or not at all."""
    with whole_file(path) as temporary:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]


def _without_special(text: str) -> str:
    for token in SPECIAL:
        text = text.replace(token, token[:1] + " " + token[1:])
    return text


def _sample(data_dir: Path, total: int) -> Iterator[str]:
    """Every k-th piece of the training text, `SAMPLE` characters in all."""
    step = max(1, round(total / SAMPLE))
    offset = 0
    for document in corpus.read_documents(data_dir, "train"):
        text: Any = document["text"]
        for start in range(0, len(text), _PIECE):
            if (offset := offset + 1) % step == 0:
                yield text[start : start + _PIECE]
