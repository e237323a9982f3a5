"""Text to token ids and back: tokenizer.json through `tokenizers`, the chat template through sandboxed jinja2."""

import codecs
import datetime
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from dsv32_jax.common.arguments import shown
from dsv32_jax.common.reading import decoded, present, read_json
from dsv32_jax.errors import UserError
from dsv32_jax.generate.messages import Message, check_text, checked_messages
from dsv32_jax.generate.special_tokens import add_missing_tokens, default_template, special_tokens

# The turns of DeepSeek-V3.2-Exp (the family of V3.1-Terminus), for checkpoints that come without a template. Tool
# calls are left to templates that a checkpoint brings itself.
BUILT_IN_TEMPLATE = """\
{%- set system = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\n\n') -%}
{{- bos_token + system -}}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{- '<｜User｜>' + message['content'] -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- '<｜Assistant｜></think>' + message['content'].split('</think>')[-1] + eos_token -}}
  {%- elif message['role'] != 'system' -%}
    {{- raise_exception("role '" + message['role'] + "' needs a checkpoint with its own chat template") -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<｜Assistant｜>' + ('<think>' if thinking else '</think>') -}}
{%- endif -%}
"""
END_OF_REASONING = "</think>"
_BUILT_IN_TOKENS = ("<｜User｜>", "<｜Assistant｜>", "<think>", END_OF_REASONING)


class Tokenizer:
    """The tokenizer of a checkpoint directory.

    `tokenizer.json` says how a text becomes ids; truncation, padding and dropout that were left in it are not obeyed.
    Special tokens are those of `special_tokens`. Neither `add_bos_token` nor `add_eos_token` is obeyed: DeepSeek's own
    files say false, although every sequence of the training began with that token; see `encode`.

    Raises `UserError` when a file is not what it should be, or when the tokenizer is not a byte-level one.
    """

    def __init__(self, directory: str | Path):
        self.directory = directory = Path(directory)
        path = directory / "tokenizer.json"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(decoded(path.read_bytes()))
        except Exception as error:  # the library raises a bare Exception for every malformed file
            raise UserError(f"{path}: not a readable tokenizer: {_one_line(error)}") from error
        if type(self._tokenizer.decoder).__name__ != "ByteLevel":
            raise UserError(f"{path}: the decoder must be ByteLevel, as DeepSeek's is")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if getattr(self._tokenizer.model, "dropout", None) is not None:
            self._tokenizer.model.dropout = None
        add_missing_tokens(self._tokenizer, directory)
        self.special_tokens = special_tokens(self._tokenizer, directory)
        added = {id for id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        named = {id for name in self.special_tokens if (id := self._special_id(name)) is not None}
        self.special_ids = frozenset(added | named)
        """Ids of tokens that are no text: `decode` leaves them out."""
        self._bytes: dict[int, bytes] = {}  # of the ids seen so far
        self.chat_template = self._find_template(directory)

    @property
    def vocab_size(self) -> int:
        """Number of tokens with a text; the model's embedding may have more rows."""
        return self._tokenizer.get_vocab_size()

    @property
    def bos_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        return self._special_id("eos_token")

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Ids of `text`, as it stands: special tokens written in it are recognised and none is added.

        `bos=True` puts the beginning-of-sentence token in front, unless the text already begins with it or the
        tokenizer has none. The model was trained with it at the start of every sequence, so plain prompts and scored
        texts use it; chat templates write it themselves.

        Raises `UserError` where `text` is none, or has half of a surrogate pair.
        """
        check_text("text", text)
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        return ids

    def decode(self, ids: Iterable[int], *, special_tokens: bool = False) -> str:
        """The text of `ids`, without special tokens unless they are asked for. Ids below 0 and ids that no token has
        are left out."""
        shown_ids = [int(id) for id in ids if id >= 0 and (special_tokens or int(id) not in self.special_ids)]
        return self._tokenizer.decode(shown_ids, skip_special_tokens=False)

    def token_text(self, id: int) -> str | None:
        """What one id stands for, special tokens written out; bytes that are no whole character as U+FFFD. None where
        no token has the id."""
        if not 0 <= id < 2**32 or self._tokenizer.id_to_token(id) is None:
            return None
        return self._tokenizer.decode([id], skip_special_tokens=False)

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes that an id stands for; none for special tokens and ids that no token has."""
        token = self._bytes.get(id)
        if token is None:
            token = self._bytes[id] = self._token_bytes(id)
        return token

    def _token_bytes(self, id: int) -> bytes:
        token = None if id < 0 or id in self.special_ids else self._tokenizer.id_to_token(id)
        if token is None:
            return b""
        table = _byte_of_character()
        try:
            return bytes(table[character] for character in token)
        except KeyError:  # an added token is written as itself
            return token.encode()

    def stream_decoder(self) -> "StreamDecoder":
        """A decoder that takes one id at a time and returns only whole characters."""
        return StreamDecoder(self)

    def render_chat(
        self, messages: Sequence[Message], *, thinking: bool = False, add_generation_prompt: bool = True
    ) -> str:
        """The chat as one text.

        Args:
          messages: see `checked_messages`; the roles are system, user, assistant, and what else the template knows.
          thinking: the model shall reason before it answers.
          add_generation_prompt: end with the beginning of an answer.

        Raises:
          UserError: bad messages, no chat template, or one that fails; in one line.
        """
        messages = checked_messages(messages)
        if self.chat_template is None:
            raise UserError(
                "chat_template: the checkpoint has none, or none named default, and its tokenizer lacks DeepSeek's "
                "turn tokens"
            )
        if not isinstance(self.chat_template, str):
            raise UserError(f"chat_template: {shown(self.chat_template)}; must be a text")
        try:
            return _compile(self.chat_template).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                thinking=thinking,
                enable_thinking=thinking,
                **self.special_tokens,
            )
        except jinja2.TemplateError as error:
            raise UserError(f"chat_template: {_one_line(error)}") from error
        except Exception as error:  # a template is a program: any error that Python has can come of one
            raise UserError(f"chat_template: fails with {type(error).__name__}: {_one_line(error)}") from error

    def encode_chat(
        self, messages: Sequence[Message], *, thinking: bool = False, add_generation_prompt: bool = True
    ) -> list[int]:
        """Ids of the rendered chat."""
        return self.encode(self.render_chat(messages, thinking=thinking, add_generation_prompt=add_generation_prompt))

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._tokenizer.token_to_id(text)

    def _find_template(self, directory: Path) -> str | None:
        file = directory / "chat_template.jinja"
        if present(file):
            try:
                return decoded(file.read_bytes())
            except UnicodeDecodeError as error:
                raise UserError(f"{file}: not UTF-8 text") from error
        settings_file = directory / "tokenizer_config.json"
        template = (read_json(settings_file) if present(settings_file) else {}).get("chat_template")
        if template is None and all(self._tokenizer.token_to_id(token) is not None for token in _BUILT_IN_TOKENS):
            return BUILT_IN_TEMPLATE
        return default_template(settings_file, template)


class StreamDecoder:
    """Decodes ids one by one; holds back the bytes of a character until all have come."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, id: int) -> str:
        """The text that `id` completes, possibly empty."""
        return self._decoder.decode(self._tokenizer.token_bytes(int(id)))

    def finish(self) -> str:
        """What was held back, as replacement characters."""
        return self._decoder.decode(b"", final=True)


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 bytes stand for themselves, the 68 others for U+0100 onwards."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


@functools.cache
def _compile(template: str) -> jinja2.Template:
    """The template in the environment that Hugging Face transformers gives it (same options, helpers and filter)."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
