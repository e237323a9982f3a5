"""Compares the engine with static batches: `python -m experiments.studies.serving`, at full width on a GPU.

The baseline is `LanguageModel.generate`: it reads a batch of requests one prompt after another into a contiguous cache
with room for the longest, decodes them together until the longest has ended, and shares nothing. The engine serves the
same requests, as many at a time. Requests have 64 to 4096 tokens and ask for 16 to 1024; each batch of the baseline has
one that is longest in both, so that all its batches cost about the same, and one of them is measured. A step of the
engine has room for six tokens for each running request, which is about the rate at which tokens arrive, since prompts
are four times as long as their continuations; and for at least 512, which take little longer than fewer, since a step
reads all weights in any case.

Both have cache for that many of the longest requests. The engine only allocates blocks for the tokens of a request, so
that about twice as many requests fit, and four times as many where they share prefixes: with --fill it runs once more
with as many at a time. Those that share prefixes need half of the tokens a step, since it reads fewer prompts.

Prompts are random tokens; for a checkpoint with a tokenizer they are windows of the held-out text, so that with
--speculate its MTP layer can predict tokens.

With --repeat everything runs several times, and the result is the run with the median of requests/s.

Compiling takes longer than measuring, and mostly uses one core. Processes that get the same file with --turns, say one
for each number of requests at a time, compile beside each other and measure one after the other; each needs its part of
the GPU's memory (XLA_PYTHON_CLIENT_MEM_FRACTION).
"""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv32_jax.config import ModelConfig
from dsv32_jax.engine.blocks import BLOCK_SIZE
from dsv32_jax.engine.engine import Engine
from dsv32_jax.engine.metrics import Metrics, percentiles
from dsv32_jax.engine.request import SamplingParams
from dsv32_jax.experiments import command_line
from dsv32_jax.experiments.results import RESULTS, environment, write_json
from dsv32_jax.experiments.studies import held_out
from dsv32_jax.experiments.studies.serving_report import OF_ALL, RUNS
from dsv32_jax.experiments.workbench.random_model import layers_that_fit, random_model
from dsv32_jax.generate import batching
from dsv32_jax.generate.compiling import all_at_once
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.loading import load

RESULT = RESULTS / "serving.json"
SHARED = 0.75
"""The share of a prompt that its group has in common, where prefixes are shared; a group is 8 requests."""
GROUP = 8
PREFIXES = 9
"""Number of prefixes with which the saving of a cached prefix is measured."""


@dataclasses.dataclass(frozen=True)
class Work:
    """One request: a prompt and the number of tokens to generate."""

    prompt: list[int]
    new: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Least and greatest lengths."""

    prompt: tuple[int, int] = (64, 4096)
    new: tuple[int, int] = (16, 1024)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its continuation."""
        return self.prompt[1] + self.new[1]


class Prompts:
    """Draws prompts: windows of the held-out text, or random tokens for a model without a tokenizer."""

    def __init__(self, lm: LanguageModel):
        self.vocabulary, self.text = lm.config.vocab_size, []
        if lm.tokenizer:
            for document in held_out.documents():
                self.text += lm.tokenizer.encode(document["text"], bos=True)

    def draw(self, rng: np.random.Generator, length: int) -> list[int]:
        """Draws a prompt of `length` tokens."""
        if not self.text:
            return rng.integers(0, self.vocabulary, length).tolist()
        start = int(rng.integers(0, len(self.text) - length))
        return self.text[start : start + length]


def workload(count: int, batch: int, sizes: Sizes, prompts: Prompts, shared: bool, seed: int = 0) -> list[Work]:
    """Makes requests; the first of each `batch` is the longest. With one at a time all have the middle lengths."""
    rng = np.random.default_rng(seed)
    prefix: list[int] = []
    requests = []
    for i in range(count):
        if i % GROUP == 0:
            prefix = prompts.draw(rng, sizes.prompt[1])
        length, new = (int(rng.integers(low, high + 1)) for low, high in (sizes.prompt, sizes.new))
        if batch == 1:
            length, new = sum(sizes.prompt) // 2, sum(sizes.new) // 2
        elif i % batch == 0:
            length, new = sizes.prompt[1], sizes.new[1]
        tokens = prompts.draw(rng, length)
        shared_tokens = int(SHARED * length) if shared else 0
        requests.append(Work(prefix[:shared_tokens] + tokens[shared_tokens:], new))
    return requests


def rates(work: list[Work], seconds: float) -> dict[str, Any]:
    """Requests and tokens per second."""
    return {
        "requests": len(work),
        "seconds": seconds,
        "requests_per_second": len(work) / seconds,
        "generated_tokens_per_second": sum(item.new for item in work) / seconds,
    }


def served(engine: Engine, work: list[Work]) -> dict[str, Any]:
    """Queues all requests at once in an engine with an empty cache, and returns its rates and its summary.

    At the end ever fewer requests run; `while_requests_wait` leaves that part out, as for a queue that never ends. So
    does `utilisation`, the share of the slots in allocated blocks that hold a token.
    """
    engine.metrics = Metrics()
    engine.pool.forget()
    start = time.monotonic()
    requests = [engine.add(item.prompt, SamplingParams(item.new, temperature=0.0, ignore_eos=True)) for item in work]
    utilisations, steady, peak_blocks = [], {}, 0
    while engine.busy:
        engine.step()
        pool = engine.pool.statistics()
        peak_blocks = max(peak_blocks, pool.in_use)
        if engine.scheduler.waiting:
            utilisations.append(1 - pool.internal_fragmentation)
            steady = {"seconds": time.monotonic() - start, "generated_tokens": engine.metrics.generated_tokens}
    seconds = time.monotonic() - start
    if steady:
        mean = statistics.fmean(item.new for item in work)
        steady["requests_per_second"] = steady["generated_tokens"] / steady["seconds"] / mean
    incomplete = sum(len(r.completions[0].tokens) != item.new for r, item in zip(requests, work, strict=True))
    times = [request.completions[0].times for request in requests]
    return {
        **rates(work, seconds),
        "lost": incomplete,
        "peak_blocks": peak_blocks,
        "latency_seconds": percentiles([item[-1] for item in times]),
        "first_token_seconds": percentiles([item[0] for item in times]),
        "between_tokens_seconds": percentiles(np.concatenate([np.diff(item) for item in times])),
        "per_output_token_seconds": percentiles(
            [(item[-1] - item[0]) / (len(item) - 1) for item in times if len(item) > 1]
        ),
        "while_requests_wait": steady,
        "utilisation": statistics.fmean(utilisations) if utilisations else None,
        "summary": engine.summary(),
    }


def naive(lm: LanguageModel, work: list[Work]) -> dict[str, Any]:
    """Runs one static batch; every request comes at its start, and is done when the whole batch is."""
    rows, max_new = [item.prompt for item in work], max(item.new for item in work)
    start, times = time.monotonic(), []
    for piece in lm.stream(rows, max_new, temperature=0.0, ignore_eos=True):
        if piece.row == 0:
            times.append(time.monotonic())
    seconds = time.monotonic() - start
    table = batching.block_tables(1, max(map(len, rows)) + max_new, lm.config.max_position_embeddings)
    allocated = len(work) * table.size * BLOCK_SIZE
    return {
        **rates(work, seconds),
        "first_token_seconds": times[0] - start,
        "between_tokens_seconds": percentiles(np.diff(times)),
        "utilisation": sum(len(item.prompt) + item.new for item in work) / allocated,
    }


def compile_all(lm: LanguageModel, work: list[Work], engines: list[dict[str, Any]]) -> None:
    """Compiles every program of the baseline for a batch and of all engines at once, and calls the baseline's.

    One after the other they would take most of the measurement's time. The calls warm up what a first call does beside
    compiling; engines do that in their own warm-up, for which JAX has cached the programs.
    """
    lengths, new = [len(item.prompt) for item in work], max(item.new for item in work)
    jobs: list[Callable[[], Any]] = lm.programs(lengths, new)
    for settings in engines:
        jobs += Engine(lm, **settings).programs()
    all_at_once(jobs)
    pieces = {size: stop - start for length in lengths for start, stop, size in batching.chunks(length, lm.options)}
    longest = max(lengths) + new
    for length in pieces.values():
        rows = [[1] * length] + [[1] * min(pieces.values())] * (len(work) - 1)
        for _ in itertools.islice(lm.stream(rows, longest - length, temperature=0.0, ignore_eos=True), 2 * len(work)):
            pass


def repeated(times: int, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The run with the median of requests/s, with the requests/s of all runs and the number of incomplete requests."""
    runs = sorted((run() for _ in range(times)), key=lambda result: result["requests_per_second"])
    middle = runs[times // 2] | {OF_ALL: [result["requests_per_second"] for result in runs]}
    if "lost" in middle:
        middle["lost"] = sum(result["lost"] for result in runs)
    return middle


def prefix_saving(engine: Engine, sizes: Sizes, prompts: Prompts) -> dict[str, float]:
    """Median seconds to the first token of a long prompt, and of another prompt with the same prefix."""
    rng = np.random.default_rng(7)

    def first_token(beginning: list[int]) -> float:
        prompt = beginning + prompts.draw(rng, BLOCK_SIZE)
        start = time.monotonic()
        engine.generate([prompt], SamplingParams(1, temperature=0.0, ignore_eos=True))
        return time.monotonic() - start

    measured = []
    for _ in range(PREFIXES):
        prefix = prompts.draw(rng, sizes.prompt[1] - BLOCK_SIZE)
        measured.append((first_token(prefix), first_token(prefix), first_token([])))
    cold, hit, suffix_only = map(statistics.median, zip(*measured, strict=True))
    return {
        "cold": cold,
        "hit": hit,
        "own_part_alone": suffix_only,
        "saved": (cold - hit) / (cold - suffix_only),
        "prefixes": PREFIXES,
    }


Runs = list[tuple[dict[str, Any], dict[str, list[Work]]]]
"""Arguments of engines, each with its requests by the name of the run."""


def runs_of(concurrency: int, prompts: Prompts, arguments: argparse.Namespace) -> Runs:
    """The engines and their requests at `concurrency` requests at a time."""
    sizes, each = sizes_of(arguments), arguments.step_tokens

    def work(times: int, shared: bool) -> list[Work]:
        return workload(arguments.rounds * times * concurrency, concurrency, sizes, prompts, shared)

    def engine(times: int, tokens: int, speculate: bool = False) -> dict[str, Any]:
        return {
            "cache_tokens": concurrency * (sizes.longest + BLOCK_SIZE),
            "max_tokens": max(arguments.least_step_tokens, tokens * times * concurrency),
            "max_sequences": times * concurrency,
            "speculate": speculate,
        }

    runs: Runs = [(engine(1, each), {"engine": work(1, False), "engine_shared": work(1, True)})]
    if concurrency in arguments.fill:
        filled = {"engine_filled": work(2, False), "engine_filled_shared": work(2, True)}
        runs += [(engine(2, each), filled), (engine(4, each // 2), {"engine_shared_fourfold": work(4, True)})]
    if arguments.speculate:
        runs.append((engine(1, each, True), {"engine_speculating": work(1, False)}))
    return runs


def measure(
    lm: LanguageModel, prompts: Prompts, row: dict[str, Any], arguments: argparse.Namespace, save: Callable[[str], None]
) -> None:
    """Measures the baseline and the engines at the row's number of requests at a time; calls `save` after each part."""
    concurrency, sizes = row["concurrency"], sizes_of(arguments)
    batch = workload(concurrency, concurrency, sizes, prompts, False)
    runs = runs_of(concurrency, prompts, arguments)
    with turn(arguments.turns, alone=False):
        start = time.monotonic()
        compile_all(lm, batch, [settings for settings, _ in runs])
        row["compile_seconds"] = time.monotonic() - start
        save("all programs compiled")
    with turn(arguments.turns, alone=True):
        row["naive"] = repeated(arguments.repeat, functools.partial(naive, lm, batch))
        gc.collect()
        gc.freeze()  # as `dsv32 serve` does
        save("naive batch")
        for settings, parts in runs:
            engine = Engine(lm, **settings)
            measure_engine(engine, parts, row, arguments.repeat, save)
            if "prefix" not in row:
                row["prefix"] = prefix_saving(engine, sizes, prompts)
                save("a prefix that is cached")
            del engine
            gc.collect()
        gc.unfreeze()


def measure_engine(
    engine: Engine, parts: dict[str, list[Work]], row: dict[str, Any], times: int, save: Callable[[str], None]
) -> None:
    """Measures one engine with each of its workloads, `times` times each."""
    start, sequences = time.monotonic(), engine.scheduler.limits.sequences
    shapes = engine.warmup()
    warmup = {"sequences": sequences, "shapes": shapes, "seconds": time.monotonic() - start}
    save(f"{shapes} shapes of a step with {sequences} sequences")
    for name, requests in parts.items():
        row[name] = {"warmup": warmup, **repeated(times, functools.partial(served, engine, requests))}
        speeds = {"ratio": row[name], "steady_ratio": row[name]["while_requests_wait"]}
        for ratio, rate in speeds.items():
            row[name][ratio] = rate.get("requests_per_second", 0.0) / row["naive"]["requests_per_second"]
        save(name)


@contextlib.contextmanager
def turn(file: Path | None, *, alone: bool) -> Iterator[None]:
    """With `alone`, waits until no other process holds the lock of this file; else several processes share it."""
    if file is None:
        yield
        return
    with file.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def line_of(row: dict[str, Any]) -> str:
    """A row on one line."""
    base, engine, shared = row["naive"], row["engine"], row["engine_shared"]
    between = engine["between_tokens_seconds"]
    others = [
        f"; {name.removeprefix('engine, ')} {row[key]['ratio']:.2f}x"
        for key, name in RUNS.items()
        if key in row and key not in ("engine", "engine_shared")
    ]
    return (
        f"{row['concurrency']:>4} at a time: naive {base['requests_per_second']:.3f} requests/s, engine "
        f"{engine['requests_per_second']:.3f} ({engine['ratio']:.2f}x, {engine['steady_ratio']:.2f}x while requests "
        f"wait), shared prefixes "
        f"{shared['ratio']:.2f}x ({shared['steady_ratio']:.2f}x); "
        f"between tokens {between['p50'] * 1e3:.1f} ms, P99 {between['p99'] * 1e3:.1f} ms; cache "
        f"{engine['utilisation'] or 0:.1%} used, naive {base['utilisation']:.1%}; a prefix hit saves "
        f"{row['prefix']['saved']:.1%}"
    ) + "".join(others)


def sizes_of(arguments: argparse.Namespace) -> Sizes:
    """The sizes of the requests, from the arguments."""
    return Sizes(tuple(arguments.prompt), tuple(arguments.new))


def main() -> None:
    """The command."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--model", help="a checkpoint, or demo; default: random weights at full width")
    parser.add_argument("--layers", type=int, help="of the random model; default: as many as fit")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--rounds", type=int, default=3, help="requests for each that runs at a time")
    parser.add_argument("--repeat", type=int, default=1, help="runs, of which the median is the result")
    parser.add_argument("--prompt", type=int, nargs=2, default=Sizes.prompt, metavar=("LEAST", "MOST"))
    parser.add_argument("--new", type=int, nargs=2, default=Sizes.new, metavar=("LEAST", "MOST"))
    parser.add_argument("--step-tokens", type=int, default=6, help="of a step, for each that runs at a time")
    parser.add_argument("--least-step-tokens", type=int, default=512, help="however few run")
    parser.add_argument("--fill", type=int, nargs="*", default=[32, 128], help="see above")
    parser.add_argument(
        "--speculate", action="store_true", help="run once more, trying a token of the MTP layer a step"
    )
    parser.add_argument("--turns", type=Path, help="a file that several such processes share, see above")
    parser.add_argument("--seconds", type=float, help="begin no further number of requests after this time")
    parser.add_argument("--out", type=Path, default=RESULT)
    run(parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    """Runs the measurement that the arguments ask for."""
    start = time.monotonic()
    sizes = sizes_of(arguments)
    if arguments.model:
        lm = load(arguments.model)
    else:
        layers = arguments.layers or layers_that_fit(0.85)
        lm = random_model(ModelConfig.full_width(layers, max_position_embeddings=-(-sizes.longest // 1024) * 1024))
        jax.block_until_ready(lm.flat_model()[0])
    content: dict[str, Any] = {
        **environment(),
        "model": arguments.model or "random weights at full width",
        "layers": lm.config.num_hidden_layers,
        "sizes": dataclasses.asdict(sizes),
        "step_tokens": arguments.step_tokens,
        "least_step_tokens": arguments.least_step_tokens,
        "rows": [],
    }

    def save(done: str) -> None:
        write_json(arguments.out, content)
        print(f"{time.monotonic() - start:6.0f} s: {done}", flush=True)

    save(f"{content['model']}, {content['layers']} layers")
    prompts = Prompts(lm)
    for concurrency in arguments.concurrency:
        if arguments.seconds and time.monotonic() - start > arguments.seconds:
            print(f"{concurrency} at a time: not begun within {arguments.seconds:g} s", flush=True)
            continue
        row: dict[str, Any] = {"concurrency": concurrency}
        content["rows"].append(row)
        measure(lm, prompts, row, arguments, save)
        print(line_of(row), flush=True)


if __name__ == "__main__":
    command_line.run(main)
