"""Everything about the demo model from the command line.

python -m experiments.train_demo data       # corpus, tokenizer, question and answer pairs: on Debian, from its archive
python -m experiments.train_demo            # all stages of training that are not done
python -m experiments.train_demo export     # FP8 checkpoint into dsv32_jax/demo
python -m experiments.train_demo evaluate   # experiments/results/demo_model.json
python -m experiments.train_demo report     # figures and the model card, from the results
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from dsv32_jax.errors import UserError

app = typer.Typer(help=__doc__, no_args_is_help=False, add_completion=False, rich_markup_mode=None)

Data = Annotated[Path, typer.Option("--data", help="Folder of the corpus and what is made from it.")]
RunFolder = Annotated[Path, typer.Option("--run", help="Folder of the run: checkpoints, log.")]
Size = Annotated[str, typer.Option("--size", help="demo, or tiny to see every stage work in a minute on a CPU.")]

DATA, RUN = Path(".data"), Path(".train/demo")


@app.callback(invoke_without_command=True)
def train(
    context: typer.Context,
    size: Size = "demo",
    run: RunFolder = RUN,
    data: Data = DATA,
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
    from dsv32_jax.experiments.train_demo.stages import Training

    Training(size, run, data, seed).train(until, weights, first)


@app.command()
def data(folder: Data = DATA) -> None:
    """Downloads the manuals, cleans and splits them; trains the tokenizer; makes question and answer pairs.

    The held-out excerpts go beside them: the repository's own are those of the shipped model.
    """
    from dsv32_jax.experiments import held_out
    from dsv32_jax.experiments.train_demo import corpus, questions, tokenizer
    from dsv32_jax.experiments.train_demo.sizes import DEMO

    corpus.build(folder)
    tokenizer.train(folder, DEMO.vocab_size)
    tokenizer.encode_corpus(folder)
    questions.build(folder)
    questions.encode(folder)
    held_out.choose(folder, folder / held_out.HELD_OUT.name)


@app.command()
def export(run: RunFolder = RUN, stage: str = "talk", size: Size = "demo", out: Path | None = None) -> None:
    """Quantises a stage's checkpoint to FP8 blocks and puts it where `load("demo")` finds it, or into --out."""
    from dsv32_jax.experiments.train_demo.export import export as write
    from dsv32_jax.experiments.train_demo.sizes import SIZES
    from dsv32_jax.loading import DEMO

    write(run / stage, SIZES[size].config, out or DEMO)


@app.command()
def evaluate(
    model: str = "demo",
    run: Annotated[Path | None, typer.Option(help="Folder of the run, to price FP8 and the sparse stage too.")] = None,
    windows: int = 32,
    needles: int = 16,
    traced: int = 2,
    out: Path | None = None,
) -> None:
    """Held-out perplexity, needles and selection of a trained model: experiments/results/demo_model.json."""
    from dsv32_jax.experiments.results import RESULTS
    from dsv32_jax.experiments.train_demo.evaluate import evaluate as measure

    out = out or RESULTS / "demo_model.json"
    measure(model, out, run=run, windows=windows, needles_each=needles, traced=traced)


@app.command()
def report(run: Annotated[Path | None, typer.Option(help="A finished run whose curves to take over first.")] = None):
    """Draws the figures and writes the model card from the results."""
    from dsv32_jax.experiments.train_demo import report as reports

    if run is not None:
        reports.collect(run)
    reports.draw()
    reports.write_card()


if __name__ == "__main__":
    try:
        app()
    except UserError as error:
        sys.exit(f"error: {error}")
