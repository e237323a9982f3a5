"""What all verbs share: reading files, loading the model, writing results."""

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dsv32_jax.common.files import whole_file
from dsv32_jax.common.reading import decoded
from dsv32_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from dsv32_jax.generate.language_model import LanguageModel
    from dsv32_jax.generate.tokenizer import Tokenizer


def loaded(
    model: str,
    compute_dtype: str | None,
    no_act_quant: bool,
    attention: str,
    index_topk: int | None,
    backend: list[str] | None,
    no_mtp: bool = False,
    part: list[str] | None = None,
    check: bool = False,
) -> "LanguageModel":
    """Loads the model that the flags name, with their options and parts."""
    from dsv32_jax.generate.loading import load

    everywhere, functions = functions_of(part, backend)  # before a model is loaded, which can take minutes
    m = load(
        model,
        compute_dtype=compute_dtype,
        act_quant=False if no_act_quant else None,
        attention=attention,
        index_topk=index_topk,
        backend=everywhere or "auto",
        mtp=not no_mtp,
    )
    return m.with_parts(check=check, **functions) if functions or check else m


def functions_of(part: list[str] | None, backend: list[str] | None) -> tuple[str | None, dict[str, Any]]:
    """The backend of all ops, None where no flag says, and the functions that `--part` and `--backend OP=NAME` name."""
    from dsv32_jax.model.variants import backends_of, parts_of

    try:
        functions = parts_of(part or [])
        everywhere, pinned = backends_of(backend or [])
    except UserError as error:
        raise UserError(f"--{error}") from error
    for name in functions.keys() & pinned.keys():
        raise UserError(f"--backend {name}=...: --part replaces {name} as well; give one of the two")
    return everywhere, functions | pinned


def name_of(model: str) -> str:
    """The name of a --model for people: "org/name" of the hub, or the last part of a directory."""
    return model if model.count("/") == 1 and not Path(model).exists() else Path(model).resolve().name


def check_sampling(temperature: float | None, top_p: float | None, seed: int) -> None:
    """Raises `UserError` for wrong values before a model is loaded, which can take minutes."""
    from dsv32_jax.generate.sampling import check_sampling

    check_sampling(0.0 if temperature is None else temperature, 1.0 if top_p is None else top_p, seed)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The arguments of `LanguageModel.generate` and `stream` that say how tokens are sampled."""

    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    ignore_eos: bool = False


def sampling_of(
    m: "LanguageModel", temperature: float | None, top_p: float | None, seed: int, ignore_eos: bool
) -> Sampling:
    """The flags' sampling, with the model's defaults where they say nothing."""
    temperature, top_p = m.sampling(temperature, top_p, seed)
    return Sampling(temperature, top_p, seed, ignore_eos)


def tokenizer_of(m: "LanguageModel", flag: str) -> "Tokenizer":
    """The tokenizer of a model that must have one, because of `flag`."""
    if m.tokenizer is None:
        raise UserError(f"{flag}: the checkpoint has no tokenizer.json, which this needs")
    return m.tokenizer


def chat_of(system: str | None, user: str) -> list[dict[str, str]]:
    """The messages of one prompt."""
    turns = {"system": system, "user": user}
    return [{"role": role, "content": text} for role, text in turns.items() if text is not None]


def prompts_of(prompt: list[str] | None, files: list[Path] | None, token_ids: Path | None) -> "list[str] | np.ndarray":
    """The prompts to be continued: texts, or int32 [B, T]."""
    texts = [*(prompt or []), *(read_text(path, "--prompt-file") for path in files or [])]
    if token_ids is not None and texts:
        raise UserError("--token-ids: cannot be combined with --prompt or --prompt-file")
    if token_ids is not None:
        return read_token_ids(token_ids)
    if not texts:
        raise UserError("--prompt, --prompt-file, --token-ids: give one of them")
    if "" in texts:
        raise UserError(f"prompt {texts.index('')}: empty; it must have at least one character")
    return texts


def read_text(path: Path, flag: str) -> str:
    """The text of a UTF-8 file that is not empty; errors name the flag."""
    try:
        text = decoded(path.read_bytes())
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path}: not UTF-8 text (byte {error.start})") from error
    if not text:
        raise UserError(f"{flag} {path}: empty; it must have at least one character")
    return text


def read_token_ids(path: Path) -> "np.ndarray":
    """int32 [B, T] of an .npy file."""
    import numpy as np

    try:
        ids = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UserError(f"--token-ids {path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise UserError(f"--token-ids {path}: not an .npy file of int32 [B, T]") from error
    if not isinstance(ids, np.ndarray) or ids.dtype != np.int32 or ids.ndim != 2:
        content = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, np.ndarray) else "an .npz archive"
        raise UserError(f"--token-ids {path}: is {content}; must be int32 [B, T]")
    return ids


@contextlib.contextmanager
def replacing(path: Path | None, flag: str) -> Iterator[Path | None]:
    """A file beside `path` to write; it becomes `path` if the block ends well, and is removed otherwise.

    It is created at once, so that a wrong target shows before the model runs.
    """
    if path is None:
        yield None
        return
    with whole_file(path) as temporary:
        try:
            if path.is_dir():
                raise IsADirectoryError(None, "it is a directory")
            temporary.touch()
        except OSError as error:
            raise UserError(f"{flag} {path}: cannot be written: {error.strerror}") from error
        yield temporary


def save_ids(path: Path, tokens: "Sequence[Sequence[int]] | np.ndarray") -> None:
    """Writes token ids as int32, .npy."""
    import numpy as np

    with path.open("wb") as file:  # np.save would add .npy to a name without it
        np.save(file, np.asarray(tokens, np.int32))


def say(line: str) -> None:
    """Prints a line on stderr; standard output has only results."""
    print(line, file=sys.stderr, flush=True)


def print_json(**fields: Any) -> None:
    """Prints one object on a line."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(name): plain(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no infinity

    content = plain(fields)
    text = json.dumps(content, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:  # a name of a file that is not UTF-8, or an output that is not
        text = json.dumps(content)
    typer.echo(text)
