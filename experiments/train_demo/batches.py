"""The batch of each training step: a function of the seed, the stage and the step, so that a run resumes exactly."""

import dataclasses
import functools
import hashlib
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dsv32_jax.errors import UserError
from dsv32_jax.experiments.train_demo.recall import RecallTasks
from dsv32_jax.experiments.train_demo.sizes import Stage
from dsv32_jax.generate.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """One step's sequences.

    Attributes:
      ids: int32 [B, T].
      weights: float32 [B, T], of each token as a target; 0 where it does not count.
      recall_tokens: how many of the tokens are recall tasks.
    """

    ids: np.ndarray
    weights: np.ndarray
    recall_tokens: int = 0


class Batches:
    """Windows of the corpus, recall tasks, question and answer pairs."""

    def __init__(self, data: Path, seed: int = 0):
        """Takes the folder that `python -m experiments.train_demo data` fills, and the seed of the whole run."""
        self.seed = seed
        self.tokens = load(data / "train.npz")["tokens"]
        questions = load(data / "questions.npz") if has_questions(data) else NO_QUESTIONS
        self.questions = questions["tokens"]
        self.question_starts, self.answer_starts = questions["starts"], questions["answer_starts"]
        pairs = np.arange(len(self.question_starts))
        self.kinds = (pairs, pairs[questions["greeting"]])
        tokenizer = Tokenizer(data)
        if tokenizer.bos_id is None:
            raise UserError(f"{data}: its tokenizer has no bos_token; a sequence begins with it")
        self.bos: int = tokenizer.bos_id
        newline = np.zeros(1 << 16, bool)
        newline[: tokenizer.vocab_size] = [tokenizer.decode([id]).endswith("\n") for id in range(tokenizer.vocab_size)]
        self.recall = RecallTasks(tokenizer.encode, newline)

    def __call__(self, stage: Stage, number: int, step: int) -> TokenBatch:
        """The batch of one step of a stage; `number` is the stage's place among the stages."""
        rng = np.random.default_rng([self.seed, number, step])
        if stage.chat_every and step % stage.chat_every == 0:
            return self.chat(stage, rng)
        width, windows = self.windows(stage)
        ids = np.empty((stage.batch, stage.length), np.int32)
        weights = np.ones((stage.batch, stage.length), np.float32)
        tasks = 0
        for row in range(stage.batch):
            epoch, index = divmod(step * stage.batch + row, windows)
            shift, order = epoch_order(self.seed, number, epoch, windows, width)
            start = order[index] * width + shift
            text = self.tokens[start : start + width].astype(np.int32)
            if rng.random() < stage.recall_share:
                text, weights[row, 1:], count = self.recall.fill(rng, text)
                tasks += count
            ids[row, 0], ids[row, 1:] = self.bos, text
        return TokenBatch(ids, weights, tasks)

    def windows(self, stage: Stage) -> tuple[int, int]:
        """Tokens of a window without the beginning-of-sentence token, and the number of windows of an epoch."""
        width = stage.length - 1
        windows = (len(self.tokens) - 1) // width - 1
        if windows < 1:
            raise UserError(f"train.npz: {len(self.tokens)} tokens are too few for sequences of {stage.length}")
        return width, windows

    def fingerprint(self) -> str:
        """A hash of the data: a run is not resumed with other data than it began with."""
        digest = hashlib.blake2b(self.tokens.tobytes(), digest_size=8)
        digest.update(self.questions.tobytes())
        return digest.hexdigest()

    def chat(self, stage: Stage, rng: np.random.Generator) -> TokenBatch:
        """A batch of pairs in rows of 256 tokens, with the usual number of tokens; only answers have weights."""
        length = min(256, stage.length)
        rows = stage.batch * stage.length // length
        ids, weights = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.float32)
        ends = np.append(self.question_starts[1:], len(self.questions))
        for row in range(rows):
            filled = 0
            while filled < length:
                kind = self.kinds[int(rng.random() < stage.greeting_share)]
                pair = int(kind[rng.integers(len(kind))])
                start, answer, end = self.question_starts[pair], self.answer_starts[pair], ends[pair]
                piece = self.questions[start:end][: length - filled]
                ids[row, filled : filled + len(piece)] = piece
                weights[row, filled : filled + len(piece)] = np.arange(start, start + len(piece)) >= answer
                filled += len(piece)
        return TokenBatch(ids, weights)

    def stream(self, stage: Stage, number: int, first: int) -> Iterator[TokenBatch]:
        """Yields the batches of a stage from step `first` on; a thread makes them ahead."""
        ready: queue.Queue = queue.Queue(maxsize=4)

        def produce() -> None:
            try:
                for step in range(first, stage.steps):
                    ready.put(self(stage, number, step))
            except Exception as error:  # handed to the consumer, which would wait for ever otherwise
                ready.put(error)

        threading.Thread(target=produce, daemon=True).start()
        for _ in range(first, stage.steps):
            batch = ready.get()
            if isinstance(batch, Exception):
                raise batch
            yield batch


@functools.lru_cache(maxsize=8)
def epoch_order(seed: int, number: int, epoch: int, windows: int, width: int) -> tuple[int, np.ndarray]:
    """The shift of the windows of an epoch in tokens, and their order, in which each comes once."""
    rng = np.random.default_rng([seed, number, 1 << 30, epoch])
    return int(rng.integers(0, width)), rng.permutation(windows)


NO_QUESTIONS: dict[str, np.ndarray] = {
    "tokens": np.zeros(0, np.uint16),
    "starts": np.zeros(0, np.int64),
    "answer_starts": np.zeros(0, np.int64),
    "greeting": np.zeros(0, bool),
}


def has_questions(data: Path) -> bool:
    """Whether stages can train on questions and answers; a text of one's own (`texts.of_files`) has none."""
    return (data / "questions.npz").exists() or not (data / "text.json").exists()


def load(path: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of an npz file; raises a `UserError` that says how to make it where it does not exist."""
    if not path.exists():
        raise UserError(
            f"{path} does not exist; `python -m experiments.train_demo data` makes it, on Debian; --text FILE trains "
            f"on a text of your own"
        )
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays}
