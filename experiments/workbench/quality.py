"""What a model's answers are worth beside a reference's: on held-out text, or on a text of the user's, and on needles.

Everything comes from the real step, which reads a whole window at once, so that replaced parts are what is measured.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv32_jax import fidelity
from dsv32_jax.common.progress import progress_bar
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.studies import held_out
from dsv32_jax.experiments.train_demo.evaluate import Needle, found_needles, needles, summarise
from dsv32_jax.fidelity import log_softmax
from dsv32_jax.generate import batching
from dsv32_jax.generate.flat_model import FlatModel
from dsv32_jax.generate.inspection import tapped
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.windows import windows_of
from dsv32_jax.model.taps import Taps

__all__ = ["Reference", "Texts", "default_length"]

CHOSEN = Taps.of({"layers.*.attn.topk": None})
CHOSEN_AND_ATTENTION = Taps.of({"layers.*.attn.topk": None, "layers.*.attn.attention": None})
LONGEST = 4096
"""Tokens of a window by default, at most: the held-out documents have little more."""
SHORTEST_WITH_NEEDLES = 256
"""Tokens that four facts, a question and some text between them need."""
ROWS = 256
"""Tokens whose logits are compared at a time, in float64."""


def default_length(m: LanguageModel) -> int:
    """Tokens of a window of which half see more keys than the model chooses."""
    return min(2 * (m.options.index_topk or m.config.index_topk), LONGEST, m.config.max_position_embeddings)


@dataclasses.dataclass(frozen=True)
class Texts:
    """What quality is measured on.

    Attributes:
      ids: int32 [N, T], the windows.
      bytes_of: int64 [V], bytes of text that each id stands for.
      needles: windows with hidden facts, see `dsv32_jax.experiments.train_demo.evaluate.needles`.
      source: "held-out" or the name of the user's file.
    """

    ids: np.ndarray
    bytes_of: np.ndarray
    needles: Sequence[Needle]
    source: str

    @staticmethod
    def of(
        m: LanguageModel,
        *,
        length: int | None = None,
        windows: int = 4,
        needle_windows: int = 8,
        text: str | None = None,
        source: str = "held-out",
    ) -> "Texts":
        """Windows of the held-out documents, or of a text of the user's.

        Args:
          m: its tokenizer reads the text.
          length: tokens of a window; None for `default_length`.
          windows: their number, at most.
          needle_windows: windows with needles, hidden in the others; 0 for none.
          text: read this instead.
          source: where the text is from.

        Raises:
          UserError: the model has no tokenizer, or the length is out of range.
        """
        if m.tokenizer is None:
            raise UserError("quality: the model has no tokenizer, so there is no text to measure it on")
        length, longest = length or default_length(m), m.config.max_position_embeddings
        if not 2 <= length <= longest:
            raise UserError(f"window {length}: must be from 2 to max_position_embeddings = {longest}")
        if text is None:
            ids = held_out.windows(m.tokenizer, length, windows)
        else:
            whole = m.tokenizer.encode(text, bos=True)
            pieces = windows_of(whole, length, length - 1, m.tokenizer.bos_id)[:windows]
            width = len(pieces[0].ids)
            if width < 2:
                raise UserError("text: 1 token; must have at least 2, the first has nothing before it")
            ids = np.array([piece.ids for piece in pieces if len(piece.ids) == width], np.int32)
        hidden: list[Needle] = []
        if needle_windows and ids.shape[1] >= SHORTEST_WITH_NEEDLES:
            hidden = needles(m.tokenizer, ids, (ids.shape[1],), needle_windows)
        return Texts(ids, held_out.token_bytes(m.tokenizer, m.config.vocab_size), hidden, source)

    def describe(self) -> dict[str, Any]:
        """JSON that says what was read."""
        windows, tokens = self.ids.shape
        return {"source": self.source, "windows": windows, "tokens": tokens, "needles": len(self.needles)}


class Reference:
    """A model's results on some texts, with which others are compared.

    Args:
      m: the reference.
      texts: what is read.
    """

    def __init__(self, m: LanguageModel, texts: Texts):
        self.m, self.texts = m, texts
        self.k = m.options.index_topk or m.config.index_topk
        self._logits: list[np.ndarray] = []
        self._chosen: list[np.ndarray] = []
        self._attention: list[np.ndarray] = []
        with progress_bar("reading with the reference", len(texts.ids), "windows") as advance:
            for row in texts.ids:
                logits, values = read(m, row, CHOSEN_AND_ATTENTION)
                self._logits.append(logits)
                self._chosen.append(by_layer(values, "topk", len(row)))
                self._attention.append(by_layer(values, "attention", len(row)))
                advance(1)

    @property
    def chooses(self) -> bool:
        """Whether any token sees more keys than the reference chooses, so that there is something to recall."""
        return self.texts.ids.shape[1] > self.k

    def measure(self, m: LanguageModel) -> dict[str, Any]:
        """Measures a model, which may be the reference itself.

        Returns:
          JSON-able:
            perplexity (a token), bits_per_byte, by_position: see `dsv32_jax.experiments.train_demo.evaluate.summarise`.
            kl: KL(reference || model) of the next token, in nats, mean over tokens.
            top1_agreement: share of tokens for which both think the same next token likeliest.
            recall: share of the positions that the reference's indexer chose to which this model attends; mean over
              layers and over tokens that see more than the reference chooses. None where no token does.
            attention_mass: share of the reference's own dense attention that falls on the positions to which this model
              attends, over the same tokens.
            needles: how many of the hidden facts it answers, and of how many; None where there are none.

        Raises:
          UserError: another vocabulary or other layers than the reference's.
        """
        texts, likelihoods, kls, same, shares, masses = self.texts, [], [], [], [], []
        with progress_bar("reading", len(texts.ids) + len(texts.needles), "windows") as advance:
            for number, row in enumerate(texts.ids):
                reference, chosen = self._logits[number], self._chosen[number]
                logits = reference
                if m is not self.m:
                    logits, values = read(m, row, CHOSEN)
                    chosen = by_layer(values, "topk", len(row))
                if logits.shape != reference.shape:
                    raise UserError(
                        f"quality: the vocabulary has {logits.shape[1]} tokens, and the reference's "
                        f"{reference.shape[1]}; models that are compared must share one"
                    )
                likelihoods.append(likelihood(logits[:-1], row[1:]))
                kls.append(kl(reference[:-1], logits[:-1]))
                same.append(reference[:-1].argmax(-1) == logits[:-1].argmax(-1))
                if self.chooses:
                    share, mass = self._selection(number, None if m.options.attention == "dense" else chosen)
                    shares.append(share)
                    masses.append(mass)
                advance(1)

            def score(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
                right = []
                taps = CHOSEN_AND_ATTENTION if m is self.m else CHOSEN  # of a program that is compiled already
                for row in ids:
                    right.append(read(m, row, taps)[0][:-1].argmax(-1) == row[1:])
                    advance(1)
                return np.zeros((0, 0)), np.stack(right)

            answered = found_needles(score, list(texts.needles)) if texts.needles else None
        return {
            **summarise(np.stack(likelihoods), texts.ids, texts.bytes_of),
            "kl": float(np.mean(kls)),
            "top1_agreement": float(np.mean(same)),
            "recall": float(np.mean(shares)) if shares else None,
            "attention_mass": float(np.mean(masses)) if masses else None,
            "needles": None if answered is None else {"answered": int(answered.sum()), "of": len(answered)},
        }

    def _selection(self, window: int, chosen: np.ndarray | None) -> tuple[float, float]:
        """Recall and attention mass, means over layers, of the positions [L, T, K] that a model attends to; None: all.

        Raises:
          UserError: the model has other layers than the reference.
        """
        if chosen is None:
            return 1.0, 1.0
        wanted, attention = self._chosen[window], self._attention[window]
        if len(chosen) != len(wanted):
            raise UserError(f"quality: {len(chosen)} layers, and the reference has {len(wanted)}; must be as many")
        tokens = chosen.shape[1]
        later = slice(self.k, tokens)
        recalls = [fidelity.recall(a[later], b[later], tokens).mean() for a, b in zip(wanted, chosen, strict=True)]
        masses = [fidelity.mass(a[later], b[later]) for a, b in zip(attention, chosen, strict=True)]
        return float(np.mean(recalls)), float(np.mean(masses))


def read(m: LanguageModel, ids: np.ndarray, taps: Taps) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits float32 [T, V] of ids [T] in one step, and the tapped values.

    Of a model that attends to all keys, what its indexer would choose is not asked for, unless the attention is too.
    """
    if m.options.attention == "dense" and taps is CHOSEN:
        taps = Taps()
    row = m.rows(ids)[0]
    flat = FlatModel(*m.flat_model(), m.config, m.options)
    logits, values = tapped(flat, row, taps, batching.padded(len(row), batching.SMALLEST_CHUNK))
    return np.asarray(logits, np.float32)[: len(row)], {name: np.asarray(value) for name, value in values.items()}


def by_layer(values: dict[str, np.ndarray], name: str, tokens: int) -> np.ndarray:
    """The values of every layer, the tokens' rows alone: [L, T, ...]; attention without what lies past the window."""
    layers = sum(path.endswith(f".attn.{name}") for path in values)
    if not layers:
        return np.zeros((0, tokens, 0))
    arrays = np.stack([values[f"layers.{layer}.attn.{name}"][:tokens] for layer in range(layers)])
    return arrays[..., :tokens] if name == "attention" else arrays


def likelihood(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Log-likelihood float64 [T] of targets [T] under logits [T, V]."""
    parts = [
        np.take_along_axis(log_softmax(logits[at : at + ROWS]), targets[at : at + ROWS, None], -1)[:, 0]
        for at in range(0, len(logits), ROWS)
    ]
    return np.concatenate(parts)


def kl(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean of `fidelity.kl_divergence` over tokens; logits are [T, V]."""
    starts = range(0, len(reference), ROWS)
    parts = [fidelity.kl_divergence(reference[at : at + ROWS], other[at : at + ROWS]) for at in starts]
    return float(np.concatenate(parts).mean())
