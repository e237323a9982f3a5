"""Separates the reasoning of a model from its answer."""

from dsv32_jax.generate.tokenizer import END_OF_REASONING as CLOSE
from dsv32_jax.generate.tokenizer import Tokenizer

__all__ = ["ReasoningSplit"]

OPEN = "<think>"


class ReasoningSplit:
    """Splits generated text, piece by piece, at the first `</think>`.

    Args:
      tokenizer: of the model.
      prompt: the rendered chat; the model is reasoning from the start where it ends with `<think>`.
      thinking: whether the model was asked to reason. If not, and if the prompt does not end with `<think>`, the whole
        text is the answer.

    Attributes:
      reasoning, answer: the text so far.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str, thinking: bool):
        # Where these are special tokens, decoded text lacks them.
        self._tags = {ids[0]: tag for tag in (OPEN, CLOSE) if len(ids := tokenizer.encode(tag)) == 1}
        self._opened = prompt.rstrip().endswith(OPEN)
        self._splits = thinking or self._opened
        self._closed = False
        self._pending = ""
        self.reasoning = self.answer = ""

    def add(self, token: int, text: str) -> tuple[str, str]:
        """(reasoning, answer) that one more token adds; a possible beginning of `</think>` is held back."""
        if self._closed or not self._splits:
            self.answer += text
            return "", text
        tag = self._tags.get(token, "")
        text = self._pending + (text if tag in text else text + tag)
        if not self._opened and not (self.reasoning + self.answer).strip() and text.lstrip().startswith(OPEN):
            self._opened, text, self.answer = True, text.lstrip().removeprefix(OPEN), ""
        before, self._closed, after = self._cut(text)
        if self._opened:
            self.reasoning += before
            self.answer += after
            return before, after
        if not self._closed:
            self.answer += before
            return "", before
        # No `<think>` announced the text until now, and yet `</think>` shows that it was reasoning.
        self.reasoning, self.answer = self.answer + before, after
        return before, after

    def finish(self) -> tuple[str, str]:
        """(reasoning, answer) that was held back."""
        pending, self._pending = self._pending, ""
        if self._opened:
            self.reasoning += pending
            return pending, ""
        self.answer += pending
        return "", pending

    def _cut(self, text: str) -> tuple[str, bool, str]:
        """(text before `</think>`, whether it came, text after it)."""
        before, tag, after = text.partition(CLOSE)
        pending = 0 if tag else next((n for n in range(len(CLOSE) - 1, 0, -1) if text.endswith(CLOSE[:n])), 0)
        self._pending = text[len(text) - pending :]
        return before[: len(before) - pending], bool(tag), after
