"""Where a step of the engine goes: `python -m experiments.step_profile`, on a GPU, at full width with few layers.

Requests are read and continued as `dsv32 serve` would; while half of them are still prompts ("mixed": a full step of
prompt and continued tokens) and when all are continued ("decode"), some steps are timed and some are profiled. For each
phase: milliseconds from step to step, how much of them the device worked, and its kernels by the time they took.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv32_jax.config import ModelConfig
from dsv32_jax.engine import Engine
from dsv32_jax.request import SamplingParams
from experiments.bench.layer_profile import by_name, overlap, profiled
from experiments.random_model import random_model
from experiments.results import RESULTS, environment, write_json

RESULT = RESULTS / "step_profile.json"
TIMED, PROFILED = 20, 4
"""Steps; a step is long, so that few are enough."""


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


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="the first three are dense")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--step-tokens", type=int, default=6, help="of a step, for each that runs at a time")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    concurrency, new = arguments.concurrency, 8 * (TIMED + PROFILED)
    places = arguments.prompt + 2 * arguments.prompt // arguments.step_tokens + new
    config = ModelConfig.full_width(arguments.layers, max_position_embeddings=-(-places // 1024) * 1024)
    engine = Engine(
        random_model(config),
        cache_tokens=concurrency * config.max_position_embeddings,
        max_tokens=arguments.step_tokens * concurrency,
        max_sequences=concurrency,
    )
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, config.vocab_size, (concurrency, arguments.prompt)).tolist()
    requests = [engine.add(prompt, SamplingParams(places - arguments.prompt, ignore_eos=True)) for prompt in prompts]
    content: dict[str, Any] = {**environment(), "layers": arguments.layers, "concurrency": concurrency, "phases": {}}

    for phase, continued in (("mixed", concurrency // 2), ("decode", concurrency)):
        while sum(bool(request.completions[0].tokens) for request in requests) < continued:
            engine.step()
        content["phases"][phase] = found = of_steps(engine)
        write_json(arguments.out, content)
        print(f"{phase}: {found['tokens']:g} tokens a step, {found['milliseconds']:.2f} ms, {found['device']}")
        for kernel in found["kernels"][:40]:
            print(f"  {kernel['us']:9.1f} us, {kernel['times']:6g} times: {kernel['name']}", flush=True)


if __name__ == "__main__":
    main()
