"""`dsv32 before-after`."""

import contextlib
import dataclasses
import sys
from typing import Annotated

import typer

from dsv32_jax.cli.inputs import print_json
from dsv32_jax.cli.options import Json
from dsv32_jax.cli.workbench import ModelOrRandom, Out, check_writable


def before_after(
    model: ModelOrRandom = "demo",
    at_a_time: Annotated[int | None, typer.Option("--at-a-time", min=1, help="Requests that run at a time.")] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="Requests for each of those.")] = None,
    repeats: Annotated[
        int | None, typer.Option("--repeats", min=2, help="Of the request that is served alone.")
    ] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Compare the model before every optimisation with itself after them all, end to end, in one run.

    Before: stored weights dequantised in each product, masked dense attention, a loop over experts, a contiguous cache,
    static batches. It measures latency, time to first token, requests/s of two loads, memory, and memory by context.

    Example: dsv32 before-after --model full-width:5 --out before_after.json
    """
    from dsv32_jax.experiments.workbench import before_after as workbench
    from dsv32_jax.experiments.workbench.models import model_named

    check_writable(out)
    lm = model_named(model)
    plan = workbench.Plan.default(lm)
    plan = dataclasses.replace(
        plan,
        at_a_time=at_a_time or plan.at_a_time,
        rounds=rounds or plan.rounds,
        repeats=repeats or plan.repeats,
    )
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        content = workbench.measure(lm, plan, out, say=lambda line: print(line, file=sys.stderr, flush=True))
    if as_json:
        print_json(**content)
    else:
        typer.echo(workbench.table_of(content))
