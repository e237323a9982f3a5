"""Where a mixture-of-experts layer's time goes: `python -m experiments.bench.layer_profile`, on a GPU.

For the layer with our kernels, and for `lax.ragged_dot` in bfloat16: its kernels in order, with start, duration and
stream (from JAX's profiler), how long two of them ran at once, and the share of the time that its operations would keep
the matrix units busy at the measured peak. Beside it, what routing and the shared expert take alone: all that could be
hidden behind the routed experts.
"""

import dataclasses
import functools
import statistics
from pathlib import Path
from typing import Any

import jax

from dsv32_jax.experiments import command_line
from dsv32_jax.experiments.bench import moe_layer, roofline
from dsv32_jax.experiments.bench import timer as timing
from dsv32_jax.experiments.bench.cases import compile_, made
from dsv32_jax.experiments.bench.dispatch import routed
from dsv32_jax.experiments.bench.peers import Peers
from dsv32_jax.experiments.bench.shapes import MOE_LAYER, MoELayer
from dsv32_jax.experiments.results import RESULTS, environment, write_json
from dsv32_jax.experiments.workbench.profile import overlap, profiled

RESULT = RESULTS / "moe_layer_profile.json"
LAYERS = {"kernels": moe_layer.build, "ragged_dot": lambda shape, _: moe_layer.build_reference(shape)}


def layer_of(tokens: int) -> MoELayer:
    """The measured layer at full width, with another number of tokens."""
    return dataclasses.replace(MOE_LAYER[0], tokens=tokens)


def parts(shape: MoELayer, timer: timing.Timer) -> dict[str, float]:
    """Seconds of routing with its plan, and of the shared expert, alone."""
    x, layer = made(lambda key: moe_layer.layer_inputs(shape, key, True, shape.tokens))

    def routing(x, router, bias):
        return routed(shape, moe_layer.logits_of(x, router), bias, "mosaic_gpu")

    def shared(x, layer):
        return moe_layer.of_shared_expert(x, layer, "mosaic_gpu")

    medians = {}
    for name, f, arguments in (
        ("routing", routing, (x, layer.router, layer.bias)),
        ("shared expert", shared, (x, layer)),
    ):
        program = compile_(f, *arguments)
        jax.block_until_ready(program.call(*arguments))
        times = timing.seconds(timer, functools.partial(program.call, *arguments))
        medians[name] = statistics.median(times)
    return medians


# ---- the command -----------------------------------------------------------------------------------------------


def main() -> None:
    """The command."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 4096])
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error("needs a GPU")
    timer, _ = timing.device_timer()
    ceilings = roofline.measure(timer, Peers())["ceilings"]
    content: dict[str, Any] = {**environment(), "timer": timer.name, "ceilings": ceilings, "layers": []}
    for tokens in arguments.tokens:
        shape = layer_of(tokens)
        for form, build in LAYERS.items():
            case = build(shape, "mosaic_gpu")
            jax.block_until_ready(case.run())
            seconds = statistics.median(timing.seconds(timer, case.run))
            kernels = profiled(case.run)
            row: dict[str, Any] = {"form": form, "tokens": case.tokens, "seconds": seconds}
            row["matrix_units_busy"] = sum(work / ceilings[kind] for kind, work in case.work.items()) / seconds
            row |= {**overlap(kernels), "kernels": kernels}
            if form == "kernels":
                row["alone_seconds"] = parts(shape, timer)
            del case
            content["layers"].append(row)
            write_json(arguments.out, content)
            shown = {name: value for name, value in row.items() if name != "kernels"}
            print(shown, flush=True)


if __name__ == "__main__":
    command_line.run(main)
