"""`dsv32 tokenize`."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from dsv32_jax.cli.inputs import print_json, read_text
from dsv32_jax.cli.options import Json, Model, TextFile
from dsv32_jax.common.reading import decoded
from dsv32_jax.errors import UserError

if TYPE_CHECKING:
    from dsv32_jax.generate.tokenizer import Tokenizer

LONGEST_ID = 10
"""Digits of an id: no tokenizer has more than 2**32 tokens."""
SHOWN = 40
"""Characters of a word that a message shows."""


def tokenize(
    inputs: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="A text; with --decode, ids. Default: stdin.")
    ] = None,
    model: Model = "demo",
    text_file: TextFile = None,
    decode: Annotated[bool, typer.Option("--decode", help="Ids to text.")] = False,
    bos: Annotated[
        bool, typer.Option("--bos", help="Put the beginning-of-sentence token in front, as `generate` and `score` do.")
    ] = False,
    skip_special_tokens: Annotated[
        bool, typer.Option("--skip-special-tokens", help="With --decode: leave them out.")
    ] = False,
    count: Annotated[bool, typer.Option("--count", help="Print only how many tokens there are.")] = False,
    as_json: Json = False,
) -> None:
    """Text to token ids, or back with --decode.

    Special tokens written in a text are read as such. --json has each token's text beside its id, and which of them
    are special.

    Example: dsv32 tokenize "The lighthouse" | dsv32 tokenize --decode
    """
    if inputs and text_file is not None:
        raise UserError("TEXT, --text-file: give one of the two")
    if bos and decode:
        raise UserError("--bos: goes with a text, not with --decode")
    if skip_special_tokens and not decode:
        raise UserError("--skip-special-tokens: goes with --decode")
    if inputs:
        text = " ".join(inputs)
    else:
        text = _standard_input() if text_file is None else read_text(text_file, "--text-file")
    tokenizer = _tokenizer(model)
    ids = _ids_of(text, tokenizer) if decode else tokenizer.encode(text, bos=bos)
    text = tokenizer.decode(ids, special_tokens=not skip_special_tokens)
    if as_json:
        special = tokenizer.special_ids
        tokens = [tokenizer.token_text(id) for id in ids]
        print_json(count=len(ids), ids=ids, tokens=tokens, special=[id in special for id in ids], text=text)
    elif count:
        typer.echo(len(ids))
    else:
        typer.echo(text if decode else " ".join(map(str, ids)))


def _tokenizer(model: str) -> "Tokenizer":
    from dsv32_jax.generate import loading

    tokenizer = loading.read_tokenizer(loading.find(model))
    if tokenizer is None:
        raise UserError(f"--model {model}: the checkpoint has no tokenizer.json")
    return tokenizer


def _standard_input() -> str:
    stream = getattr(sys.stdin, "buffer", sys.stdin)
    content = stream.read()
    try:
        return decoded(content) if isinstance(content, bytes) else content
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not UTF-8 text (byte {error.start})") from error


def _shortened(word: str) -> str:
    return word if len(word) <= SHOWN else f"{word[:SHOWN]}..."


def _ids_of(text: str, tokenizer: "Tokenizer") -> list[int]:
    """Ids separated by spaces, lines or commas, in brackets or not."""
    ids = []
    for word in text.replace(",", " ").strip("[] \n").split():
        if not (word.isascii() and word.isdigit()):
            raise UserError(f"--decode: {_shortened(word)} is no token id; give integers from 0")
        digits = word.lstrip("0") or "0"
        # Python reads no integer of thousands of digits.
        if len(digits) > LONGEST_ID or tokenizer.token_text(int(digits)) is None:
            raise UserError(
                f"--decode: the tokenizer has no token {_shortened(word)}; it has {tokenizer.vocab_size} tokens"
            )
        ids.append(int(digits))
    return ids
