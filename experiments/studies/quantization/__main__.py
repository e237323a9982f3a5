"""What quantisation costs the demo model, from the command line; each step goes on where it was interrupted.

python -m experiments.studies.quantization table         # results/quantization_table.json; again after `plan`
python -m experiments.studies.quantization sensitivity   # quantization_sensitivity.json: a family of a layer each
python -m experiments.studies.quantization plan          # quantization_plan.json: a scheme for every linear
python -m experiments.studies.quantization report        # figures and docs/quantisation.md, from the results
"""

from typing import Annotated

import typer

from dsv32_jax.experiments import command_line

app = typer.Typer(
    help=command_line.unwrapped(__doc__), no_args_is_help=True, add_completion=False, rich_markup_mode=None,
    pretty_exceptions_enable=False,
)  # fmt: skip
Model = Annotated[str, typer.Option("--model", help="A checkpoint with a tokenizer, for 2048 tokens or more.")]


@app.command()
def table(model: Model = "demo") -> None:
    """Every scheme on the whole model; the mixed one once `plan` has made it."""
    from dsv32_jax.experiments.results import RESULTS
    from dsv32_jax.experiments.studies.quantization.table import table as measure
    from dsv32_jax.experiments.studies.quantization.variants import Setting

    command_line.writable(RESULTS)
    measure(Setting.of(model))


@app.command()
def sensitivity(model: Model = "demo") -> None:
    """Each tensor family of each layer, quantised alone."""
    from dsv32_jax.experiments.results import RESULTS
    from dsv32_jax.experiments.studies.quantization.sensitivity import sensitivity as measure
    from dsv32_jax.experiments.studies.quantization.variants import Setting

    command_line.writable(RESULTS)
    measure(Setting.of(model))


@app.command()
def plan(model: Model = "demo") -> None:
    """A mixed plan from the sensitivities, and the curve of plans of other sizes."""
    from dsv32_jax.experiments.results import RESULTS
    from dsv32_jax.experiments.studies.quantization.planner import make_plan
    from dsv32_jax.experiments.studies.quantization.variants import Setting

    command_line.writable(RESULTS)
    make_plan(Setting.of(model))


@app.command()
def report() -> None:
    """Draws the figures and writes the tables of docs/quantisation.md from the results."""
    from dsv32_jax.experiments.studies.quantization import report as reports

    command_line.writable(reports.PAGE)
    figures = reports.draw()
    reports.write()
    for file in [*figures, reports.PAGE]:
        typer.echo(f"wrote {file}")


if __name__ == "__main__":
    command_line.run(app)
