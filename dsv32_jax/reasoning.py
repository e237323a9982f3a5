"""What a model thinks before it answers, apart from the answer."""

from dsv32_jax.tokenizer import Tokenizer

__all__ = ["ReasoningSplit"]

OPEN, CLOSE = "<think>", "</think>"


class ReasoningSplit:
    """Splits generated text, piece by piece, at the first `</think>`.

    Args:
      tokenizer: of the model.
      prompt: the rendered chat; the model is reasoning from the start where it ends with `<think>`.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str):
        # Where these are special tokens, decoded text lacks them.
        self._texts = {ids[0]: text for text in (OPEN, CLOSE) if len(ids := tokenizer.encode(text)) == 1}
        self._reasoning = prompt.rstrip().endswith(OPEN)
        self._begun = False
        self._held = ""

    def add(self, token: int, text: str) -> tuple[str, str]:
        """(reasoning, answer) that one more token brings; what may be the beginning of `</think>` is held back."""
        tag = self._texts.get(token)
        tagged = text if tag is None or tag in text else text + tag
        if not self._reasoning and not self._begun and tagged.lstrip().startswith(OPEN):
            self._reasoning, tagged = True, tagged.lstrip().removeprefix(OPEN)
        if not self._reasoning:
            self._begun = self._begun or bool(text.strip())
            return "", text
        reasoning, closed, answer = (self._held + tagged).partition(CLOSE)
        if closed:
            self._reasoning, self._begun, self._held = False, True, ""
            return reasoning, answer
        held = next((n for n in range(len(CLOSE) - 1, 0, -1) if reasoning.endswith(CLOSE[:n])), 0)
        self._held = reasoning[len(reasoning) - held :]
        return reasoning[: len(reasoning) - held], ""

    def finish(self) -> tuple[str, str]:
        """(reasoning, answer) that were held back."""
        held, self._held = self._held, ""
        return held, ""
