"""Verbs that measure: `fidelity`, `bench`."""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv32_jax.cli.inputs import loaded, print_json, read_text, read_token_ids, say, tokenizer_of
from dsv32_jax.cli.options import (
    Attention,
    Backend,
    Backends,
    CheckFlag,
    ComputeDtype,
    IndexTopk,
    Json,
    NoActQuant,
    NoMtp,
    PartFlag,
    TextFile,
    TokenIds,
)
from dsv32_jax.errors import UserError

if TYPE_CHECKING:
    from dsv32_jax.config import ModelConfig


def fidelity(
    first: Annotated[str, typer.Argument(metavar="[A]", help="The checkpoint that is held to be right.")] = "demo",
    second: Annotated[str, typer.Argument(metavar="[B]", help="The checkpoint that is judged.")] = "demo",
    text_file: TextFile = None,
    token_ids: TokenIds = None,
    window: Annotated[
        int | None,
        typer.Option("--window", min=2, help="Tokens of a piece of the text. Default: 1024, or twice the index_topk."),
    ] = None,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Pieces of the text, at most.")] = 4,
    attention: Attention = "sparse",
    index_topk: IndexTopk = None,
    backend: Backends = None,
    compute_dtype: ComputeDtype = None,
    no_act_quant: NoActQuant = False,
    no_mtp: NoMtp = False,
    part: PartFlag = None,
    check: CheckFlag = False,
    as_json: Json = False,
) -> None:
    """What B changes against A: recall of the chosen tokens, attention mass kept, KL of the logits.

    A text is read in pieces, with the tokenizer of A. The memory that is needed grows with the square of a piece.
    --part and --backend OP=NAME change B alone.

    Example: dsv32 fidelity original quantised --text-file book.txt
    """
    if (text_file is None) == (token_ids is None):
        raise UserError("--text-file, --token-ids: give one of the two")
    text = None if text_file is None else read_text(text_file, "--text-file")
    rows = [] if token_ids is None else list(read_token_ids(token_ids))
    from dsv32_jax.fidelity import compare

    traces: list[list[Any]] = []
    chosen = 0
    for name in (first, second):  # one after the other: both need not fit at once
        parts, backends = part, backend
        if not traces:  # A has none of its parts replaced
            parts, backends = None, [text for text in backend or [] if "=" not in text]
        m = loaded(name, compute_dtype, no_act_quant, attention, index_topk, backends, no_mtp, parts, check)
        if not traces:
            _check_comparable(first, m.config, second)
        if text is not None and not traces:
            rows = _pieces(m, text, window, windows)
        traces.append(m.trace(rows))
        chosen = max(chosen, m.options.index_topk or m.config.index_topk)
        del m
    try:
        comparisons = [compare(a, b) for a, b in zip(*traces, strict=True)]
    except ValueError as error:
        raise UserError(str(error)) from error
    short = sum(row["tokens"] <= chosen for row in comparisons)
    if short:
        sequences = (
            "no sequence is" if short == len(comparisons) else f"{short} of {len(comparisons)} sequences are not"
        )
        say(f"note: {sequences} longer than index_topk = {chosen}: their tokens see all before them, so recall is 1")
    if as_json:
        print_json(rows=[row | {"all_visible_chosen": row["tokens"] <= chosen} for row in comparisons])
        return
    for number, row in enumerate(comparisons):
        typer.echo(f"--- sequence {number}: {row['tokens']} tokens")
        for layer in row["layers"]:
            typer.echo("  ".join(f"{name} {value:.4g}" for name, value in layer.items()))
        typer.echo("  ".join(f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, float)))


def _check_comparable(first: str, config: "ModelConfig", second: str) -> None:
    """Refuses a second model that cannot be compared with the first, of this config, before that runs for long."""
    from dsv32_jax.config import ModelConfig
    from dsv32_jax.fidelity import EQUAL_FIELDS
    from dsv32_jax.generate import loading

    other = ModelConfig.from_hf(loading.find(second))
    for field in EQUAL_FIELDS:
        if getattr(config, field) != getattr(other, field):
            raise UserError(
                f"{second}: {field} is {getattr(other, field)}, and of {first} {getattr(config, field)}; "
                "models that are compared must have the same"
            )


def _pieces(m: Any, text: str, window: int | None, windows: int) -> list[Any]:
    """The first `windows` pieces of a text, as ids."""
    from dsv32_jax.generate.windows import windows_of

    longest = m.config.max_position_embeddings
    if window is None:
        window = min(longest, max(1024, 2 * (m.options.index_topk or m.config.index_topk)))
    elif window > longest:
        raise UserError(f"--window {window}: the model takes at most max_position_embeddings = {longest}")
    tokenizer = tokenizer_of(m, "--text-file")
    ids = tokenizer.encode(text, bos=True)
    pieces = windows_of(ids, window, window - 1, tokenizer.bos_id)
    if len(pieces) > windows:
        say(f"note: the first {windows} of {len(pieces)} pieces of {window} tokens; see --windows")
    return [piece.ids for piece in pieces[:windows]]


def bench(
    ops: Annotated[list[str] | None, typer.Argument(metavar="[OP]...", help="Default: all; see --list.")] = None,
    shape: Annotated[str | None, typer.Option("--shape", help="One shape of theirs; see --list.")] = None,
    backend: Backend = "auto",
    peers: Annotated[
        list[Path] | None, typer.Option("--peers", help="Times of other libraries on this machine; repeatable.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Results. Default: experiments/results/kernels.json.")
    ] = None,
    repetitions: Annotated[int, typer.Option("--repetitions", min=1, help="Of one call, at most.")] = 20,
    budget_seconds: Annotated[
        float | None, typer.Option("--budget-seconds", help="Begin no further shape after this time.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only shapes with a target, and no reference.")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="Small shapes on any device, written only to --out.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Print ops and shapes, and measure nothing.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Write the results' tables into docs/kernels, and measure nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Time kernels against their references, the roofline and other libraries. Exit code 1: a shape failed.

    Example: dsv32 bench top_k --peers peers.json
    """
    from dsv32_jax.experiments.bench import report as reports
    from dsv32_jax.experiments.bench import run

    settings = run.Settings(
        ops=ops or (),
        shape=shape,
        backend=backend,
        peers=peers or (),
        out=out or (None if tiny else reports.RESULT),
        repetitions=repetitions,
        budget_seconds=budget_seconds,
        quick=quick,
        tiny=tiny,
    )
    if list_:
        shapes = run.chosen_shapes(settings)
        if as_json:
            print_json(shapes=[{"op": each.op, "shape": each.name, **each.dims()} for each in shapes])
            return
        for each in shapes:
            typer.echo(f"{each.op:<15} {each.name:<22} {' '.join(f'{k}={v}' for k, v in each.dims().items())}")
        return
    if report:
        pages = reports.write_pages()
        if as_json:
            print_json(pages=list(map(str, pages)))
            return
        for path in pages:
            typer.echo(f"wrote {path}")
        return
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        content, failed = run.measure(settings, say=lambda line: print(line, flush=True))
    if as_json:
        print_json(**content)
    else:
        reports.print_table(content)
    if failed:
        print(f"shapes that failed: {failed}", file=sys.stderr)
        sys.exit(1)
