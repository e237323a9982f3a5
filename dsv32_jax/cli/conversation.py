"""A conversation with a model, apart from any terminal."""

import dataclasses
from collections.abc import Generator, Iterator
from typing import Literal, NamedTuple

from dsv32_jax.cli.inputs import Sampling
from dsv32_jax.errors import UserError
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.reasoning import ReasoningSplit

__all__ = ["ContextFull", "Conversation", "Part", "Turn"]


class ContextFull(UserError):
    """Raised where a message does not fit into the context after the conversation; `Conversation.reset` makes room."""


class Part(NamedTuple):
    """A piece of an answer's text, or of the reasoning before it."""

    kind: Literal["reasoning", "answer"]
    text: str


@dataclasses.dataclass
class Turn:
    """A message and its answer.

    Attributes:
      message, answer, reasoning: texts.
      finish_reason: "stop" (end of sentence), "length" or "interrupted".
    """

    message: str
    answer: str = ""
    reasoning: str = ""
    finish_reason: str = "interrupted"


class Conversation:
    """Messages and answers; each answer depends on all messages and answers before it.

    Args:
      m: a model with a tokenizer.
      system: a system message.
      thinking: let the model reason before it answers. Later turns do not see the reasoning, as in DeepSeek's encoding.
      max_new_tokens: of an answer; fewer where the context ends. Default: that of `LanguageModel.generate`.
      sampling: of the answers. Default: that of `LanguageModel.stream`.

    Attributes:
      turns: since the beginning or the last `reset`.
      earlier: messages of the conversations before each `reset`.
      unanswered: messages that did not fit into the context.
    """

    def __init__(
        self,
        m: LanguageModel,
        *,
        system: str | None = None,
        thinking: bool = False,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
    ):
        if m.tokenizer is None:
            raise UserError("--model: the checkpoint has no tokenizer.json, which a chat needs")
        if max_new_tokens is not None and max_new_tokens < 1:
            raise UserError(f"max_new_tokens: {max_new_tokens}; must be at least 1")
        self._m, self._tokenizer = m, m.tokenizer
        self.system = system
        self.thinking = thinking
        self.max_new_tokens = max_new_tokens
        self._sampling = sampling or Sampling()
        self.turns: list[Turn] = []
        self.earlier: list[list[dict[str, str]]] = []
        self.unanswered: list[str] = []

    def ask(self, message: str) -> Generator[Part]:
        """Yields the answer as it is generated.

        When the iterator is closed early or an exception ends it, the turn has the answer so far. Close it
        (`contextlib.closing`): otherwise Python does so at an unknown time.

        Raises:
          ContextFull: there is no room for the message or for an answer.
        """
        prompt = self._tokenizer.render_chat([*self._context(), _message("user", message)], thinking=self.thinking)
        ids = self._tokenizer.encode(prompt)
        limit = self._room(message, len(ids))
        split = ReasoningSplit(self._tokenizer, prompt, self.thinking)
        turn, token = Turn(message), None
        try:
            self._m.warmup([len(ids)], limit)
            for piece in self._m.stream(
                [ids],
                limit,
                temperature=self._sampling.temperature,
                top_p=self._sampling.top_p,
                seed=self._sampling.seed,
                ignore_eos=self._sampling.ignore_eos,
            ):
                token = piece.token
                yield from _parts(*split.add(token, piece.text or ""))
            yield from _parts(*split.finish())
            ended = token in self._m.eos_ids and not self._sampling.ignore_eos
            turn.finish_reason = "stop" if ended else "length"
        finally:
            if token is not None:
                turn.reasoning, turn.answer = split.reasoning, split.answer
                self.turns.append(turn)

    def reset(self) -> None:
        """Begins anew; the system message stays."""
        if self.turns:
            self.earlier.append(self.messages())
        self.turns = []

    def messages(self) -> list[dict[str, str]]:
        """All messages since the last reset; answers have `reasoning_content` where the model reasoned."""
        result = self._opening()
        for turn in self.turns:
            reasoning = {"reasoning_content": turn.reasoning} if turn.reasoning else {}
            result += [_message("user", turn.message), _message("assistant", turn.answer) | reasoning]
        return result

    def _context(self) -> list[dict[str, str]]:
        """The part of `messages` that the model reads: no reasoning, and no turn that ended before its answer began."""
        result = self._opening()
        for turn in self.turns:
            if turn.answer or turn.finish_reason == "stop":
                result += [_message("user", turn.message), _message("assistant", turn.answer)]
        return result

    def _opening(self) -> list[dict[str, str]]:
        return [] if self.system is None else [_message("system", self.system)]

    def _room(self, message: str, tokens: int) -> int:
        """The number of tokens that the answer to a prompt of so many may have."""
        longest = self._m.config.max_position_embeddings
        if tokens >= longest:
            self.unanswered.append(message)
            raise ContextFull(f"the conversation would have {tokens} tokens, and the model's context has {longest}")
        room = longest - tokens
        return min(self.max_new_tokens or self._m.new_tokens([[0] * tokens], None), room)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _parts(reasoning: str, answer: str) -> Iterator[Part]:
    if reasoning:
        yield Part("reasoning", reasoning)
    if answer:
        yield Part("answer", answer)
