"""The tokens that begin and end a text, from tokenizer_config.json, special_tokens_map.json and config.json."""

import itertools
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from dsv32_jax.common.fields import shown
from dsv32_jax.common.reading import present, read_json, surrogate_in
from dsv32_jax.errors import CheckpointWarning, UserError

_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
_SETTINGS, _MAP, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def add_missing_tokens(tokenizer: tokenizers.Tokenizer, directory: Path) -> None:
    """Adds the tokens that only tokenizer_config.json or added_tokens.json has, as transformers does.

    Raises:
      UserError: a malformed entry, or one whose id is not the next free one.
    """
    entries: dict[int, tuple[str, tokenizers.AddedToken]] = {}
    try:
        for content, id in _read(directory / _ADDED).items():
            if not _is_id(id):
                raise ValueError(f"id {shown(id)}")
            entries[id] = (_ADDED, tokenizers.AddedToken(content))
        for id, raw in (_read(directory / _SETTINGS).get("added_tokens_decoder") or {}).items():
            flags = {flag: raw[flag] for flag in _FLAGS if flag in raw}
            if not (id.isascii() and id.isdigit()) or not all(isinstance(flag, bool) for flag in flags.values()):
                raise ValueError(f"id {shown(id)}, {shown(flags)}")
            entries[int(id)] = (_SETTINGS, tokenizers.AddedToken(raw["content"], **flags))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{directory}: added tokens must be {{text: id}} in {_ADDED} and {{id: {{content: text}}}} in "
            f"added_tokens_decoder of {_SETTINGS} ({type(error).__name__}: {error})"
        ) from error
    for id, (file, token) in sorted(entries.items()):
        if tokenizer.token_to_id(token.content) is None:
            tokenizer.add_tokens([token])
        if (actual := tokenizer.token_to_id(token.content)) != id:
            raise UserError(f"{directory / file}: {token.content!r} is token {id}, and in tokenizer.json {actual}")


def special_tokens(tokenizer: tokenizers.Tokenizer, directory: Path) -> dict[str, str]:
    """The text of bos_token, eos_token, pad_token and unk_token, where a file has one.

    tokenizer_config.json takes precedence over special_tokens_map.json, and both over the ids of config.json. All files
    that name a beginning-of-sentence token must agree, generation_config.json too. A token that a file names becomes a
    special token, also where tokenizer.json only has its text in the vocabulary.

    Raises:
      UserError: a token that is no text, that tokenizer.json does not have, or beginning-of-sentence tokens that
        disagree.
    """
    ids = _read(directory / "config.json")
    texts: dict[str, str] = {}
    bos: list[
        tuple[str, int | None, str]
    ] = []  # a statement of a file, the token that it names, and the statement in short
    for file in (_SETTINGS, _MAP):
        settings = _read(directory / file)
        for name in _NAMES:
            text = _text(directory / file, name, settings.get(name))
            if text is None or (name in texts and name != "bos_token"):
                continue
            id = tokenizer.token_to_id(text)
            if id is None and name in ("bos_token", "eos_token"):
                raise UserError(f"{directory / file}: {name} {text!r} is no token of tokenizer.json")
            if name == "bos_token":
                bos.append((f"{directory / file}: bos_token {text!r} is token {id}", id, f"{file} names {id}"))
            texts.setdefault(name, text)
            if id is not None and id not in tokenizer.get_added_tokens_decoder():
                tokenizer.add_special_tokens([text])
    for file in ("config.json", "generation_config.json"):
        if _is_id(id := _read(directory / file).get("bos_token_id")):
            statement = f"{file}'s bos_token_id is {id}"
            bos.append((f"{directory}: {statement}", id, statement))
    for first, second in itertools.pairwise(bos):
        if first[1] != second[1]:
            raise UserError(f"{first[0]}, and {second[2]}; they must agree")
    for name in _NAMES:
        id = ids.get(f"{name}_id")
        id = id[0] if isinstance(id, list) and id else id
        if name in texts or not isinstance(id, int) or isinstance(id, bool):
            continue
        if (token := tokenizer.get_added_tokens_decoder().get(id)) is not None:
            texts[name] = token.content
        elif name == "bos_token":
            message = (
                f"{directory}: config.json's bos_token_id {id} is no special token of tokenizer.json, and no other "
                "file names one; texts have no beginning-of-sentence token in front"
            )
            warnings.warn(message, CheckpointWarning, stacklevel=1)
    return texts


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if present(path) else {}


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(path: Path, name: str, value: object) -> str | None:
    """The text of a token's entry, which is a text, or an object with the text and flags."""
    text = value.get("content") if isinstance(value, Mapping) else value
    if value is None or (isinstance(text, str) and surrogate_in(text) is None):
        return text or None  # type: ignore[return-value]
    raise UserError(f'{path}: {name} is {shown(value)}; it must be a text, {{"content": text}} or null')


def default_template(path: Path, template: object) -> str | None:
    """The chat template of a tokenizer_config.json: a text, or the one named default of several."""
    if template is None or isinstance(template, str):
        return template
    try:
        by_name = {entry["name"]: entry["template"] for entry in reversed(template)}  # type: ignore[call-overload]
        if not all(isinstance(text, str) for text in by_name.values()):
            raise TypeError
        return by_name.get("default")
    except (KeyError, TypeError):
        right = json.dumps([{"name": "default", "template": "..."}])
        raise UserError(f"{path}: chat_template is {shown(template)}; it must be a text or {right}") from None
