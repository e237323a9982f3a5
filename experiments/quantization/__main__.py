"""What quantisation costs the demo model, from the command line; each step goes on where it was interrupted.

python -m experiments.quantization table         # experiments/results/quantization_table.json; again after `plan`
python -m experiments.quantization sensitivity   # quantization_sensitivity.json: one family of one layer at a time
python -m experiments.quantization plan          # quantization_plan.json: a scheme for every linear
python -m experiments.quantization report        # figures and docs/quantisation.md, from the results
"""

import sys
from typing import Annotated

import typer

from dsv32_jax.errors import UserError

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
Model = Annotated[str, typer.Option("--model", help="A checkpoint with a tokenizer, for 2048 tokens or more.")]


@app.command()
def table(model: Model = "demo") -> None:
    """Every scheme on the whole model; the mixed one once `plan` has made it."""
    from dsv32_jax.experiments.quantization.table import table as measure
    from dsv32_jax.experiments.quantization.variants import Setting

    measure(Setting.of(model))


@app.command()
def sensitivity(model: Model = "demo") -> None:
    """Each tensor family of each layer, quantised alone."""
    from dsv32_jax.experiments.quantization.sensitivity import sensitivity as measure
    from dsv32_jax.experiments.quantization.variants import Setting

    measure(Setting.of(model))


@app.command()
def plan(model: Model = "demo") -> None:
    """A mixed plan from the sensitivities, and the curve of plans of other sizes."""
    from dsv32_jax.experiments.quantization.planner import make_plan
    from dsv32_jax.experiments.quantization.variants import Setting

    make_plan(Setting.of(model))


@app.command()
def report() -> None:
    """Draws the figures and writes the tables of docs/quantisation.md from the results."""
    from dsv32_jax.experiments.quantization import report as reports

    reports.draw()
    reports.write()


if __name__ == "__main__":
    try:
        app()
    except UserError as error:
        sys.exit(f"error: {error}")
