"""`dsv32 score`."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv32_jax.cli.inputs import loaded, print_json, read_text, read_token_ids, replacing, say, tokenizer_of
from dsv32_jax.cli.options import (
    Attention,
    Backends,
    CheckFlag,
    ComputeDtype,
    IndexTopk,
    Json,
    Model,
    NoActQuant,
    NoMtp,
    PartFlag,
    TextFile,
    TokenIds,
)
from dsv32_jax.errors import UserError

if TYPE_CHECKING:
    from dsv32_jax.generate.tokenizer import Tokenizer


def score(
    model: Model = "demo",
    text_file: TextFile = None,
    token_ids: TokenIds = None,
    window: Annotated[
        int | None,
        typer.Option("--window", help="A longer text is read in pieces of so many tokens. Default: its context."),
    ] = None,
    stride: Annotated[
        int | None, typer.Option("--stride", help="Tokens from one piece to the next. Default: half of --window.")
    ] = None,
    attention: Attention = "sparse",
    index_topk: IndexTopk = None,
    backend: Backends = None,
    compute_dtype: ComputeDtype = None,
    no_act_quant: NoActQuant = False,
    no_mtp: NoMtp = False,
    part: PartFlag = None,
    check: CheckFlag = False,
    as_json: Json = False,
    save_logits: Annotated[
        Path | None, typer.Option("--save-logits", help="Write float32 [B, T, vocab] here (.npy); 0 where absent.")
    ] = None,
) -> None:
    """Log-likelihood of a text or of token ids.

    A text is scored after the beginning-of-sentence token; of token ids the first in each row is not scored. A text
    that is longer than --window is scored in pieces that overlap, each after that token: every token once, with at
    least --window minus --stride tokens before it.

    Example: dsv32 score --model DIR --text-file book.txt --json
    """
    import numpy as np

    from dsv32_jax.generate.windows import check_windows, score_windows

    if (text_file is None) == (token_ids is None):
        raise UserError("--text-file, --token-ids: give one of the two")
    if token_ids is not None and (window is not None or stride is not None):
        raise UserError("--window, --stride: go with --text-file; rows of --token-ids are scored whole")
    check_windows(window, stride)
    text = None if text_file is None else read_text(text_file, "--text-file")
    ids = None if token_ids is None else read_token_ids(token_ids)
    with replacing(save_logits, "--save-logits") as logits_file:
        m = loaded(model, compute_dtype, no_act_quant, attention, index_topk, backend, no_mtp, part, check)
        if text is not None:
            row, windows, reading = _windows(m, text, window, stride)
            rows, width = [row], len(row)
        else:
            assert ids is not None
            # The file has the token file's own width, also where every row ends before it.
            rows, width = m.rows(ids), ids.shape[1]
        out = None
        if logits_file is not None:
            shape = (len(rows), width, m.config.vocab_size)
            out = np.lib.format.open_memmap(logits_file, mode="w+", dtype=np.float32, shape=shape)
        if text is not None:
            result = score_windows(m, rows[0], windows, out)
        else:
            assert ids is not None
            result = m.score(ids, out=out)
        if out is not None:
            out.flush()
    bits = None
    if text is not None:
        scored = len(text.encode()) - _unscored_bytes(tokenizer_of(m, "--text-file"), text, rows[0][0])
        bits = -result.log_likelihood / math.log(2) / scored
    summary = {"perplexity": result.perplexity, "bits_per_byte": bits, "tokens": result.tokens}
    summary["log_likelihood"] = result.log_likelihood
    if as_json:
        pairs = zip(result.log_likelihoods, rows, strict=True)
        summary |= reading if text is not None else {}
        print_json(**summary, log_likelihoods=[values[: len(row) - 1].tolist() for values, row in pairs])
        return
    for name, value in summary.items():
        if value is not None:
            typer.echo(f"{name:<15} {value:.6g}" if isinstance(value, float) else f"{name:<15} {value}")


def _unscored_bytes(tokenizer: "Tokenizer", text: str, first: int) -> int:
    """The bytes of a text in its first token, which is not scored; 0 where that token was put in front of it."""
    if first not in tokenizer.special_ids:
        return len(tokenizer.token_bytes(first))
    first_text = tokenizer.token_text(first) or ""
    return len(first_text.encode()) if text.startswith(first_text) else 0


def _windows(
    m: Any, text: str, window: int | None, stride: int | None
) -> tuple[list[int], Sequence[Any], dict[str, int]]:
    """(ids of a text, its windows, their number and sizes); prints a note where there are several."""
    from dsv32_jax.generate.windows import check_windows, windows_of

    longest = m.config.max_position_embeddings
    if window is None:
        window = longest
    elif window > longest:
        raise UserError(f"--window {window}: the model takes at most max_position_embeddings = {longest}")
    stride = max(1, window // 2) if stride is None else stride
    check_windows(window, stride)
    tokenizer = tokenizer_of(m, "--text-file")
    ids = tokenizer.encode(text, bos=True)
    if len(ids) < 2:
        raise UserError("--text-file: 1 token; a score needs at least 2, the first has nothing before it")
    windows = windows_of(ids, window, stride, tokenizer.bos_id)
    reading = {"windows": len(windows), "window": window, "stride": stride}
    if len(windows) > 1:
        say(
            f"note: {len(ids)} tokens in {len(windows)} windows of {window}, each {stride} further on; every token is "
            f"scored once, with at least {window - stride} before it"
        )
    return ids, windows, reading
