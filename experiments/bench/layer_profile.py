"""Where a mixture-of-experts layer's time goes: `python -m experiments.bench.layer_profile`, on a GPU.

For the layer with our kernels, and for `lax.ragged_dot` in bfloat16: its kernels in order, with start, duration and
stream (from JAX's profiler), how long two of them ran at once, and the share of the time that its operations would keep
the matrix units busy at the measured peak. Beside it, what routing and the shared expert take alone: all that could be
hidden behind the routed experts.
"""

import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Callable
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

RESULT = RESULTS / "moe_layer_profile.json"
LAYERS = {"kernels": moe_layer.build, "ragged_dot": lambda shape, _: moe_layer.build_reference(shape)}


def layer_of(tokens: int) -> MoELayer:
    """The measured layer at full width, with another number of tokens."""
    return dataclasses.replace(MOE_LAYER[0], tokens=tokens)


def profiled(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """The kernels of a second call, in order: name, stream, start and duration in microseconds."""
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (file,) = Path(folder).rglob("*.xplane.pb")
        return kernels_of(jax.profiler.ProfileData.from_file(str(file)))


def kernels_of(profile: Any) -> list[dict[str, Any]]:
    """Kernels on the first GPU's streams."""
    planes = [plane for plane in profile.planes if plane.name.startswith("/device:GPU:0")]
    events = [
        (event.start_ns, event.duration_ns, line.name, event.name)
        for plane in planes
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    first = min((start for start, *_ in events), default=0)
    return [
        {"name": name, "stream": stream, "start_us": (start - first) / 1e3, "us": duration / 1e3}
        for start, duration, stream, name in sorted(events)
    ]


def by_name(kernels: list[dict[str, Any]], calls: int = 1) -> list[dict[str, Any]]:
    """What each name took of one of so many equal calls, most of the time first."""
    took: dict[str, list[float]] = {}
    for kernel in kernels:
        took.setdefault(kernel["name"], []).append(kernel["us"])
    return [
        {"name": name, "times": len(us) / calls, "us": sum(us) / calls, "longest_us": max(us)}
        for name, us in sorted(took.items(), key=lambda item: -sum(item[1]))
    ]


def overlap(kernels: list[dict[str, Any]]) -> dict[str, float]:
    """Microseconds from the first start to the last end, with any kernel at work, and with more than one."""
    events = sorted((at, step) for k in kernels for at, step in ((k["start_us"], 1), (k["start_us"] + k["us"], -1)))
    busy = several = 0.0
    for (at, step), (following, _), running in zip(events, events[1:], running_after(events), strict=False):
        del step
        busy += following - at if running >= 1 else 0
        several += following - at if running >= 2 else 0
    whole = events[-1][0] - events[0][0] if events else 0.0
    return {"whole_us": whole, "busy_us": busy, "overlapping_us": several}


def running_after(events: list[tuple[float, int]]) -> list[int]:
    """How many kernels run after each start (+1) or end (-1)."""
    found = [0]
    for _, step in events:
        found.append(found[-1] + step)
    return found[1:]


def parts(shape: MoELayer, timer: timing.Timer) -> dict[str, float]:
    """Seconds of routing with its plan, and of the shared expert, alone."""
    x, layer = made(lambda key: moe_layer.layer_inputs(shape, key, True, shape.tokens))

    def routing(x, router, bias):
        return routed(shape, moe_layer.logits_of(x, router), bias, "mosaic_gpu")

    def shared(x, layer):
        return moe_layer.of_shared_expert(x, layer, "mosaic_gpu")

    found = {}
    for name, f, arguments in (
        ("routing", routing, (x, layer.router, layer.bias)),
        ("shared expert", shared, (x, layer)),
    ):
        program = compile_(f, *arguments)
        jax.block_until_ready(program.call(*arguments))
        times = timing.seconds(timer, functools.partial(program.call, *arguments))
        found[name] = statistics.median(times)
    return found


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
