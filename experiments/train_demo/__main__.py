"""Trains a small DeepSeek-V3.2 by the paper's stages; the model that ships as `demo` was made so.

python -m experiments.train_demo --size tiny          # every stage in some minutes on a CPU, on a text that ships
python -m experiments.train_demo --text FILE          # on a UTF-8 text of your own; --text may be given several times
python -m experiments.train_demo data                 # the demo model's corpus from Debian's archive, into .data
python -m experiments.train_demo                      # the demo model: hours on one GPU
python -m experiments.train_demo export --out FOLDER  # a finished run as a checkpoint in FP8 blocks
python -m experiments.train_demo evaluate             # held-out perplexity, needles, selection
python -m experiments.train_demo report               # figures and the model card, from the results

A run lies in .train/<size> (with --text, .train/<size>-text) or in --run: log.jsonl, a checkpoint in bfloat16 for each
finished stage, which `dsv32 generate --model` takes, and the exact state, from which the same command goes on.
"""

from pathlib import Path
from typing import Annotated

import typer

from dsv32_jax.errors import UserError
from dsv32_jax.experiments import command_line

app = typer.Typer(
    help=command_line.unwrapped(__doc__), no_args_is_help=False, add_completion=False, rich_markup_mode=None,
    pretty_exceptions_enable=False,
)  # fmt: skip

DATA, RUNS = Path(".data"), Path(".train")
Data = Annotated[Path, typer.Option("--data", help="Folder of the corpus and what is made from it.")]
RunFolder = Annotated[
    Path | None, typer.Option("--run", help="Folder of the run. Default: .train/<size>, or .train/<size>-text.")
]
Size = Annotated[str, typer.Option("--size", help="demo, or tiny: it learns nothing and shows that each stage works.")]


@app.callback(invoke_without_command=True)
def train(
    context: typer.Context,
    size: Size = "demo",
    run: RunFolder = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder that `data` made. Default: .data; for tiny the shipped text.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="A UTF-8 file to train on instead; repeatable. Its last part is held out."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="With --text: demo (the default), or own, trained on the text.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of initialisation and data order.")] = 0,
    until: Annotated[str | None, typer.Option(help="The last stage to run.")] = None,
    weights: Annotated[
        Path | None, typer.Option("--from", help="A stage's bfloat16 checkpoint of another machine to begin with.")
    ] = None,
    first: Annotated[str | None, typer.Option(help="The stage that begins with --from.")] = None,
) -> None:
    """Trains: all stages that are not done, or goes on where it was interrupted."""
    if context.invoked_subcommand is not None:
        return
    if (weights is None) != (first is None):
        raise UserError("--from and --first: give both or neither")
    if text and data is not None:
        raise UserError("--text and --data: give one of them")
    if tokenizer is not None and not text:
        raise UserError("--tokenizer: is for --text; other data have theirs")
    command_line.require("training", "optax", extra="train")
    from dsv32_jax.experiments.train_demo import texts
    from dsv32_jax.experiments.train_demo.sizes import size_named
    from dsv32_jax.experiments.train_demo.stages import Training

    chosen = size_named(size)
    for stage in filter(None, (until, first)):
        chosen.stage_number(stage)
    run = run or RUNS / (f"{size}-text" if text else size)
    vocab_size, length = chosen.config.vocab_size, max(stage.length for stage in chosen.stages)
    if text:
        folder = texts.of_files(run / "data", text, tokenizer or "demo", vocab_size, length)
    elif data is None and size == "tiny":
        folder = texts.shipped(run / "data", vocab_size, length)
    else:
        folder = data or DATA
    training = Training(size, run, folder, seed)
    training.tell_plan()
    params = training.train(until, weights, first)
    training.tell_end(params)


@app.command()
def data(folder: Data = DATA) -> None:
    """Makes the demo model's corpus from Debian's archive, with its tokenizer and its question and answer pairs.

    On Debian, with the programs mandoc, pod2text and dpkg-deb and the extra `train`: packages are downloaded with
    `apt-get download` (nothing is installed), unpacked, read, cleaned and split. What is there is not made again. The
    held-out excerpts go beside them: the repository's own are those of the shipped model.
    """
    from dsv32_jax.experiments.studies import held_out
    from dsv32_jax.experiments.train_demo import corpus, questions, tokenizer
    from dsv32_jax.experiments.train_demo.sizes import DEMO

    steps = {
        "documents.jsonl.xz: downloading and reading the packages": lambda: corpus.build(folder),
        "tokenizer.json: training the tokenizer, some minutes": lambda: tokenizer.train(folder, DEMO.vocab_size),
        "train.npz, held_out.npz: encoding": lambda: tokenizer.encode_corpus(folder),
        "questions.json: finding questions and answers": lambda: questions.build(folder),
        "questions.npz: encoding them": lambda: questions.encode(folder),
        f"{held_out.HELD_OUT.name}: choosing held-out excerpts": lambda: held_out.choose(
            folder, folder / held_out.HELD_OUT.name
        ),
    }
    for number, (words, make) in enumerate(steps.items(), 1):
        typer.echo(f"{number} of {len(steps)}  {folder}/{words}", err=True)
        make()
    typer.echo(f"the corpus is in {folder}")


@app.command()
def export(
    run: RunFolder = None,
    stage: Annotated[str | None, typer.Option("--stage", help="Default: the last one.")] = None,
    size: Size = "demo",
    out: Annotated[
        Path | None, typer.Option("--out", help="Default: the shipped demo model's folder, for --size demo alone.")
    ] = None,
) -> None:
    """Quantises a stage's checkpoint to FP8 blocks and writes it to --out, or where `load("demo")` finds it."""
    from dsv32_jax.experiments.results import writable
    from dsv32_jax.experiments.train_demo.export import export as write
    from dsv32_jax.experiments.train_demo.sizes import size_named
    from dsv32_jax.generate.loading import DEMO

    chosen = size_named(size)
    stage = stage or chosen.stages[-1].name
    chosen.stage_number(stage)
    if out is None and size != "demo":
        raise UserError(f"--out: must be given; a model of --size {size} does not take the place of the shipped one")
    out = out or writable(DEMO)
    write((run or RUNS / size) / stage, chosen.config, out)
    typer.echo(f"wrote {out}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Option("--model", help="A checkpoint with a tokenizer, or demo.")] = "demo",
    run: Annotated[Path | None, typer.Option(help="Folder of the run, to price FP8 and the sparse stage too.")] = None,
    windows: Annotated[int, typer.Option("--windows", help="Held-out texts.")] = 32,
    needles: Annotated[int, typer.Option("--needles", help="Of each length.")] = 16,
    traced: Annotated[int, typer.Option("--traced", help="Texts whose selection is looked at.")] = 2,
    out: Annotated[
        Path | None, typer.Option("--out", help="Default: experiments/results/demo_model.json of a clone.")
    ] = None,
) -> None:
    """Measures held-out perplexity, needles and selection of a trained model."""
    from dsv32_jax.experiments.results import RESULTS, writable
    from dsv32_jax.experiments.train_demo.evaluate import evaluate as measure

    out = writable(out or RESULTS / "demo_model.json")
    measure(model, out, run=run, windows=windows, needles_each=needles, traced=traced)
    typer.echo(f"wrote {out}")


@app.command()
def report(run: Annotated[Path | None, typer.Option(help="A finished run whose curves to take over first.")] = None):
    """Draws the figures and writes the model card of a clone from its results."""
    from dsv32_jax.experiments.results import RESULTS, writable
    from dsv32_jax.experiments.train_demo import report as reports

    writable(RESULTS)
    command_line.require("figures", "matplotlib", extra="train")
    if run is not None:
        reports.collect(run)
    for file in [*reports.draw(), reports.write_card()]:
        typer.echo(f"wrote {file}")


if __name__ == "__main__":
    command_line.run(app)
