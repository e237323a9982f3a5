"""Makes the requests of a soak's clients."""

import dataclasses
import json
import random
from collections.abc import Mapping
from typing import Any

from tests.soak.accounting import Answer, Expected
from tests.soak.client import Call

__all__ = ["KINDS", "MODEL", "Question", "Sizes", "Traffic", "questions"]

MODEL = "soak"
"""The name that the server gives its model."""
WORDS = (
    "file package directory system command option user server process memory block cache request list change install "
    "remove search print archive network kernel device read write the a of to is with from and when"
).split()
KINDS = {"question": 40, "fresh": 16, "dropped": 14, "refused": 18, "flood": 4, "long": 4}
"""The weight of each kind; a question is also sent with a salt and as a stream."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes that fit into the server.

    Attributes:
      context: tokens of a prompt and of its answer together.
      words_per_token: of texts made of `WORDS`.
      sequences: that run at a time.
      max_queue, max_body_bytes: limits of the server.
    """

    context: int
    words_per_token: float
    sequences: int
    max_queue: int
    max_body_bytes: int

    @property
    def burst(self) -> int:
        """The number of requests at once that a queue cannot hold."""
        return self.sequences + self.max_queue + 2

    def text(self, rng: random.Random, share: float) -> str:
        """A text that takes about this share of the context."""
        count = max(1, int(share * self.context * self.words_per_token))
        return " ".join(rng.choices(WORDS, k=count))


@dataclasses.dataclass(frozen=True)
class Question:
    """A request whose answer does not depend on others: greedy, or with a seed."""

    kind: str
    body: Mapping[str, Any]
    choices: int = 1
    chat: bool = False

    def call(self, answer: Answer | None, *, stream: bool = False, salt: str = "", kind: str | None = None) -> Call:
        """A request for the answer, whole or streamed, which must be `answer`."""
        body: dict[str, Any] = {"model": MODEL, **self.body}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if salt:
            body["cache_salt"] = salt
        name = kind or f"{self.kind}{', salted' if salt else ''}{', streamed' if stream else ''}"
        path = "/v1/chat/completions" if self.chat else "/v1/completions"
        expected = Expected(choices=self.choices, answer=answer)
        return Call(name, expected, json.dumps(body).encode(), path, streams=stream)


def questions(sizes: Sizes, rng: random.Random) -> list[Question]:
    """One question of each kind, and some that have a common prefix."""
    greedy: dict[str, Any] = {"max_tokens": 16, "temperature": 0}
    seeded: dict[str, Any] = {"max_tokens": 16, "temperature": 0.8, "top_p": 0.9}
    chat = [{"role": "user", "content": "What does tar do?"}]
    prefixes = [sizes.text(rng, 0.3) for _ in range(2)]
    all_questions = [
        Question("greedy", greedy | {"prompt": "To install a package"}),
        Question("seeded", seeded | {"prompt": "The options of the command", "seed": 1}),
        Question("chat", greedy | {"messages": chat}, chat=True),
        Question("chat seeded", seeded | {"messages": chat, "seed": 2}, chat=True),
        Question("choices", seeded | {"prompt": sizes.text(rng, 0.1), "seed": 3, "n": 3, "ignore_eos": True}, 3),
        Question("prompts", greedy | {"prompt": [sizes.text(rng, 0.05) for _ in range(2)]}, 2),
        Question("stop", greedy | {"prompt": sizes.text(rng, 0.05), "stop": ["e", "\n"], "logprobs": 2}),
    ]
    for number, prefix in enumerate(prefixes):
        for sampling in (greedy, seeded | {"seed": 4, "n": 2}):
            body = sampling | {"prompt": f"{prefix} {sizes.text(rng, 0.03)}", "ignore_eos": True}
            all_questions.append(Question(f"prefix {number}", body, sampling.get("n", 1)))
    return all_questions


class Traffic:
    """A client's requests, one after the other.

    Args:
      sizes: of the server.
      known: questions, with their answers without load.
      rng: of this client.
    """

    def __init__(self, sizes: Sizes, known: list[tuple[Question, Answer]], rng: random.Random):
        self.sizes, self.known, self.rng = sizes, known, rng

    def draw(self) -> list[Call]:
        """The next request; several, to be sent at once, are a flood."""
        (kind,) = self.rng.choices(list(KINDS), list(KINDS.values()))
        if kind == "flood":
            return [self._fresh("flood", 0.05, 8) for _ in range(self.sizes.burst)]
        return [getattr(self, f"_{kind}")()]

    def _question(self) -> Call:
        question, answer = self.rng.choice(self.known)
        salt = f"{self.rng.random()}" if self.rng.random() < 0.15 else ""
        return question.call(answer, stream=self.rng.random() < 0.5, salt=salt)

    def _fresh(self, kind: str = "fresh", share: float | None = None, tokens: int | None = None) -> Call:
        """A prompt that nobody has seen, and as many tokens as are asked for."""
        share = self.rng.uniform(0.05, 0.4) if share is None else share
        tokens = self.rng.randint(8, 32) if tokens is None else tokens
        body = {"prompt": self.sizes.text(self.rng, share), "max_tokens": tokens, "ignore_eos": True}
        body["temperature"] = self.rng.choice((0, 0.7))
        call = Question(kind, body).call(None, stream=self.rng.random() < 0.5)
        return dataclasses.replace(call, kind=kind, expected=Expected(tokens=tokens))

    def _long(self) -> Call:
        """Most of the cache for one sequence: younger ones must make room, and the deadline may come first."""
        return self._fresh("long", 0.05, int(0.7 * self.sizes.context))

    def _dropped(self) -> Call:
        """A request whose client disconnects after some events of its stream, or before its answer."""
        call = self._fresh("dropped", tokens=self.rng.randint(24, 48))
        leaves = float(self.rng.randint(0, 12)) if call.streams else self.rng.uniform(0.05, 2.0)
        kind = "dropped, streamed" if call.streams else "dropped"
        return dataclasses.replace(
            call, kind=kind, expected=dataclasses.replace(call.expected, drops=True), leaves=leaves
        )

    def _refused(self) -> Call:
        return self.rng.choice(self.refusals())

    def refusals(self) -> list[Call]:
        """Requests that are wrong, each in its own way."""
        good = {"model": MODEL, "prompt": "a", "max_tokens": 4}
        spaces = b" " * self.sizes.max_body_bytes
        too_long = " ".join(WORDS * (1 + int(2 * self.sizes.context * self.sizes.words_per_token) // len(WORDS)))

        def wrong(kind: str, **fields: Any) -> Call:
            return Call(f"wrong {kind}", _refusal("400"), json.dumps(good | fields).encode())

        content = json.dumps(good).encode()
        # Those that are refused before anyone looks at the queue.
        early = [
            Call("wrong key", _refusal("401", queues=False), content, headers={"authorization": "Bearer wrong"}),
            # The server answers before it has read the body; the reset that follows may come before the answer is read.
            Call("oversize", _refusal("413", "ReadError", "RemoteProtocolError", queues=False), content + spaces),
            Call("wrong type of body", _refusal("415", queues=False), content, headers={"content-type": "text/plain"}),
            Call("wrong method", _refusal("405", queues=False), b"", method="GET"),
            Call("wrong path", _refusal("404", queues=False), content, "/v1/embeddings"),
        ]
        return [
            *early,
            Call("malformed JSON", _refusal("400"), content[:-4]),
            Call("malformed UTF-8", _refusal("400"), content.replace(b'"a"', b'"\xff"')),
            Call("nested too deeply", _refusal("400"), b'{"model": ' + b"[" * 30_000),
            Call("NaN", _refusal("400"), content.replace(b"4}", b'4, "temperature": NaN}')),
            Call("infinity", _refusal("400"), content.replace(b"4}", b'4, "top_p": 1e999}')),
            wrong("type", max_tokens="4"),
            wrong("prompt", prompt={"text": "a"}),
            wrong("id", prompt=[2**40]),
            wrong("length", prompt=too_long),
            wrong("tokens", max_tokens=2**30),
            wrong("n", n=17),
            wrong("logprobs", logprobs=21),
            wrong("temperature", temperature=-1),
            wrong("field", presence=1),
            wrong("number of prompts", prompt=["a"] * 17),
            Call("wrong model", _refusal("404"), json.dumps(good | {"model": "gpt"}).encode()),
            Call("wrong role", _refusal("400"), json.dumps(_chat("robot")).encode(), "/v1/chat/completions"),
        ]


def _refusal(*statuses: str, queues: bool = True) -> Expected:
    return Expected(refusal=frozenset(statuses), queues=queues)


def _chat(role: str) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": role, "content": "a"}]}
