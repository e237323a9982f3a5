"""The JSON of answers: the objects `text_completion`, `chat.completion` and `chat.completion.chunk` of OpenAI's API."""

import math
import secrets
import time
from typing import Any

from dsv32_jax import __version__
from dsv32_jax.generate.tokenizer import Tokenizer
from dsv32_jax.server.api_request import ApiRequest
from dsv32_jax.server.worker import Piece, Usage

__all__ = ["ChatJson", "CompletionJson", "ResponseJson"]

MINUS_INFINITY = -9999.0
"""Stands for a log-probability of minus infinity, which JSON does not have; as with OpenAI."""


class ResponseJson:
    """The JSON of one answer.

    Args:
      model: its name.
      request: that is answered.
      tokenizer: for the tokens' texts.
    """

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, request: ApiRequest, tokenizer: Tokenizer):
        self.request = request
        self.tokenizer = tokenizer
        self._common = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"dsv32-jax-{__version__}",
        }
        self._offsets = [0] * request.choices  # characters of each choice's tokens so far

    def whole(self, pieces: list[Piece], usage: Usage) -> dict[str, Any]:
        """The whole answer of a request without `stream`."""
        choices = []
        for index in range(self.request.choices):
            choice_pieces = [piece for piece in pieces if piece.choice == index]
            content = self._content("".join(piece.text for piece in choice_pieces))
            choices.append(self._choice(index, content, choice_pieces))
        return {**self._common, "object": self.whole_object, "choices": choices, "usage": usage_json(usage)}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first token."""
        return []

    def chunk(self, piece: Piece) -> dict[str, Any] | None:
        """The chunk of a token; None if it has nothing to send."""
        if not (piece.text or piece.logprobs or piece.finish_reason):
            return None
        return self._chunk([self._choice(piece.choice, self._delta(piece.text), [piece])])

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The chunk after the last token, for `include_usage`."""
        return {**self._chunk([]), "usage": usage_json(usage)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self.request.include_usage else {}
        return {**self._common, "object": self.chunk_object, "choices": choices, **usage}

    def _choice(self, index: int, content: dict[str, Any], pieces: list[Piece]) -> dict[str, Any]:
        logprobs = None if self.request.params.logprobs is None else self._logprobs(index, pieces)
        reason = pieces[-1].finish_reason if pieces else None
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}

    def _token(self, id: int) -> tuple[str, list[int]]:
        """A token's text and bytes; where its bytes are not a text, they or its id stand for it."""
        data = self.tokenizer.token_bytes(id)
        if not data:
            return f"token_id:{id}", []
        try:
            return data.decode(), list(data)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), list(data)

    def _content(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        raise NotImplementedError


class CompletionJson(ResponseJson):
    """The JSON of `/v1/completions`."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    _delta = _content

    def _logprobs(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        """Lists by token. The sampled token is always among the likeliest, as with OpenAI."""
        logprobs: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for piece in pieces:
            assert piece.logprobs is not None
            token, data = self._token(piece.token)
            logprobs["tokens"].append(token)
            logprobs["token_logprobs"].append(finite(piece.logprobs.token))
            likeliest = {self._token(id)[0]: finite(value) for id, value in piece.logprobs.likeliest.items()}
            logprobs["top_logprobs"].append({**likeliest, token: finite(piece.logprobs.token)})
            logprobs["text_offset"].append(self._offsets[index])
            self._offsets[index] += len(bytes(data).decode(errors="ignore"))
        return logprobs


class ChatJson(ResponseJson):
    """The JSON of `/v1/chat/completions`."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        role = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": index, "delta": role, "logprobs": None, "finish_reason": None}])
            for index in range(self.request.choices)
        ]

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def _logprobs(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        content = []
        for piece in pieces:
            assert piece.logprobs is not None
            top = [self._entry(id, value) for id, value in piece.logprobs.likeliest.items()]
            content.append({**self._entry(piece.token, piece.logprobs.token), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, id: int, logprob: float) -> dict[str, Any]:
        token, data = self._token(id)
        return {"token": token, "logprob": finite(logprob), "bytes": data or None}


def usage_json(usage: Usage) -> dict[str, Any]:
    """The object `usage` of OpenAI's API."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def finite(logprob: float) -> float:
    """A log-probability that JSON can express."""
    return logprob if math.isfinite(logprob) else MINUS_INFINITY
