"""Where a step of the engine goes: `python -m experiments.studies.step_profile`, at full width or with `--model`.

Requests are read and continued as `dsv32 serve` would. First the model is left out: what a step takes then is the
host's part, which goes on beside the device's and is not seen as long as it is the shorter one. On a GPU then, while
half of the requests are still prompts ("mixed": a full step of prompt and continued tokens) and when all are continued
("decode"), some steps are timed and some are profiled. For each phase: milliseconds from step to step, how much of them
the device worked, and its kernels by the time they took.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.config import ModelConfig
from dsv32_jax.engine.device_step import RowSampling
from dsv32_jax.engine.engine import Engine
from dsv32_jax.engine.request import Request, SamplingParams
from dsv32_jax.experiments import command_line
from dsv32_jax.experiments.bench.layer_profile import by_name, overlap, profiled
from dsv32_jax.experiments.results import RESULTS, environment, write_json
from dsv32_jax.experiments.studies.random_model import random_model
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.loading import load

RESULT = RESULTS / "step_profile.json"
TIMED, PROFILED, OF_HOST = 20, 4, 100
"""Steps; one of the device is long, so that few are enough."""


def of_steps(engine: Engine) -> dict[str, Any]:
    """What the next steps take."""
    engine.step()
    jax.block_until_ready(engine.cache)
    begun, before = time.perf_counter(), engine.metrics.step_tokens
    for _ in range(TIMED):
        engine.step()
    jax.block_until_ready(engine.cache)
    seconds = (time.perf_counter() - begun) / TIMED
    tokens = (engine.metrics.step_tokens - before) / TIMED

    def several() -> Any:
        for _ in range(PROFILED):
            engine.step()
        return engine.cache

    kernels = profiled(several)
    return {
        "tokens": tokens,
        "milliseconds": 1e3 * seconds,
        "device": {name: us / PROFILED for name, us in overlap(kernels).items()},
        "kernels": by_name(kernels, PROFILED),
    }


@contextlib.contextmanager
def without_model(engine: Engine) -> Iterator[None]:
    """The model's part of a step takes no time; each row draws the same of 256 tokens again and again."""
    rows = engine._rows
    logits, zeros = jax.random.normal(jax.random.key(0), (rows, 256)), jnp.zeros(rows, jnp.int32)
    sampling = RowSampling(zeros, zeros, zeros, jnp.zeros(rows), jnp.ones(rows))

    def nothing(leaves: Any, flat: Any, previous_tokens: Any, cache: Any) -> Any:
        del leaves, flat, previous_tokens
        return None, logits, sampling, cache

    programs, engine._programs = engine._programs, {shape: (nothing, None) for shape in engine.shapes()}
    try:
        yield
    finally:
        engine._programs = programs


def of_host(engine: Engine, requests: list[Request]) -> float:
    """Milliseconds of the host for a step in which all these are continued; they are cancelled then."""
    with without_model(engine):
        until_continued(engine, requests, len(requests))
        begun = time.perf_counter()
        for _ in range(OF_HOST):
            engine.step()
        seconds = time.perf_counter() - begun
        for request in requests:
            engine.cancel(request)
        while engine.busy:
            engine.step()
    engine.pool.forget()  # nothing was computed
    return 1e3 * seconds / OF_HOST


def add(engine: Engine, prompts: list[list[int]], new: int) -> list[Request]:
    """The prompts, each to be continued by so many tokens."""
    return [engine.add(prompt, SamplingParams(new, temperature=0.0, ignore_eos=True)) for prompt in prompts]


def until_continued(engine: Engine, requests: list[Request], count: int) -> None:
    """Steps, until so many have a token."""
    while sum(bool(request.completions[0].tokens) for request in requests) < count:
        engine.step()


def measure(lm: LanguageModel, concurrency: int, step_tokens: int, prompt: int) -> Iterator[dict[str, Any]]:
    """A row, after each part of it."""
    new = 2 * prompt // step_tokens + max(8 * (TIMED + PROFILED), 2 * OF_HOST)  # the first wait for the last
    engine = Engine(
        lm,
        cache_tokens=concurrency * (-(-(prompt + new) // 1024) * 1024),
        max_tokens=step_tokens * concurrency,
        max_sequences=concurrency,
    )
    prompts = np.random.default_rng(0).integers(0, lm.config.vocab_size, (concurrency, prompt)).tolist()
    row: dict[str, Any] = {"concurrency": concurrency, "host_milliseconds": of_host(engine, add(engine, prompts, new))}
    yield row
    if jax.default_backend() != "gpu":
        return
    requests = add(engine, prompts, new)
    row["phases"] = {}
    phases = {"mixed": concurrency // 2, "decode": concurrency}
    for phase, continued in phases.items():
        if not continued:  # one request is never both
            continue
        until_continued(engine, requests, continued)
        row["phases"][phase] = of_steps(engine)
        yield row


def main() -> None:
    """The command."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--model", help="a checkpoint, or demo; default: random weights at full width")
    parser.add_argument("--layers", type=int, default=4, help="of the random model; the first three are dense")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[32])
    parser.add_argument("--step-tokens", type=int, default=6, help="of a step, for each that runs at a time")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.model:
        lm = load(arguments.model)
    else:
        lm = random_model(ModelConfig.full_width(arguments.layers, max_position_embeddings=2 * arguments.prompt + 1024))
    content: dict[str, Any] = {
        **environment(),
        "model": arguments.model or "random weights at full width",
        "layers": lm.config.num_hidden_layers,
        "prompt": arguments.prompt,
        "rows": [],
    }
    for concurrency in arguments.concurrency:
        content["rows"].append({})
        for row in measure(lm, concurrency, arguments.step_tokens, arguments.prompt):
            content["rows"][-1] = row
            write_json(arguments.out, content)
            if "phases" not in row:
                print(f"{concurrency} at a time: the host takes {row['host_milliseconds']:.2f} ms a step", flush=True)
                continue
            phase, found = list(row["phases"].items())[-1]
            print(f"{phase}: {found['tokens']:g} tokens a step, {found['milliseconds']:.2f} ms, {found['device']}")
            for kernel in found["kernels"][:40]:
                print(f"  {kernel['us']:9.1f} us, {kernel['times']:6g} times: {kernel['name']}", flush=True)


if __name__ == "__main__":
    command_line.run(main)
