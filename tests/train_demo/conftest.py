"""A corpus of one paragraph, in the files that training reads."""

from pathlib import Path

import numpy as np
import pytest

from dsv32_jax.experiments.train_demo import tokenizer as demo_tokenizer
from dsv32_jax.generate.tokenizer import Tokenizer
from tests.harness import TEXT


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder with train.npz, questions.npz and a tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    demo_tokenizer.write(folder, [TEXT], 512)
    encode = Tokenizer(folder).encode
    document, count = [0, *encode(TEXT), 1], 40
    np.savez(
        folder / "train.npz",
        tokens=np.array(document * count, np.uint16),
        starts=np.arange(count) * len(document),
        bytes=np.full(count, len(TEXT)),
    )
    question, answer = [0, *encode("What does he drink?")], [*encode(" He drinks his tea."), 1]
    length = len(question) + len(answer)
    np.savez(
        folder / "questions.npz",
        tokens=np.array((question + answer) * count, np.uint16),
        starts=np.arange(count) * length,
        answer_starts=np.arange(count) * length + len(question),
        greeting=np.arange(count) % 2 == 0,
    )
    return folder
