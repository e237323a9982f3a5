"""Where the time and the memory of a step go: `dsv32 diagnose`.

A step is timed as a loop of steps runs it, by the host's clock, and profiled. On a GPU a replayed CUDA graph carries no
scopes; there the step is compiled a second time without graphs, and a profile of that one says what each part took.
Parts, the time in which nothing ran, and what the parts take more or less within graphs add up to the profiled step.
"""

import dataclasses
import gc
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv32_jax.errors import UserError
from dsv32_jax.experiments.bench import roofline
from dsv32_jax.experiments.bench import timer as timing
from dsv32_jax.experiments.bench.peers import Peers
from dsv32_jax.experiments.results import environment, write_json
from dsv32_jax.experiments.workbench.least_work import LeastWork, least_work
from dsv32_jax.experiments.workbench.profile import Event, Profile, record, times_by
from dsv32_jax.experiments.workbench.scopes import Scopes, part_of_event
from dsv32_jax.experiments.workbench.settings import description
from dsv32_jax.experiments.workbench.steps import Step, StepShape
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.model.taps import Taps

__all__ = ["diagnose", "measure_ceilings", "rows_of_parts", "verdict_of"]

WAITING = "waiting"
WITHOUT_GRAPHS = {"xla_gpu_enable_command_buffer": ""}
"""Compiler options of the profiled step on a GPU."""
CHOSEN = Taps.of({"*ffn.experts": None})
"""The experts that the tokens of each layer chose: of those the weights are read."""
BURSTS, BURST_SECONDS, LONGEST_BURST = 10, 0.1, 16
"""How often a burst of steps is timed, how long one should be, and its most steps."""
PROFILES, PROFILES_SECONDS = 3, 2.0
"""How often a burst is profiled, and after how many seconds no more."""
LONGEST = 40
"""Kernels of a step that the result names."""
CPU_SIDE, CPU_BYTES = 1024, 128 * 2**20
"""Of the products and copies that measure a CPU's ceilings."""
Say = Callable[[str], None]


def measure_ceilings(compute_dtype: str) -> dict[str, Any]:
    """`roofline.measure` with the kinds of products that steps in this dtype have, by a timer that fits the device."""
    timer, trouble = timing.device_timer()
    plain = "float32" if compute_dtype == "float32" else "bf16"
    if jax.default_backend() == "gpu":
        kinds: tuple[str, ...] = tuple(dict.fromkeys(("copy", plain, "bf16", "fp8")))
        measured = roofline.measure(timer, Peers(), kinds=kinds)
    else:
        measured = roofline.measure(timer, Peers(), kinds=("copy", plain), side=CPU_SIDE, size=CPU_BYTES, reads=True)
    return {"timer": timer.name, "timer_trouble": trouble, **measured}


def diagnose(
    m: LanguageModel,
    shapes: Iterable[StepShape],
    *,
    name: str = "",
    out: Path | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Measures steps of a model.

    Args:
      m: the model, with its options and parts.
      shapes: of the steps.
      name: of the model, for the result.
      out: the file of the result, written after each step.
      say: what is told of the progress.

    Returns:
      What a JSON file of results has: the machine, `ceilings`, and in `rows` one entry for each shape: its `seconds`
      (of the step without the profiler), `memory`, and what `rows_of_parts` says; or an `error` where the device has
      no memory for it.

    Raises:
      UserError: a context is longer than the model's, or a part cannot run.
    """
    shapes, longest = list(shapes), m.config.max_position_embeddings
    for shape in shapes:
        if shape.context > longest:
            raise UserError(f"context {shape.context}: the model takes at most max_position_embeddings = {longest}")
    say("measuring what the device can do")
    ceilings = measure_ceilings(m.options.compute_dtype)
    content: dict[str, Any] = {
        **environment(),
        "model": name,
        "layers": m.config.num_hidden_layers,
        "runs": description(m),
        "roofline": ceilings,
        "rows": [],
    }
    for shape in shapes:
        try:
            row = diagnose_step(m, shape, ceilings["ceilings"], say)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            row = {"shape": dataclasses.asdict(shape), "error": " ".join(str(error).split())[:300]}
            say(f"{title_of(row['shape'])}: the device has no memory for it")
        content["rows"].append(row)
        if out is not None:
            write_json(out, content)
        gc.collect()  # the step's cache makes room for the next
    return content


def diagnose_step(m: LanguageModel, shape: StepShape, ceilings: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Measures one step; `ceilings` are `roofline.measure`'s."""
    label = title_of(dataclasses.asdict(shape))
    graphs = runs_graphs()
    say(f"{label}: compiling")
    step = Step(m, shape, taps=CHOSEN)
    say(f"{label}: timing")
    seconds, burst = timed(step)
    normal = profile_of(step, burst) if graphs else None
    used = [int(np.unique(np.asarray(chosen)).size) for chosen in step.values.values()]
    row: dict[str, Any] = {
        "shape": dataclasses.asdict(shape),
        "seconds": seconds,
        "experts_used": used,
        "memory": memory_of(step),
        "kernels": step.kernels,
    }
    if graphs:
        del step
        gc.collect()
        say(f"{label}: compiling without CUDA graphs")
        step = Step(m, shape, WITHOUT_GRAPHS, CHOSEN)
        jax.block_until_ready(step())
    say(f"{label}: profiling")
    profile, scopes = profile_of(step, burst), Scopes(step.compiled.as_text() or "")
    model = jax.tree.unflatten(*reversed(m.flat_model()))
    work = least_work(model, m.options, shape, step.kernels, used)
    replaced = m.options.parts.replaced
    if "index_select" in replaced:
        work["index selection"] = merged(work.pop("indexer scores", LeastWork()), work.pop("top-k", LeastWork()))
    took, longest = by_part_and_kernel(profile, scopes, replaced)
    in_graphs = (normal, seconds["median"]) if normal else None
    return row | rows_of_parts(took, profile, work, ceilings, in_graphs) | {"longest": longest}


def runs_graphs() -> bool:
    """Whether the device replays CUDA graphs, whose kernels have no scopes in a profile."""
    return jax.default_backend() == "gpu"


def by_part_and_kernel(
    profile: Profile, scopes: Scopes, replaced: Mapping[str, Any]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Nanoseconds by part; and of what took longest `name`, `part`, and `times` and `seconds` a call."""

    def key(event: Event) -> tuple[str, str]:
        return part_of_event(event, scopes, replaced), event.kernel

    took, _ = times_by(profile.events, key, scopes.waits, (profile.start, profile.end))
    times, by_part = Counter(map(key, profile.events)), defaultdict[str, float](float)
    for (part, _), nanoseconds in took.items():
        by_part[part] += nanoseconds
    longest = [
        {
            "name": each[1],
            "part": each[0],
            "times": times[each] / profile.calls,
            "seconds": took[each] * 1e-9 / profile.calls,
        }
        for each in sorted(took, key=lambda each: -took[each])[:LONGEST]
    ]
    return dict(by_part), longest


def merged(*works: LeastWork) -> LeastWork:
    """The work of several parts as that of one."""
    return LeastWork(sum(work.bytes for work in works), sum((work.operations for work in works), Counter()))


def timed(step: Step) -> tuple[dict[str, Any], int]:
    """Seconds of a step by the host's clock, median and spread of bursts of steps; and the steps of a burst."""
    jax.block_until_ready(step())
    start = time.perf_counter()
    jax.block_until_ready(step())
    pilot = time.perf_counter() - start
    burst = int(min(max(BURST_SECONDS / pilot, 1), LONGEST_BURST))

    def seconds() -> float:
        start, out = time.perf_counter(), None
        for _ in range(burst):
            out = step()
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / burst

    repetitions = BURSTS if pilot * burst * BURSTS < 5 else timing.FEWEST
    return timing.summary([seconds() for _ in range(repetitions)]), burst


def profile_of(step: Step, burst: int) -> Profile:
    """The shortest of some profiles of a burst of steps: the one that other processes disturbed least."""
    start, profiles = time.perf_counter(), [record(step, burst)]
    while len(profiles) < PROFILES and time.perf_counter() - start < PROFILES_SECONDS:
        profiles.append(record(step, burst))
    return min(profiles, key=lambda profile: profile.end - profile.start)


def memory_of(step: Step) -> dict[str, Any]:
    """Bytes by purpose, and the most that the process has had on the device, where that counts them."""
    analysis: Any = step.compiled.memory_analysis()
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    purposes = {**step.memory, "results": results, "program": analysis.generated_code_size_in_bytes}
    statistics_ = jax.devices()[0].memory_stats() or {}
    return {
        "purposes": purposes,
        "needed": sum(purposes.values()),
        "analysis": {
            name: getattr(analysis, f"{name}_size_in_bytes")
            for name in ("argument", "output", "alias", "temp", "generated_code")
        },
        "device_limit": statistics_.get("bytes_limit"),
        "device_peak": statistics_.get("peak_bytes_in_use"),
    }


def title_of(shape: Mapping[str, Any]) -> str:
    """A step's shape in words: "decode, 32 sequences of 4096 tokens"."""
    count = shape["sequences"]
    sequences = f"{count} sequence{'s' if count > 1 else ''} of {shape['context']} tokens"
    return f"{shape['phase']}, {sequences}" + (f", the last {shape['tokens']}" if shape["phase"] == "prefill" else "")


# ---- sums and the verdict --------------------------------------------------------------------------------------


def rows_of_parts(
    took: Mapping[str, float],
    profile: Profile,
    work: Mapping[str, LeastWork],
    ceilings: Mapping[str, float | None],
    normal: tuple[Profile, float] | None = None,
) -> dict[str, Any]:
    """What a profile says of a step, as JSON; shares are those of the profiled step.

    Args:
      took: nanoseconds of all profiled calls by part.
      profile: of these calls.
      work: of each part.
      ceilings: of the device.
      normal: a profile of the step as it normally runs and its seconds without the profiler, where `profile` is of one
        that was compiled otherwise.

    Returns:
      `profiled`: seconds of the step under the profiler, by its clock and by the host's, and of that without graphs
      where there are two.
      `parts`: each with `seconds`, `share`, `bytes`, `operations`, `bound` (seconds, by what, and its share of the
      part's time; None where its work is not known) and `gain`, the share of the step that would be saved at the bound.
      `waiting`: `seconds` and `share` in which nothing ran. `difference`: what the parts took more in the normal step.
      `busy`: the share of time in which the device worked; of a normal step without the profiler, which slows the host
      that starts a GPU's kernels. `verdict`: see `verdict_of`.
    """
    unit, total = 1e-9 / profile.calls, 1e-9 / profile.calls * sum(took.values())
    shown = normal[0] if normal else profile
    whole, busy = seconds_and_busy(shown)
    if busy < total / 2:  # the profile does not show what runs inside a graph
        busy = min(total, whole)
    parts = [
        row_of_part(name, took[name] * unit, whole, work.get(name), ceilings)
        for name in sorted(took, key=lambda name: -took[name])
    ]
    rest = {"waiting": whole - busy, "difference": busy - total}
    content: dict[str, Any] = {
        "profiled": {
            "seconds": whole,
            "by_the_hosts_clock": shown.seconds / shown.calls,
            "without_graphs": seconds_and_busy(profile)[0] if normal else None,
        },
        "parts": parts,
        **{name: {"seconds": seconds, "share": seconds / whole} for name, seconds in rest.items()},
        "busy": min(1.0, busy / (normal[1] if normal else whole)),
    }
    return content | {"verdict": verdict_of(parts, 1 - content["busy"])}


def row_of_part(
    name: str, seconds: float, whole: float, work: LeastWork | None, ceilings: Mapping[str, float | None]
) -> dict[str, Any]:
    """A row of `parts`, see `rows_of_parts`; `whole` is the step's time."""
    row: dict[str, Any] = {"part": name, "seconds": seconds, "share": seconds / whole, "bound": None}
    if work is not None:
        row |= {"bytes": work.bytes, "operations": dict(work.operations)}
        bound = roofline.bound(work.operations, work.bytes, ceilings)
        if bound is not None:
            row["bound"] = {"seconds": bound[0], "by": bound[1], "of_time": bound[0] / seconds}
            row["gain"] = max(0.0, seconds - bound[0]) / whole
    return row


def seconds_and_busy(profile: Profile) -> tuple[float, float]:
    """Seconds of a profiled step, and of those in which something ran."""
    _, idle = times_by(profile.events, lambda event: None, window=(profile.start, profile.end))
    whole = (profile.end - profile.start) * 1e-9 / profile.calls
    return whole, whole - idle * 1e-9 / profile.calls


def verdict_of(parts: list[dict[str, Any]], waiting: float) -> dict[str, Any]:
    """Names what takes most of a step, and what is worth most.

    Args:
      parts: see `rows_of_parts`; at least one.
      waiting: share of the step in which nothing ran.

    Returns:
      `bottleneck` and its `share`; `largest_gain` and its `gain`, the share of the step that would be saved if that
      part ran at its bound, or if the device never waited; and a sentence of both, `text`.
    """
    largest = max(parts, key=lambda row: row["seconds"])
    best = max((row for row in parts if "gain" in row), key=lambda row: row["gain"], default=None)
    if waiting > largest["share"]:
        bottleneck, share = WAITING, waiting
        text = f"the device waits for {waiting:.0%} of the step"
    else:
        bottleneck, share = largest["part"], largest["share"]
        text = f"{bottleneck} take{'' if is_plural(bottleneck) else 's'} {share:.0%} of the step{reached(largest)}"
    if best is None or waiting > best["gain"]:
        gain_of, gain = WAITING, waiting
        text += f"; largest gain: without waiting the step takes {gain:.0%} less time"
    else:
        gain_of, gain = best["part"], best["gain"]
        what = "" if gain_of == bottleneck else f"{gain_of}, {best['share']:.0%} of the step{reached(best)}: "
        text += f"; largest gain: {what}at {'their' if is_plural(gain_of) else 'its'} bound "
        text += f"the step takes {gain:.0%} less time"
    return {"bottleneck": bottleneck, "share": share, "largest_gain": gain_of, "gain": gain, "text": text}


def is_plural(part: str) -> bool:
    """Whether a part's name is a plural."""
    return part.endswith("s") or part.startswith("norms")


def percent(share: float) -> str:
    """A share for people."""
    return f"{share:.0%}" if share >= 0.01 or share == 0 else "less than 1%"


def reached(row: Mapping[str, Any]) -> str:
    """How near a part is to its bound, for a sentence."""
    if not row["bound"]:
        return ""
    return f" at {percent(row['bound']['of_time'])} of {'their' if is_plural(row['part']) else 'its'} bound"
