"""`dsv32 serve`."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from dsv32_jax.cli.inputs import check_sampling, loaded, name_of, print_json
from dsv32_jax.cli.options import (
    Attention,
    Backends,
    CheckFlag,
    ComputeDtype,
    IndexTopk,
    Json,
    Model,
    NoActQuant,
    NoMtp,
    PartFlag,
    Temperature,
    TopP,
)
from dsv32_jax.errors import UserError


def serve(
    model: Model = "demo",
    host: Annotated[
        str, typer.Option("--host", help="Address to listen at; the default is this machine alone.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one.")] = 8000,
    name: Annotated[str | None, typer.Option("--name", help="Of the model, for clients. Default: of --model.")] = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", help="Asked for on every route. Default: $DSV32_API_KEY, which `ps` does not show."),
    ] = None,
    max_sequences: Annotated[int, typer.Option("--max-sequences", help="That run at a time.")] = 32,
    max_step_tokens: Annotated[
        int | None,
        typer.Option("--max-step-tokens", help="Of a step that continues texts. Default: 256, with kernels 512."),
    ] = None,
    speculate: Annotated[
        bool, typer.Option("--speculate", help="Up to two tokens a step, by the model's MTP layer; the same tokens.")
    ] = False,
    cache_tokens: Annotated[
        int | None,
        typer.Option("--cache-tokens", help="Places of the cache. Default: of one longest sequence, or 32768."),
    ] = None,
    memory_fraction: Annotated[
        float | None, typer.Option("--memory-fraction", help="Instead: of the free memory, the cache's part.")
    ] = None,
    max_queue: Annotated[int, typer.Option("--max-queue", help="Prompts that wait; more get status 429.")] = 64,
    max_body_bytes: Annotated[int, typer.Option("--max-body-bytes", help="Of a request; more get 413.")] = 4 * 2**20,
    deadline: Annotated[float, typer.Option("--deadline", help="Seconds that a request has; then it gets 504.")] = 600,
    drain_seconds: Annotated[
        float, typer.Option("--drain-seconds", help="That running requests get after SIGTERM or Ctrl-C.")
    ] = 30,
    no_warmup: Annotated[
        bool, typer.Option("--no-warmup", help="Compile each shape of a step when it is needed, not all before.")
    ] = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    metrics_log: Annotated[
        Path | None, typer.Option("--metrics-log", help="Add counts and latencies here, one line of JSON each time.")
    ] = None,
    metrics_interval: Annotated[float, typer.Option("--metrics-interval", help="Seconds between two lines.")] = 10,
    attention: Attention = "sparse",
    index_topk: IndexTopk = None,
    backend: Backends = None,
    compute_dtype: ComputeDtype = None,
    no_act_quant: NoActQuant = False,
    no_mtp: NoMtp = False,
    part: PartFlag = None,
    check: CheckFlag = False,
    as_json: Json = False,
) -> None:
    """Answer OpenAI's completions and chat completions over HTTP, with Prometheus metrics at /metrics.

    --temperature and --top-p are of requests that do not say. The first signal drains, the second ends at once. When it
    listens, one line has the model's name and the URL; with --json as an object.

    Example: dsv32 serve --model DIR --port 8000
    """
    try:
        from dsv32_jax.server import Settings
        from dsv32_jax.server import serve as run
        from dsv32_jax.server.metrics_log import check_writable
        from dsv32_jax.server.run import bind
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("prometheus_client", "starlette", "uvicorn"):
            raise
        raise UserError(f"serve: {error.name} is not installed; pip install 'dsv32-jax[serve]'") from error
    from dsv32_jax.engine.engine import Engine

    check_sampling(temperature, top_p, 0)
    key = os.environ.get("DSV32_API_KEY") if api_key is None else api_key
    try:
        settings = Settings(
            name=name or name_of(model),
            api_key=key,
            max_queue=max_queue,
            max_body_bytes=max_body_bytes,
            deadline=deadline,
            drain_seconds=drain_seconds,
            warmup=not no_warmup,
            metrics_log=metrics_log,
            metrics_interval=metrics_interval,
        )
    except UserError as error:
        from_environment = api_key is None and str(error).startswith("api_key:")
        raise UserError(f"{error} (it is that of $DSV32_API_KEY)" if from_environment else str(error)) from error
    if metrics_log is not None:
        check_writable(metrics_log)
    bound = bind(host, port)
    if settings.api_key is None and not bound.getsockname()[0].startswith(("127.", "::1")):
        typer.echo(f"warning: --host {host}: others can reach it, and no key is asked for; see --api-key", err=True)
    m = loaded(model, compute_dtype, no_act_quant, attention, index_topk, backend, no_mtp, part, check)
    temperature, top_p = m.sampling(temperature, top_p, 0)
    settings = dataclasses.replace(settings, temperature=temperature, top_p=top_p)
    engine = Engine(
        m,
        cache_tokens=cache_tokens,
        speculate=speculate,
        memory_fraction=memory_fraction,
        max_tokens=max_step_tokens,
        max_sequences=max_sequences,
    )

    def listening(url: str) -> None:
        if as_json:
            print_json(model=settings.name, url=url)
        else:
            typer.echo(f"serving {settings.name} at {url}")
        sys.stdout.flush()

    sys.exit(run(engine, settings, bound, listening))
