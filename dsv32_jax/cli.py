"""`dsv32 <verb>`. Wrong input gives one line on stderr and exit code 2."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv32_jax import __version__
from dsv32_jax.errors import UserError
from dsv32_jax.files import whole_file

if TYPE_CHECKING:  # JAX is imported when a verb runs, so that --help answers at once
    import numpy as np

    from dsv32_jax.language_model import LanguageModel

app = typer.Typer(
    help="DeepSeek-V3.2-Exp in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Option("--model", help='A checkpoint directory, "org/name" on the hub, or "demo".')]
PromptFlag = Annotated[list[str] | None, typer.Option("--prompt", help="A prompt; repeat it for a batch.")]
PromptFile = Annotated[
    list[Path] | None, typer.Option("--prompt-file", help="A UTF-8 file that is one prompt; repeat it for a batch.")
]
TokenIds = Annotated[
    Path | None, typer.Option("--token-ids", help="An .npy file of int32 [B, T]; -1: absent, at the right.")
]
MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", help="Default: of generation_config.json, or 256, or what fits.")
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", help="0 is greedy. Default: of generation_config.json, or 0.")
]
TopP = Annotated[float | None, typer.Option("--top-p", help="Default: of generation_config.json, or 1.")]
Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same tokens.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end-of-sentence token.")]
Thinking = Annotated[bool, typer.Option("--thinking", help="Let the model reason before it answers (a chat).")]
System = Annotated[str | None, typer.Option("--system", help="A system message (a chat).")]
Attention = Annotated[str, typer.Option("--attention", help="sparse | dense")]
IndexTopk = Annotated[
    int | None, typer.Option("--index-topk", help="Tokens that each query attends to. Default: of the config.")
]
Backend = Annotated[str, typer.Option("--backend", help="auto | mosaic_gpu | reference | interpret")]
ComputeDtype = Annotated[
    str | None, typer.Option("--compute-dtype", help="bfloat16 | float32. Default: bfloat16 on a GPU, else float32.")
]
NoActQuant = Annotated[
    bool, typer.Option("--no-act-quant", help="Quantise no activation, index key or latent: weights only.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"dsv32-jax {__version__}")
        raise typer.Exit


@app.command()
def generate(
    model: Model = "demo",
    prompt: PromptFlag = None,
    prompt_file: PromptFile = None,
    token_ids: TokenIds = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = 0,
    ignore_eos: IgnoreEos = False,
    thinking: Thinking = False,
    system: System = None,
    attention: Attention = "sparse",
    index_topk: IndexTopk = None,
    backend: Backend = "auto",
    compute_dtype: ComputeDtype = None,
    no_act_quant: NoActQuant = False,
    as_json: Json = False,
    save_tokens: Annotated[
        Path | None, typer.Option("--save-tokens", help="Write int32 [B, N] here (.npy), -1 after a row's end.")
    ] = None,
) -> None:
    """Continue prompts.

    A prompt is continued as plain text; with --system or --thinking it is one user message of a chat.

    Example: dsv32 generate --model DIR --prompt "The lighthouse"
    """
    prompts = _prompts(prompt, prompt_file, token_ids)
    _check_sampling(temperature, top_p, seed)
    with _replacing(save_tokens, "--save-tokens") as tokens_file:
        m = _load(model, compute_dtype, no_act_quant, attention, index_topk, backend)
        if isinstance(prompts, list) and (system is not None or thinking):
            prompts = [_tokenizer(m).encode_chat(_chat(system, text), thinking=thinking) for text in prompts]
        settings = _sampling(m, temperature, top_p, seed, ignore_eos)
        if len(prompts) == 1 and m.tokenizer is not None and not as_json:
            tokens: list[list[int]] = [[]]
            room = m.new_tokens(m.rows(prompts), max_new_tokens)
            for piece in m.stream(prompts, room, **settings):
                tokens[0].append(piece.token)
                typer.echo(piece.text, nl=False)
                sys.stdout.flush()
            typer.echo()
            if tokens_file is not None:
                _save(tokens_file, [tokens[0] + [-1] * (room - len(tokens[0]))])
            return
        result = m.generate(prompts, max_new_tokens, **settings)
        if tokens_file is not None:
            _save(tokens_file, result.tokens)
        tokens = [[token for token in row if token >= 0] for row in result.tokens.tolist()]
        if as_json:
            _print_json(
                tokens=tokens,
                texts=result.texts,
                finish_reasons=result.finish_reasons,
                prompt_tokens=[len(row) for row in m.rows(prompts)],
                **settings,
            )
            return
        for row, ids in enumerate(tokens):
            if len(tokens) > 1:
                typer.echo(f"--- {row}")
            typer.echo(" ".join(map(str, ids)) if result.texts is None else result.texts[row])


@app.command()
def chat(
    model: Model = "demo",
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = 0,
    ignore_eos: IgnoreEos = False,
    thinking: Thinking = False,
    system: System = None,
    attention: Attention = "sparse",
    index_topk: IndexTopk = None,
    backend: Backend = "auto",
    compute_dtype: ComputeDtype = None,
    no_act_quant: NoActQuant = False,
    as_json: Json = False,
) -> None:
    """Talk to the model: one line is one message; /exit or the end of input leaves.

    Example: dsv32 chat --model DIR --system "Answer in one sentence."
    """
    _check_sampling(temperature, top_p, seed)
    m = _load(model, compute_dtype, no_act_quant, attention, index_topk, backend)
    settings = _sampling(m, temperature, top_p, seed, ignore_eos)
    messages = _chat(system)
    for line in _lines("" if as_json or not sys.stdin.isatty() else "> "):
        messages.append({"role": "user", "content": line})
        ids = _tokenizer(m).encode_chat(messages, thinking=thinking)
        answer = ""
        for piece in m.stream([ids], max_new_tokens, **settings):
            answer += piece.text or ""
            if not as_json:
                typer.echo(piece.text, nl=False)
                sys.stdout.flush()
        if not as_json:
            typer.echo()
        messages.append({"role": "assistant", "content": answer})
    if as_json:
        _print_json(messages=messages)


@app.command()
def score(
    model: Model = "demo",
    text_file: Annotated[Path | None, typer.Option("--text-file", help="A UTF-8 text.")] = None,
    token_ids: TokenIds = None,
    attention: Attention = "sparse",
    index_topk: IndexTopk = None,
    backend: Backend = "auto",
    compute_dtype: ComputeDtype = None,
    no_act_quant: NoActQuant = False,
    as_json: Json = False,
    save_logits: Annotated[
        Path | None, typer.Option("--save-logits", help="Write float32 [B, T, vocab] here (.npy); 0 where absent.")
    ] = None,
) -> None:
    """Log-likelihood of a text or of token ids.

    A text is scored after the beginning-of-sentence token; of token ids the first in each row is not scored.

    Example: dsv32 score --model DIR --text-file book.txt --json
    """
    import numpy as np

    if (text_file is None) == (token_ids is None):
        raise UserError("--text-file, --token-ids: give one of the two")
    text = None if text_file is None else _read_text(text_file, "--text-file")
    ids = None if token_ids is None else _read_token_ids(token_ids)
    inputs = [text] if ids is None else ids
    with _replacing(save_logits, "--save-logits") as logits_file:
        m = _load(model, compute_dtype, no_act_quant, attention, index_topk, backend)
        out = None
        if logits_file is not None:
            # The file has the token file's own width, also where every row ends before it.
            width = ids.shape[1] if ids is not None else len(m.rows(inputs)[0])
            shape = (len(inputs), width, m.config.vocab_size)
            out = np.lib.format.open_memmap(logits_file, mode="w+", dtype=np.float32, shape=shape)
        result = m.score(inputs, out=out)
        if out is not None:
            out.flush()
    bits = None
    if text is not None:
        bits = -result.log_likelihood / math.log(2) / len(text.encode())
    summary = {"perplexity": result.perplexity, "bits_per_byte": bits, "tokens": result.tokens}
    summary["log_likelihood"] = result.log_likelihood
    if as_json:
        lengths = [len(row) - 1 for row in m.rows(inputs)]
        rows = [row[:length].tolist() for row, length in zip(result.log_likelihoods, lengths, strict=True)]
        _print_json(**summary, log_likelihoods=rows)
        return
    for name, value in summary.items():
        if value is not None:
            typer.echo(f"{name:<15} {value:.6g}" if isinstance(value, float) else f"{name:<15} {value}")


@app.command()
def info(
    model: Annotated[str | None, typer.Option("--model", help="A checkpoint.")] = None,
    config: Annotated[str | None, typer.Option("--config", help="671b | tiny | a config.json")] = None,
    memory: Annotated[bool, typer.Option("--memory", help="What fits on GPUs and on this machine.")] = False,
    as_json: Json = False,
) -> None:
    """Parameters, bytes by dtype and cache bytes per token; nothing is allocated.

    Example: dsv32 info --config 671b --memory
    """
    import convert
    from dsv32_jax import loading
    from dsv32_jax.config import PRESETS, ModelConfig
    from dsv32_jax.memory import (
        GPU_BYTES,
        USABLE,
        available_bytes,
        cache_bytes_per_token,
        human,
        parameter_counts,
        tokens_that_fit,
    )

    if (model is None) == (config is None):
        raise UserError("--model, --config: give one of the two")
    if model is not None:
        settings = ModelConfig.from_hf(loading.find(model))
    elif config in PRESETS:
        settings = PRESETS[config]
    elif config is not None and Path(config).exists():
        settings = ModelConfig.from_hf(Path(config))
    else:
        raise UserError(f"--config {config}: no such file, and no preset; presets are {', '.join(PRESETS)}")
    count, by_dtype = parameter_counts(convert.stored_parameters(settings))
    cache = cache_bytes_per_token(settings)
    total = sum(by_dtype.values())
    result: dict[str, Any] = {
        "parameters": count,
        "bytes": total,
        "bytes_by_dtype": by_dtype,
        "cache_bytes_per_token": cache,
        "max_position_embeddings": settings.max_position_embeddings,
    }
    if memory:
        free, place = available_bytes()
        places = {**GPU_BYTES, f"this machine ({place})": free}
        result["memory"] = {
            name: {
                "bytes": size,
                "needed_for_weights": math.ceil(total / (size * USABLE)),
                "cache_tokens": {form: tokens_that_fit(total, each, size) for form, each in cache.items()},
            }
            for name, size in places.items()
        }
    if as_json:
        _print_json(**result)
        return
    typer.echo(f"parameters              {count:,}")
    typer.echo(f"bytes                   {total:,} ({human(total)})")
    for dtype, size in sorted(by_dtype.items()):
        typer.echo(f"  {dtype:<21} {size:,} ({human(size)})")
    typer.echo("cache bytes per token")
    for form, size in cache.items():
        typer.echo(f"  {form:<28} {size:,} ({human(size * 131072)} for 131,072 tokens)")
    for name, place in result.get("memory", {}).items():
        typer.echo(f"{name}: {human(place['bytes'])}")
        for form, tokens in place["cache_tokens"].items():
            if tokens is None:
                typer.echo(f"  the weights do not fit: {place['needed_for_weights']} of these would hold them")
                break
            typer.echo(f"  {form:<28} weights and a cache of {tokens:,} tokens")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A checkpoint directory, of either layout.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The directory to write.")],
    to: Annotated[str, typer.Option("--to", help="orbax | hf")] = "orbax",
    dtype: Annotated[str | None, typer.Option("--dtype", help="bf16: dequantise FP8 weights.")] = None,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint between the Hugging Face layout and Orbax.

    An interrupted conversion goes on where it stopped when the command is given again.

    Example: dsv32 convert DeepSeek-V3.2-Exp converted
    """
    if to not in ("orbax", "hf"):
        raise UserError(f"--to {to}: must be orbax or hf")
    import convert as converter

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        converter.convert(source, target, to=to, dtype=dtype)
    if as_json:
        _print_json(source=str(source), target=str(target), to=to)
    else:
        typer.echo(f"wrote {target}")


@app.command()
def quantize(
    target: Annotated[Path, typer.Option("--out", help="The directory to write.")],
    scheme: Annotated[str, typer.Option("--scheme", help="fp8_block | int8 | int4 | mixed")],
    model: Model = "demo",
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="A UTF-8 text; int4 and int8 are rounded for what it shows.")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", help='With mixed: JSON, {"schemes": {path: scheme}}. Default: experts int4, rest int8.'),
    ] = None,
    to: Annotated[str, typer.Option("--to", help="hf | orbax")] = "hf",
    window_tokens: Annotated[int, typer.Option("--window-tokens", min=2, help="The text is read in pieces.")] = 1024,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Pieces, at most.")] = 32,
    ranges: Annotated[
        str | None,
        typer.Option("--ranges", help="Of integers: mse | percentile | min-max. Default: mse with --calibration."),
    ] = None,
    migration: Annotated[
        float | None,
        typer.Option(
            "--migrate", min=0, max=1, help="Move outliers of inputs into the weights, this strongly; for int8."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint with its linears in another scheme, as `load` and `--model` take it.

    Example: dsv32 quantize --model demo --scheme int4 --calibration text.txt --out demo-int4
    """
    from dsv32_jax.quant import SCHEMES

    if scheme not in (*SCHEMES, "mixed"):
        raise UserError(f"--scheme {scheme}: must be one of {', '.join(SCHEMES)}, mixed")
    if plan is not None and scheme != "mixed":
        raise UserError(f"--plan: goes with --scheme mixed, not {scheme}")
    if to not in ("hf", "orbax"):
        raise UserError(f"--to {to}: must be hf or orbax")
    if target.exists():
        raise UserError(f"--out {target}: exists; give a path that does not")
    if migration is not None and calibration is None:
        raise UserError("--migrate: needs a text to see outliers in; give --calibration too")
    text = None if calibration is None else _read_text(calibration, "--calibration")
    from convert.calibration import calibrate, windows_of
    from convert.migration import migrate
    from convert.quantization import check_ranges, mixed, quantize_checkpoint, uniform
    from dsv32_jax import loading
    from dsv32_jax.config import ModelConfig, read_json
    from dsv32_jax.model import abstract_model
    from dsv32_jax.params import named_parameters

    check_ranges(ranges)  # before a calibration of minutes
    source = loading.find(model)
    abstract = abstract_model(ModelConfig.from_hf(source))
    schemes = mixed(abstract) if scheme == "mixed" else uniform(abstract, scheme)
    if plan is not None:
        planned = read_json(plan).get("schemes")
        if not isinstance(planned, dict) or not all(isinstance(one, str) for one in planned.values()):
            raise UserError(f'--plan {plan}: must hold {{"schemes": {{path of a linear: scheme}}}}')
        schemes = planned
    provenance: dict[str, Any] = {"scheme": scheme, "source": model}
    provenance |= {} if ranges is None else {"ranges": ranges}
    statistics, changed = None, None
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        if text is not None:
            lm = loading.load(model)
            pieces = windows_of(lm, text, window_tokens, windows)
            statistics = calibrate(lm, pieces)
            digest = hashlib.sha256(text.encode()).hexdigest()
            provenance["calibration"] = {"sha256": digest, "windows": len(pieces), "tokens": len(pieces[0])}
            if migration is not None:
                migrated, statistics = migrate(lm.model, statistics, migration)
                changed = named_parameters(migrated)
                provenance["migration"] = migration
        how = {"to": to, "statistics": statistics, "ranges": ranges, "weights": changed, "provenance": provenance}
        quantize_checkpoint(source, target, schemes, **how)
    if as_json:
        _print_json(target=str(target), to=to, **provenance)
    else:
        typer.echo(f"wrote {target}")


@app.command()
def fidelity(
    first: Annotated[str, typer.Argument(metavar="A", help="The checkpoint that is held to be right.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The checkpoint that is judged.")],
    token_ids: TokenIds = None,
    attention: Attention = "sparse",
    index_topk: IndexTopk = None,
    backend: Backend = "auto",
    compute_dtype: ComputeDtype = None,
    no_act_quant: NoActQuant = False,
    as_json: Json = False,
) -> None:
    """What B changes against A: recall of the chosen tokens, attention mass kept, KL of the logits.

    Example: dsv32 fidelity original quantised --token-ids ids.npy
    """
    if token_ids is None:
        raise UserError("--token-ids: an .npy file of int32 [B, T] must be given")
    ids = _read_token_ids(token_ids)
    from dsv32_jax.fidelity import compare

    traces = []
    for name in (first, second):  # one after the other: both need not fit at once
        m = _load(name, compute_dtype, no_act_quant, attention, index_topk, backend)
        traces.append([m.trace(row) for row in ids])
        del m
    try:
        rows = [compare(a, b) for a, b in zip(*traces, strict=True)]
    except ValueError as error:
        raise UserError(str(error)) from error
    if as_json:
        _print_json(rows=rows)
        return
    for number, row in enumerate(rows):
        typer.echo(f"--- sequence {number}: {row['tokens']} tokens")
        for layer in row["layers"]:
            typer.echo("  ".join(f"{name} {value:.4g}" for name, value in layer.items()))
        typer.echo("  ".join(f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, float)))


@app.command()
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
        int | None, typer.Option("--max-step-tokens", help="Of one step of the model. Default: 256, with kernels 512.")
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
    backend: Backend = "auto",
    compute_dtype: ComputeDtype = None,
    no_act_quant: NoActQuant = False,
) -> None:
    """Answer OpenAI's completions and chat completions over HTTP, with Prometheus metrics at /metrics.

    --temperature and --top-p are of requests that do not say. The first signal drains, the second ends at once.

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
    from dsv32_jax.engine import Engine

    _check_sampling(temperature, top_p, 0)
    settings = Settings(
        name=name or (model if model.count("/") == 1 and not Path(model).exists() else Path(model).resolve().name),
        api_key=os.environ.get("DSV32_API_KEY") if api_key is None else api_key,
        max_queue=max_queue,
        max_body_bytes=max_body_bytes,
        deadline=deadline,
        drain_seconds=drain_seconds,
        warmup=not no_warmup,
        metrics_log=metrics_log,
        metrics_interval=metrics_interval,
    )
    if metrics_log is not None:
        check_writable(metrics_log)
    place = bind(host, port)
    if settings.api_key is None and not place.getsockname()[0].startswith(("127.", "::1")):
        typer.echo(f"warning: --host {host}: others can reach it, and no key is asked for; see --api-key", err=True)
    m = _load(model, compute_dtype, no_act_quant, attention, index_topk, backend)
    defaults = _sampling(m, temperature, top_p, 0, False)
    settings = dataclasses.replace(settings, temperature=defaults["temperature"], top_p=defaults["top_p"])
    engine = Engine(
        m,
        cache_tokens=cache_tokens,
        speculate=speculate,
        memory_fraction=memory_fraction,
        max_tokens=max_step_tokens,
        max_sequences=max_sequences,
    )
    sys.exit(run(engine, settings, place, say=typer.echo))


@app.command()
def bench(
    ops: Annotated[list[str] | None, typer.Argument(metavar="[OP]...", help="Default: all; see --list.")] = None,
    shape: Annotated[str | None, typer.Option("--shape", help="One shape of theirs; see --list.")] = None,
    backend: Backend = "auto",
    peers: Annotated[
        list[Path] | None, typer.Option("--peers", help="Times of other libraries on this machine; repeatable.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Results. Default: experiments/results/kernels.json.")
    ] = None,
    repetitions: Annotated[int, typer.Option("--repetitions", min=1, help="Of one call, at most.")] = 20,
    budget_seconds: Annotated[
        float | None, typer.Option("--budget-seconds", help="Begin no further shape after this time.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only shapes with a target, and no reference.")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="Small shapes on any device, written only to --out.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Print ops and shapes, and measure nothing.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Write the results' tables into docs/kernels, and measure nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Time kernels against their references, the roofline and other libraries. Exit code 1: a shape failed.

    Example: dsv32 bench top_k --peers peers.json
    """
    from experiments.bench import report as reports
    from experiments.bench import run

    settings = run.Settings(
        ops=ops or (),
        shape=shape,
        backend=backend,
        peers=peers or (),
        out=out or (None if tiny else reports.RESULT),
        repetitions=repetitions,
        budget_seconds=budget_seconds,
        quick=quick,
        tiny=tiny,
    )
    if list_:
        for each in run.chosen_shapes(settings):
            typer.echo(f"{each.op:<15} {each.name:<22} {' '.join(f'{k}={v}' for k, v in each.dims().items())}")
        return
    if report:
        for path in reports.write_pages():
            typer.echo(f"wrote {path}")
        return
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        content, failed = run.measure(settings, say=lambda line: print(line, flush=True))
    if as_json:
        _print_json(**content)
    else:
        reports.print_table(content)
    if failed:
        print(f"shapes that failed: {failed}", file=sys.stderr)
        sys.exit(1)


def main(argv: Sequence[str] | None = None) -> None:
    """The console script. Always leaves through SystemExit."""
    try:
        app(args=argv, prog_name="dsv32")
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or 'file'}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def _load(
    model: str, compute_dtype: str | None, no_act_quant: bool, attention: str, index_topk: int | None, backend: str
) -> "LanguageModel":
    from dsv32_jax.loading import load

    return load(
        model,
        compute_dtype=compute_dtype,
        act_quant=False if no_act_quant else None,
        attention=attention,
        index_topk=index_topk,
        backend=backend,
    )


def _check_sampling(temperature: float | None, top_p: float | None, seed: int) -> None:
    """Wrong values show before a model is loaded, which can take minutes."""
    from dsv32_jax.language_model import check_sampling

    check_sampling(0.0 if temperature is None else temperature, 1.0 if top_p is None else top_p, seed)


def _sampling(
    m: "LanguageModel", temperature: float | None, top_p: float | None, seed: int, ignore_eos: bool
) -> dict[str, Any]:
    """Flags first, then generation_config.json (greedy unless it says `do_sample`), then greedy."""
    defaults = {"temperature": 0.0}
    if m.generation_config.get("do_sample"):
        defaults = {"temperature": 1.0, **m.generation_config}
    return {
        "temperature": float(defaults["temperature"]) if temperature is None else temperature,
        "top_p": float(defaults.get("top_p", 1.0)) if top_p is None else top_p,
        "seed": seed,
        "ignore_eos": ignore_eos,
    }


def _tokenizer(m: "LanguageModel") -> Any:
    if m.tokenizer is None:
        raise UserError("--model: the checkpoint has no tokenizer.json, which a chat needs")
    return m.tokenizer


def _chat(system: str | None, user: str | None = None) -> list[dict[str, str]]:
    turns = {"system": system, "user": user}
    return [{"role": role, "content": text} for role, text in turns.items() if text is not None]


def _lines(prompt: str) -> Iterator[str]:
    """Messages from the terminal or a pipe; blank lines are passed over."""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError("standard input: not UTF-8 text") from error
        if line == "/exit":
            return
        if line:
            yield line


def _prompts(prompt: list[str] | None, files: list[Path] | None, token_ids: Path | None) -> "list[str] | np.ndarray":
    texts = [*(prompt or []), *(_read_text(path, "--prompt-file") for path in files or [])]
    if token_ids is not None and texts:
        raise UserError("--token-ids: cannot be combined with --prompt or --prompt-file")
    if token_ids is not None:
        return _read_token_ids(token_ids)
    if not texts:
        raise UserError("--prompt, --prompt-file, --token-ids: give one of them")
    if "" in texts:
        raise UserError(f"prompt {texts.index('')}: empty; it must have at least one character")
    return texts


def _read_text(path: Path, flag: str) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path}: not UTF-8 text (byte {error.start})") from error
    if not text:
        raise UserError(f"{flag} {path}: empty; it must have at least one character")
    return text


def _read_token_ids(path: Path) -> "np.ndarray":
    import numpy as np

    try:
        ids = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UserError(f"--token-ids {path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise UserError(f"--token-ids {path}: not an .npy file of int32 [B, T]") from error
    if not isinstance(ids, np.ndarray) or ids.dtype != np.int32 or ids.ndim != 2:
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, np.ndarray) else "an .npz archive"
        raise UserError(f"--token-ids {path}: is {found}; must be int32 [B, T]")
    return ids


@contextlib.contextmanager
def _replacing(path: Path | None, flag: str) -> Iterator[Path | None]:
    """A file beside `path` to write; it becomes `path` when all went well and is removed otherwise.

    It is made at once, so that a wrong target shows before the model runs.
    """
    if path is None:
        yield None
        return
    with whole_file(path) as temporary:
        try:
            if path.is_dir():
                raise IsADirectoryError(None, "it is a directory")
            temporary.touch()
        except OSError as error:
            raise UserError(f"{flag} {path}: cannot be written: {error.strerror}") from error
        yield temporary


def _save(path: Path, tokens: "Sequence[Sequence[int]] | np.ndarray") -> None:
    import numpy as np

    with path.open("wb") as file:  # np.save would add .npy to a name without it
        np.save(file, np.asarray(tokens, np.int32))


def _print_json(**fields: Any) -> None:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(name): plain(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no infinity

    typer.echo(json.dumps(plain(fields), ensure_ascii=False))


if __name__ == "__main__":
    main()
