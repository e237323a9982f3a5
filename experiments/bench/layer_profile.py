"""Where a mixture-of-experts layer's time goes: `python -m experiments.bench.layer_profile`, on a GPU.

For the layer with our kernels, and for `lax.ragged_dot` in bfloat16: its kernels in order, with start, duration and
stream (from JAX's profiler), how long two of them ran at once, and how long the matrix units were busy (from the
hardware's counters, where `ncu` is there and may read them). Beside it, what routing and the shared expert take alone:
all that could be hidden behind the routed experts.
"""

import argparse
import csv
import ctypes
import dataclasses
import functools
import io
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from experiments.bench import moe_layer
from experiments.bench import timer as timing
from experiments.bench.cases import Case, compile_, made
from experiments.bench.dispatch import routed
from experiments.results import RESULTS, environment, write_json
from pallas_kernels.shapes import SHAPES, MoELayer

RESULT = RESULTS / "moe_layer_profile.json"
TENSOR = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed"
"""Cycles in which a multiprocessor's matrix units worked, of all that passed."""
MEMORY = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
DURATION = "gpu__time_duration.sum"
LAYERS = {"kernels": moe_layer.build, "ragged_dot": lambda shape, _: moe_layer.build_reference(shape)}


def layer_of(tokens: int) -> MoELayer:
    """The measured layer at full width, with another number of tokens."""
    shape = next(shape for shape in SHAPES["moe_layer"] if isinstance(shape, MoELayer))
    return dataclasses.replace(shape, tokens=tokens)


def traced(case: Case) -> list[dict[str, Any]]:
    """The kernels of one call, in order: name, stream, start and duration in microseconds."""
    jax.block_until_ready(case.run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(case.run())
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


# ---- counters --------------------------------------------------------------------------------------------------


def counted(form: str, tokens: int) -> dict[str, Any]:
    """What the hardware counted in one call, by another process under `ncu`; or why it did not."""
    tool = shutil.which("ncu")
    if tool is None:
        return {"error": "ncu is not on the PATH"}
    metrics = ",".join((DURATION, TENSOR, MEMORY))
    how = ["--csv", "--page", "raw", "--metrics", metrics, "--profile-from-start", "off", "--clock-control", "none"]
    worker = [sys.executable, "-m", "experiments.bench.layer_profile", "--once", form, str(tokens)]
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        run = subprocess.run([tool, *how, *worker], capture_output=True, text=True, timeout=150, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": "ncu ran out of time"}
    found = counters_of(run.stdout)
    return found or {"error": (run.stdout + run.stderr)[-400:]}


def counters_of(output: str) -> dict[str, Any] | None:
    """From ncu's CSV: seconds of all kernels, and the shares of them, weighted by time."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return None
    rows = list(csv.DictReader(io.StringIO("\n".join(lines[start:]))))
    units, rows = rows[0], rows[1:]
    scale = {"ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3}[units[DURATION]]

    def number(row: dict[str, str], metric: str) -> float:
        return float(row[metric].replace(",", ""))

    seconds = sum(number(row, DURATION) for row in rows)
    if not rows or not seconds:
        return None
    shares = {
        name: sum(number(row, DURATION) * number(row, metric) / 100 for row in rows) / seconds
        for name, metric in (("matrix_units_busy", TENSOR), ("memory_throughput", MEMORY))
    }
    return {"kernels": len(rows), "seconds": seconds * scale, **shares}


def once(form: str, tokens: int) -> None:
    """One call, between the marks that `ncu` starts and stops at."""
    case = LAYERS[form](layer_of(tokens), "mosaic_gpu")
    jax.block_until_ready(case.run())
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuProfilerStart()
    jax.block_until_ready(case.run())
    driver.cuProfilerStop()


# ---- the command -----------------------------------------------------------------------------------------------


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 4096])
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--once", nargs=2, metavar=("FORM", "TOKENS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error("needs a GPU")
    if arguments.once:
        once(arguments.once[0], int(arguments.once[1]))
        return
    timer, _ = timing.device_timer()
    content: dict[str, Any] = {**environment(), "timer": timer.name, "layers": []}
    for tokens in arguments.tokens:
        shape = layer_of(tokens)
        for form, build in LAYERS.items():
            case = build(shape, "mosaic_gpu")
            jax.block_until_ready(case.run())
            seconds = statistics.median(timing.seconds(timer, case.run))
            kernels = traced(case)
            row: dict[str, Any] = {"form": form, "tokens": case.tokens, "seconds": seconds}
            row |= {"flops": sum(case.work.values()), **overlap(kernels), "kernels": kernels}
            if form == "kernels":
                row["alone_seconds"] = parts(shape, timer)
            del case
            row["counters"] = counted(form, tokens)
            content["layers"].append(row)
            write_json(arguments.out, content)
            shown = {name: value for name, value in row.items() if name != "kernels"}
            print(shown, flush=True)


if __name__ == "__main__":
    main()
