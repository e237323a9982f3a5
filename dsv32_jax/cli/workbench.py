"""Verbs of the workbench that price a change: `compare`, `ablate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv32_jax.cli.inputs import print_json, read_text, say
from dsv32_jax.cli.options import Backends, Json, NoMtp, PartFlag, TextFile
from dsv32_jax.errors import UserError

if TYPE_CHECKING:
    from dsv32_jax.generate.language_model import LanguageModel

ModelOrRandom = Annotated[
    str, typer.Option("--model", help='A checkpoint, "demo", or "full-width:N": random weights in N layers.')
]
SetFlag = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="An option of the run: index_topk=64, scheme=int8; repeat it."),
]
Window = Annotated[
    int | None,
    typer.Option("--window", min=2, help="Tokens of a piece of text. Default: twice the index_topk, at most 4096."),
]
Windows = Annotated[int, typer.Option("--windows", min=1, help="Pieces of text, at most.")]
Needles = Annotated[int, typer.Option("--needles", min=0, help="Pieces with a hidden fact and a question.")]
Batch = Annotated[
    int | None, typer.Option("--batch", min=1, help="Sequences of a decode step. Default: 1, on a GPU 32.")
]
Context = Annotated[
    int | None,
    typer.Option("--context", min=64, help="Tokens of a sequence, a multiple of 64. Default: 512, on a GPU 8192."),
]
PromptTokens = Annotated[
    int | None, typer.Option("--prompt-tokens", min=1, help="Of a prompt's step. Default: 128, on a GPU 2048.")
]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="How often each step is timed, in turns.")]
NoQuality = Annotated[bool, typer.Option("--no-quality", help="Measure time and memory alone.")]
Out = Annotated[Path | None, typer.Option("--out", help="Write the results here, as JSON.")]


def compare(
    first: Annotated[
        str, typer.Argument(metavar="[A]", help='The reference: a checkpoint, "demo", or "full-width:N".')
    ] = "demo",
    second: Annotated[str | None, typer.Argument(metavar="[B]", help="What is compared with it. Default: A.")] = None,
    sets: SetFlag = None,
    part: PartFlag = None,
    backend: Backends = None,
    sets_a: Annotated[list[str] | None, typer.Option("--set-a", metavar="FIELD=VALUE", help="The same, of A.")] = None,
    part_a: Annotated[
        list[str] | None, typer.Option("--part-a", metavar="PART=FUNCTION", help="The same, of A.")
    ] = None,
    backend_a: Annotated[
        list[str] | None, typer.Option("--backend-a", metavar="[OP=]NAME", help="The same, of A.")
    ] = None,
    text_file: TextFile = None,
    window: Window = None,
    windows: Windows = 4,
    needles: Needles = 8,
    no_quality: NoQuality = False,
    batch: Batch = None,
    context: Context = None,
    prompt_tokens: PromptTokens = None,
    rounds: Rounds = 7,
    no_mtp: NoMtp = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Two checkpoints, or one under two settings, in one table: quality, speed, memory.

    --set, --part and --backend change B, those with -a change A. Text is the project's held-out text, or --text-file.

    Example: dsv32 compare demo --set index_topk=64
    """
    from dsv32_jax.experiments.results import write_json
    from dsv32_jax.experiments.workbench.compare import compare as measure
    from dsv32_jax.experiments.workbench.compare import lines
    from dsv32_jax.experiments.workbench.cost import Work
    from dsv32_jax.experiments.workbench.models import RANDOM, model_named
    from dsv32_jax.experiments.workbench.settings import Setting, in_scheme, random_in_scheme

    text = None if text_file is None else read_text(text_file, "--text-file")
    changed = [*(sets or []), *(part or []), *(backend or [])]
    changed_a = [*(sets_a or []), *(part_a or []), *(backend_a or [])]
    settings = (
        Setting.of(" ".join([first, *changed_a]), sets_a or (), part_a or (), backend_a or (), suffix="-a"),
        Setting.of(" ".join([second or first, *changed]), sets or (), part or (), backend or ()),
    )
    check_writable(out)
    a = model_named(first, mtp=not no_mtp)
    b = a if second in (None, first) else model_named(second, mtp=not no_mtp)
    work = Work.of(a, batch, context, prompt_tokens)
    texts = None if no_quality else texts_of(a, text, text_file, window, windows, needles)
    both_random = a is b and first.startswith(RANDOM)
    weights_in = random_in_scheme if both_random else in_scheme
    content = {"models": [first, second or first]}
    content |= measure((a, b), settings, texts, work, rounds, weights_in=weights_in)
    if out is not None:
        write_json(out, content)
    if as_json:
        print_json(**content)
    else:
        typer.echo("\n".join(lines(content)))


def ablate(
    groups: Annotated[
        list[str] | None, typer.Argument(metavar="[GROUP]...", help="What to price; see --list. Default: what fits.")
    ] = None,
    model: ModelOrRandom = "demo",
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A row with this option; repeat it.")
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option("--part", metavar="PART=FUNCTION", help="A row with this part: a name, or module:function."),
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option("--backend", metavar="[OP=]NAME", help="A row with this backend; repeat it.")
    ] = None,
    one_at_a_time: Annotated[
        bool, typer.Option("--one-at-a-time", help="Change one thing of the baseline in each row.")
    ] = False,
    leave_one_out: Annotated[
        bool, typer.Option("--leave-one-out", help="Take one thing of the model as it is away in each row.")
    ] = False,
    list_: Annotated[bool, typer.Option("--list", help="Print the groups, and measure nothing.")] = False,
    text_file: TextFile = None,
    window: Window = None,
    windows: Windows = 2,
    needles: Needles = 4,
    no_quality: NoQuality = False,
    batch: Batch = None,
    context: Context = None,
    prompt_tokens: PromptTokens = None,
    rounds: Rounds = 7,
    no_mtp: NoMtp = False,
    figure: Annotated[Path | None, typer.Option("--figure", help="Draw the rows here, as PNG.")] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """What each change is worth, in time, memory and quality: from a baseline to the model as it is, one at a time.

    Groups that are named come with what stands beside them (INT8, another top-k); without any, it is the way from the
    baseline to the model as it is. What --set, --part and --backend name are rows like any other.

    Example: dsv32 ablate selection --part index_select=my_module:my_function
    """
    import jax

    from dsv32_jax.experiments.results import write_json
    from dsv32_jax.experiments.workbench import ablations, prefixes
    from dsv32_jax.experiments.workbench.ablate import ablate as measure
    from dsv32_jax.experiments.workbench.ablate_table import lines
    from dsv32_jax.experiments.workbench.cost import Work
    from dsv32_jax.experiments.workbench.models import RANDOM, model_named
    from dsv32_jax.experiments.workbench.settings import in_scheme, random_in_scheme

    if list_:
        for name, what in (
            ablations.GROUPS | {n: f"not offered: {w}" for n, w in ablations.NOT_OFFERED.items()}
        ).items():
            typer.echo(f"{name:<14}{what}")
        return
    if one_at_a_time and leave_one_out:
        raise UserError("--one-at-a-time, --leave-one-out: give one of the two")
    mode = "one-at-a-time" if one_at_a_time else "leave-one-out" if leave_one_out else "cumulative"
    text = None if text_file is None else read_text(text_file, "--text-file")
    mine = ablations.yours(sets or (), part or (), backend or ())
    check_writable(out)
    check_writable(figure, "--figure")
    named = tuple(groups or ())
    if not named and not mine.others:
        named = ablations.ON_CPU if jax.default_backend() == "cpu" else ablations.ON_GPU
    ablations.check_groups(named)
    m = model_named(model, mtp=not no_mtp)
    axes, left_out = ablations.axes_of(m, named, others=bool(groups))
    rows = ablations.plan([*axes, mine], mode)
    rows = rows if len(rows) > 1 else []
    if not rows and ablations.PREFIXES not in named:
        raise UserError(f"{', '.join(named)}: nothing to compare ({'; '.join(left_out.values()) or 'no such change'})")
    if not rows and figure is not None:
        raise UserError("--figure: there is no step to draw; name another group beside prefixes")
    work = Work.of(m, batch, context, prompt_tokens)
    texts = None if no_quality or not rows else texts_of(m, text, text_file, window, windows, needles)
    content = measure(
        m,
        rows,
        texts,
        work,
        rounds,
        weights_in=random_in_scheme if model.startswith(RANDOM) else in_scheme,
        out=out,
        say=say,
        model=model,
        mode=mode,
        groups=list(named),
        left_out=left_out,
    )
    if ablations.PREFIXES in named:
        content["prefixes"] = prefixes.measure(m)
    if out is not None:
        write_json(out, content)
    if figure is not None:
        from dsv32_jax.experiments.workbench.waterfall import draw

        draw(content, figure)
    if as_json:
        print_json(**content)
    else:
        typer.echo("\n".join(lines(content)))


def texts_of(
    m: "LanguageModel", text: str | None, path: Path | None, window: int | None, windows: int, needles: int
) -> Any:
    """The `Texts` that quality is measured on; None, with a note, where the model has no tokenizer."""
    from dsv32_jax.experiments.workbench.quality import Texts

    if m.tokenizer is None:
        if text is not None:
            raise UserError("--text-file: the model has no tokenizer, which this needs")
        say("note: the model has no tokenizer: quality is left out")
        return None
    more: dict[str, Any] = {} if path is None else {"source": path.name}
    texts = Texts.of(m, length=window, windows=windows, needle_windows=needles, text=text, **more)
    tokens, k = texts.ids.shape[1], m.options.index_topk or m.config.index_topk
    if tokens <= k:
        say(f"note: windows of {tokens} tokens are no longer than index_topk = {k}: recall is left out; see --window")
    if needles and not texts.needles:
        say(f"note: windows of {tokens} tokens are too short for needles; see --window")
    return texts


def check_writable(path: Path | None, flag: str = "--out") -> None:
    """Raises UserError for a place where no file can be written, before anything is measured."""
    if path is None:
        return
    from dsv32_jax.experiments.command_line import writable

    writable(path)
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a directory; give the name of a file")
