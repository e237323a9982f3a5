"""Before and after, end to end: the same weights in a baseline and with every optimisation, on one machine, in one run.

The baseline is `workbench.baseline`; the optimised side is the engine with the model's own settings, and on kernels the
FP8 cache. Prompts are held-out text, or random tokens for a model without a tokenizer. Requests of a load share most of
their prompts in groups of eight, as turns of a conversation and questions about one repository do.
"""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv32_jax.common.units import human
from dsv32_jax.convert.conversion import nbytes
from dsv32_jax.engine.engine import Engine
from dsv32_jax.engine.metrics import percentiles
from dsv32_jax.engine.request import SamplingParams
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.results import environment, write_json
from dsv32_jax.experiments.studies.serving import Prompts, Sizes, Work, served, workload
from dsv32_jax.experiments.workbench.baseline import StaticBatches, baseline
from dsv32_jax.experiments.workbench.settings import Setting
from dsv32_jax.experiments.workbench.steps import Step, StepShape
from dsv32_jax.generate.compiling import all_at_once
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.memory import USABLE, available_bytes
from dsv32_jax.model.cache import BLOCK_SIZE, KVCache

__all__ = ["Plan", "measure", "optimised", "table_of"]

TARGETS = {
    "latency": 3.0,
    "first token": 2.7,
    "requests/s": 3.0,
    "memory at the same load": 1 / (1 - 0.38),
    "longest context": 4.0,
}
"""Ratios of the baseline's number to ours, or ours to the baseline's where more is better, that the project aims at."""
SIDES = ("baseline", "optimised")
P99_OVER_MEDIAN = 1.25
"""What the latency's P99 is to be of its median at most."""
SPREAD_RATIO = 0.25
"""And its relative spread of the baseline's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured.

    Attributes:
      loads: by name, the least and greatest lengths of its requests.
      single: prompt and new tokens of the request that is served alone.
      repeats: of that request.
      at_a_time: requests that run at a time.
      rounds: requests for each that runs at a time.
      contexts: tokens of context whose memory is told, ascending.
      piece: tokens of a piece of a prompt on the optimised side.
    """

    loads: dict[str, Sizes]
    single: tuple[int, int]
    repeats: int
    at_a_time: int
    rounds: int
    contexts: tuple[int, ...]
    piece: int

    @staticmethod
    def default(lm: LanguageModel) -> "Plan":
        """For the machine: small where references run."""
        if lm.options.runs_kernels:
            loads = {"conversation": Sizes((64, 2048), (64, 256)), "code": Sizes((512, 4032), (16, 64))}
            return Plan(
                loads=loads,
                single=(2048, 64),
                repeats=20,
                at_a_time=16,
                rounds=2,
                contexts=(4096, 8192, 16384, 32768, 131072),
                piece=2048,
            )
        loads = {"conversation": Sizes((16, 64), (8, 16)), "code": Sizes((64, 192), (4, 8))}
        longest = lm.config.max_position_embeddings // BLOCK_SIZE * BLOCK_SIZE
        contexts = tuple(n for n in (512, 1024, 2048, 4096) if n <= longest) or (longest,)
        return Plan(loads=loads, single=(128, 8), repeats=5, at_a_time=4, rounds=2, contexts=contexts, piece=512)


def optimised(lm: LanguageModel) -> LanguageModel:
    """The model with every optimisation: its own settings, and the FP8 cache where kernels read it."""
    cache_dtype = "fp8" if lm.options.runs_kernels and lm.options.act_quant else lm.options.cache_dtype
    return Setting(options={"cache_dtype": cache_dtype}).apply(lm)


# ---- one request alone ----


def alone(engine: Engine, item: Work) -> list[float]:
    """After how many seconds an engine that serves nothing else has each token of a request."""
    engine.pool.forget()
    request = engine.add(item.prompt, SamplingParams(item.new, temperature=0.0, ignore_eos=True))
    while engine.busy:
        engine.step()
    return request.completions[0].times


def spread(times: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Of the same request, several times: latency and time to first token, in seconds."""
    latencies, first = [item[-1] for item in times], [item[0] for item in times]
    mean = statistics.fmean(latencies)
    return {
        "latency_seconds": {
            **(percentiles(latencies) or {}),
            "relative_spread": max(statistics.pstdev(latencies) / mean, 1e-6),
        },
        "first_token_seconds": percentiles(first),
        "latencies": latencies,
    }


# ---- memory ----


def memory_at(lm: LanguageModel, context: int, piece: int) -> dict[str, Any]:
    """Bytes while a prompt of this length is read, its last `piece` tokens in one step; or why it does not compile."""
    shape = StepShape(phase="prefill", context=context, tokens=min(piece, context))
    try:
        memory = Step(lm, shape).memory
    except jax.errors.JaxRuntimeError as error:
        return {"error": str(error)[:200]}
    return {**memory, "total": sum(memory.values())}


def read_bytes(lm: LanguageModel, context: int) -> int:
    """Bytes of the cache that one token of a sequence of this length reads, in all layers."""
    config, options = lm.config, lm.options
    shapes = KVCache.shapes(config, 1, options.cache_form, options.act_quant, layers=1)
    latent, index = nbytes(shapes.kv) // BLOCK_SIZE, nbytes(shapes.index) // BLOCK_SIZE
    if options.attention == "dense":
        return config.num_hidden_layers * context * latent
    chosen = min(context, options.index_topk or config.index_topk)
    return config.num_hidden_layers * (context * index + chosen * latent)


# ---- the measurement ----


def measure(lm: LanguageModel, plan: Plan, out: Path | None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures both sides, one after the other, and returns the content of the results' file.

    Args:
      lm: the model, whose options are the optimised side's.
      plan: what to measure.
      out: the file, written after each part.
      say: takes a line of progress.
    """
    longest = max([sum(plan.single), *(sizes.longest for sizes in plan.loads.values())])
    most = lm.config.max_position_embeddings
    if max(longest, plan.contexts[-1]) > most:
        raise UserError(f"the plan's {max(longest, plan.contexts[-1])} tokens: the model takes at most {most}")
    start = time.monotonic()
    content: dict[str, Any] = {
        **environment(),
        "layers": lm.config.num_hidden_layers,
        "hidden_size": lm.config.hidden_size,
        "plan": dataclasses.asdict(plan),
        "sides": {},
        "contexts": [],
    }

    def done(what: str) -> None:
        if out is not None:
            write_json(out, content)
        say(f"{time.monotonic() - start:6.0f} s: {what}")

    text = Prompts(lm)
    rng = np.random.default_rng(1)
    singles = [Work(text.draw(rng, plan.single[0]), plan.single[1]) for _ in range(plan.repeats)]
    count = plan.at_a_time * plan.rounds
    loads = {
        name: workload(count, plan.at_a_time, sizes, text, shared=True, seed=number)
        for number, (name, sizes) in enumerate(plan.loads.items())
    }
    capacity = available_bytes()[0]  # before anything of either side is on the device, but the weights
    sides = {"baseline": baseline(lm), "optimised": optimised(lm)}
    content["options"] = {name: str(side.options) for name, side in sides.items()}
    content["sides"]["baseline"] = measure_baseline(sides["baseline"], plan, singles, loads, done)
    gc.collect()
    content["sides"]["optimised"] = measure_optimised(sides["optimised"], plan, longest, singles, loads, done)
    gc.collect()
    weights = nbytes(lm.model)
    content["capacity_bytes"] = capacity + weights
    jobs = [
        partial(memory_at, side, context, context if name == "baseline" else plan.piece)
        for context in plan.contexts
        for name, side in sides.items()
    ]
    memories = iter(all_at_once(jobs))
    for context in plan.contexts:
        row: dict[str, Any] = {"context": context}
        for name, side in sides.items():
            row[name] = {**next(memories), "read_by_a_token": read_bytes(side, context)}
            total = row[name].get("total")
            row[name]["fits"] = total is not None and total <= USABLE * content["capacity_bytes"]
        content["contexts"].append(row)
    content["comparison"] = comparison(content)
    done("memory by context")
    return content


Loads = dict[str, list[Work]]


def measure_baseline(
    lm: LanguageModel, plan: Plan, singles: list[Work], loads: Loads, done: Callable[[str], None]
) -> dict[str, Any]:
    """Latency of one request at a time, then each load in static batches."""
    side: dict[str, Any] = {"loads": {}}
    batches = StaticBatches(lm, 1, sum(plan.single), [plan.single[0]])
    batches.run(singles[:1])
    side["single"] = spread([batches.run([item]).times for item in singles])
    done(f"baseline, one request at a time: {side['single']['latency_seconds']['p50']:.3f} s")
    weights = nbytes(lm.flat_model()[0])
    for name, work in loads.items():
        sizes = plan.loads[name]
        batches = StaticBatches(lm, plan.at_a_time, sizes.longest, [len(item.prompt) for item in work])
        groups = [work[at : at + plan.at_a_time] for at in range(0, len(work), plan.at_a_time)]
        batches.run([dataclasses.replace(item, new=2) for item in groups[0]])
        seconds = [batches.run(group).times[-1] for group in groups]
        held = statistics.fmean(sum(len(item.prompt) + item.new for item in group) for group in groups)
        side["loads"][name] = {
            "requests_per_second": len(work) / sum(seconds),
            "cache_bytes": batches.cache_bytes,
            "cache_used": held / (batches.tables.size * BLOCK_SIZE),
            "memory_bytes": weights + batches.cache_bytes + batches.temporary_bytes,
        }
        done(f"baseline, {name}: {side['loads'][name]['requests_per_second']:.3f} requests/s")
    return side


def measure_optimised(
    lm: LanguageModel, plan: Plan, longest: int, singles: list[Work], loads: Loads, done: Callable[[str], None]
) -> dict[str, Any]:
    """The same by the engine."""
    side: dict[str, Any] = {"loads": {}}
    rows = -(-longest // BLOCK_SIZE) * BLOCK_SIZE
    within = LanguageModel(
        lm.model, lm.config.replace(max_position_embeddings=rows), lm.tokenizer, lm.options, lm.generation_config
    )  # no wider block tables are compiled than these requests need
    cache_tokens = plan.at_a_time * rows
    engine = Engine(within, cache_tokens=cache_tokens, max_tokens=plan.piece, max_sequences=plan.at_a_time)
    shapes = engine.warmup()
    done(f"engine: {shapes} shapes of a step compiled")
    alone(engine, singles[0])
    side["single"] = spread([alone(engine, item) for item in singles])
    done(f"engine, one request at a time: {side['single']['latency_seconds']['p50']:.3f} s")
    weights = nbytes(within.flat_model()[0])
    token = KVCache.bytes_per_token(lm.config, lm.options.cache_form, lm.options.act_quant)
    each = max(1, plan.piece // plan.at_a_time)
    step = StepShape(phase="prefill", sequences=plan.at_a_time, context=rows, tokens=each)
    temporary = Step(within, step).memory["temporary"]
    for name, work in loads.items():
        result = served(engine, work)
        cache_bytes = result["peak_blocks"] * BLOCK_SIZE * token
        side["loads"][name] = {
            "requests_per_second": result["requests_per_second"],
            "cache_bytes": cache_bytes,
            "cache_used": result["utilisation"],
            "memory_bytes": weights + cache_bytes + temporary,
            "lost": result["lost"],
            "first_token_seconds": result["first_token_seconds"],
        }
        done(f"engine, {name}: {result['requests_per_second']:.3f} requests/s")
    return side


# ---- what it comes to ----


def row_of(
    name: str, unit: str, before: float, after: float, target: float | None = None, more: bool = False
) -> dict[str, Any]:
    """Both sides' numbers, how many times better the second is, and whether the target is reached.

    Args:
      name: of the number.
      unit: of both, "B" for bytes.
      before: the baseline's.
      after: the optimised side's.
      target: how many times better it is to be, if something is aimed at.
      more: whether more is better.
    """
    times = after / before if more else before / after
    reached = None if target is None else times >= target
    numbers = {"baseline": before, "optimised": after, "times": times, "target": target, "reached": reached}
    return {"name": name, "unit": unit, **numbers}


def comparison(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of what was measured, see `row_of`."""
    sides = [content["sides"][name] for name in SIDES]

    def single(kind: str, number: str) -> tuple[float, float]:
        before, after = (side["single"][kind][number] for side in sides)
        return before, after

    latency = "latency_seconds"
    rows = [
        row_of("latency", "s", *single(latency, "p50"), TARGETS["latency"]),
        row_of("latency P99", "s", *single(latency, "p99")),
        row_of("relative spread of latency", "", *single(latency, "relative_spread"), 1 / SPREAD_RATIO),
        row_of("first token", "s", *single("first_token_seconds", "p50"), TARGETS["first token"]),
    ]
    for name in sides[0]["loads"]:
        loads = [side["loads"][name] for side in sides]
        rates, memory, cache, used = (
            [load[key] for load in loads]
            for key in ("requests_per_second", "memory_bytes", "cache_bytes", "cache_used")
        )
        rows.append(row_of(f"requests/s, {name}", "1/s", rates[0], rates[1], TARGETS["requests/s"], more=True))
        rows.append(row_of(f"memory, {name}", "B", memory[0], memory[1], TARGETS["memory at the same load"]))
        rows.append(row_of(f"cache, {name}", "B", cache[0], cache[1]))
        if used[1] is not None:  # of an engine in which some request had to wait
            rows.append(row_of(f"used share of the cache, {name}", "", used[0], used[1], more=True))
    contexts = content["contexts"]
    longest = [max((row["context"] for row in contexts if row[name]["fits"]), default=0) for name in SIDES]
    if all(longest):
        rows.append(row_of("longest context", "tokens", longest[0], longest[1], TARGETS["longest context"], more=True))
    read = [[row[name]["read_by_a_token"] for row in (contexts[0], contexts[-1])] for name in SIDES]
    grown = [last / first / (contexts[-1]["context"] / contexts[0]["context"]) for first, last in read]
    rows.append(row_of("growth of what a token reads, over the context's", "", grown[0], grown[1]))
    return rows


def label_and_sides(row: dict[str, Any]) -> list[str]:
    """A row's name with its unit, and both sides' numbers."""
    unit = f", {row['unit']}" if row["unit"] not in ("", "B") else ""
    return [row["name"] + unit, *(human(row[name]) if row["unit"] == "B" else f"{row[name]:.4g}" for name in SIDES)]


def table_of(content: dict[str, Any]) -> str:
    """The comparison as text."""
    lines = [f"{'':<44} {'baseline':>12} {'optimised':>12} {'times':>7} {'target':>7}"]
    for row in content["comparison"]:
        label, before, after = label_and_sides(row)
        goal = "" if row["target"] is None else f"{row['target']:.2f}{' ' if row['reached'] else ' missed'}"
        lines.append(f"{label:<44} {before:>12} {after:>12} {row['times']:>6.2f}x {goal:>7}".rstrip())
    p99 = content["sides"]["optimised"]["single"]["latency_seconds"]
    lines.append(
        f"P99 of the latency is {p99['p99'] / p99['p50']:.2f} of its median; at most {P99_OVER_MEDIAN} is aimed at"
    )
    return "\n".join(lines)
