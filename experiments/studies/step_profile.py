"""Profiles steps of the engine: `python -m experiments.studies.step_profile`, at full width or with `--model`.

The engine reads and continues requests as in `dsv32 serve`. First the model is left out: the time of a step is then the
host's part, which runs beside the device's and is hidden as long as it is shorter. Then, on a GPU, it times some steps
and profiles others: while half of the requests are still prompts ("mixed": a full step of prompt and continued tokens),
and when all are continued ("decode"). Each phase has the milliseconds from step to step, the share of them in which the
device worked, and its kernels by their time.
"""

import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.config import ModelConfig
from dsv32_jax.engine.device_step import RowSampling, Shape
from dsv32_jax.engine.engine import Engine
from dsv32_jax.engine.request import Request, SamplingParams
from dsv32_jax.experiments import command_line
from dsv32_jax.experiments.results import RESULTS, environment, write_json
from dsv32_jax.experiments.workbench.profile import by_name, overlap, profiled
from dsv32_jax.experiments.workbench.random_model import random_model
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.loading import load

RESULT = RESULTS / "step_profile.json"
TIMED, PROFILED, OF_HOST = 20, 4, 100
"""Numbers of steps; those of the device are long, so that few are enough."""


def profile_steps(engine: Engine) -> dict[str, Any]:
    """Times and profiles the next steps."""
    engine.step()
    jax.block_until_ready(engine.cache)
    start, tokens_before = time.perf_counter(), engine.metrics.step_tokens
    for _ in range(TIMED):
        engine.step()
    jax.block_until_ready(engine.cache)
    seconds = (time.perf_counter() - start) / TIMED
    tokens = (engine.metrics.step_tokens - tokens_before) / TIMED

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


def without_model(shape: Shape) -> tuple[Any, Any]:
    """Programs of an engine whose model takes no time; each row samples from the same logits of 256 tokens."""
    logits, zeros = jax.random.normal(jax.random.key(0), (shape.rows, 256)), jnp.zeros(shape.rows, jnp.int32)
    sampling = RowSampling(zeros, zeros, zeros, jnp.zeros(shape.rows), jnp.ones(shape.rows))

    def run_step(leaves: Any, flat: Any, previous_tokens: Any, cache: Any) -> Any:
        del leaves, flat, previous_tokens
        return None, logits, sampling, cache

    return run_step, None


def host_milliseconds(engine: Engine, requests: list[Request]) -> float:
    """Milliseconds of the host for a step that continues all these requests, which are cancelled afterwards."""
    until_continued(engine, requests, len(requests))
    start = time.perf_counter()
    for _ in range(OF_HOST):
        engine.step()
    seconds = time.perf_counter() - start
    for request in requests:
        engine.cancel(request)
    while engine.busy:
        engine.step()
    return 1e3 * seconds / OF_HOST


def add(engine: Engine, prompts: list[list[int]], new: int) -> list[Request]:
    """Adds the prompts as requests of `new` tokens each."""
    return [engine.add(prompt, SamplingParams(new, temperature=0.0, ignore_eos=True)) for prompt in prompts]


def until_continued(engine: Engine, requests: list[Request], count: int) -> None:
    """Runs steps until `count` requests have a token."""
    while sum(bool(request.completions[0].tokens) for request in requests) < count:
        engine.step()


def measure(lm: LanguageModel, concurrency: int, step_tokens: int, prompt: int) -> Iterator[dict[str, Any]]:
    """Yields the row of results after each of its parts is measured."""
    new = 2 * prompt // step_tokens + max(8 * (TIMED + PROFILED), 2 * OF_HOST)  # the first requests wait for the last
    sizes: dict[str, Any] = {
        "cache_tokens": concurrency * (-(-(prompt + new) // 1024) * 1024),
        "max_tokens": step_tokens * concurrency,
        "max_sequences": concurrency,
    }
    prompts = np.random.default_rng(0).integers(0, lm.config.vocab_size, (concurrency, prompt)).tolist()
    engine = Engine(lm, **sizes, programs=functools.cache(without_model))
    row: dict[str, Any] = {
        "concurrency": concurrency,
        "host_milliseconds": host_milliseconds(engine, add(engine, prompts, new)),
    }
    yield row
    if jax.default_backend() != "gpu":
        return
    del engine  # its cache makes room for another
    engine = Engine(lm, **sizes)
    requests = add(engine, prompts, new)
    row["phases"] = {}
    phases = {"mixed": concurrency // 2, "decode": concurrency}
    for phase, continued in phases.items():
        if not continued:  # one request is never both
            continue
        until_continued(engine, requests, continued)
        row["phases"][phase] = profile_steps(engine)
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
            phase, profile = list(row["phases"].items())[-1]
            print(
                f"{phase}: {profile['tokens']:g} tokens a step, {profile['milliseconds']:.2f} ms, {profile['device']}"
            )
            for kernel in profile["kernels"][:40]:
                print(f"  {kernel['us']:9.1f} us, {kernel['times']:6g} times: {kernel['name']}", flush=True)


if __name__ == "__main__":
    command_line.run(main)
