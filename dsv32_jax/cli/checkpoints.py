"""Verbs on checkpoints: `info`, `convert`, `quantize`."""

import contextlib
import dataclasses
import hashlib
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv32_jax.cli.inputs import print_json, read_text
from dsv32_jax.cli.options import Json, Model
from dsv32_jax.errors import UserError


def info(
    model: Annotated[
        str | None, typer.Option("--model", help='A checkpoint directory, "org/name" on the hub, or "demo" (default).')
    ] = None,
    config: Annotated[str | None, typer.Option("--config", help="671b | tiny | a config.json, instead.")] = None,
    memory: Annotated[bool, typer.Option("--memory", help="What fits on GPUs and on this machine.")] = False,
    as_json: Json = False,
) -> None:
    """Parameters, schemes, bytes by dtype and cache bytes per token; nothing is allocated.

    Of a checkpoint it tells what the files hold, and names where config.json or the index says otherwise.

    Example: dsv32 info --config 671b --memory
    """
    from dsv32_jax import convert
    from dsv32_jax.config import PRESETS, ModelConfig
    from dsv32_jax.convert.contents import contents
    from dsv32_jax.generate import loading
    from dsv32_jax.generate.memory import cache_bytes_per_token, parameter_counts

    if model is not None and config is not None:
        raise UserError("--model, --config: give one of the two")
    if config is None:
        directory = loading.find(model or "demo")
        settings = ModelConfig.from_hf(directory)
        stored = dataclasses.asdict(contents(directory, settings))
    elif config in PRESETS or Path(config).exists():
        settings = PRESETS[config] if config in PRESETS else ModelConfig.from_hf(Path(config))
        count, by_dtype = parameter_counts(convert.stored_parameters(settings))
        stored = {"parameters": count, "bytes_by_dtype": by_dtype}
    else:
        raise UserError(f"--config {config}: no such file, and no preset; presets are {', '.join(PRESETS)}")
    result: dict[str, Any] = {
        **stored,
        "bytes": sum(stored["bytes_by_dtype"].values()),
        "cache_bytes_per_token": cache_bytes_per_token(settings),
        "max_position_embeddings": settings.max_position_embeddings,
    }
    if memory:
        result["memory"] = what_fits(result["bytes"], result["cache_bytes_per_token"])
    if as_json:
        print_json(**result)
    else:
        print_info(result)


def what_fits(total: int, cache: dict[str, int]) -> dict[str, Any]:
    """For GPUs and this machine: their bytes, how many of them `total` bytes of weights need, and the tokens of a cache
    beside the weights.
    """
    from dsv32_jax.generate.memory import GPU_BYTES, USABLE, available_bytes, tokens_that_fit

    free, memory = available_bytes()
    return {
        name: {
            "bytes": size,
            "needed_for_weights": math.ceil(total / (size * USABLE)),
            "cache_tokens": {form: tokens_that_fit(total, token_bytes, size) for form, token_bytes in cache.items()},
        }
        for name, size in {**GPU_BYTES, f"this machine ({memory})": free}.items()
    }


def print_info(result: dict[str, Any]) -> None:
    """Prints the result of `info` as lines."""
    from dsv32_jax.common.units import human

    def sizes(by_name: dict[str, int]) -> None:
        for name, size in sorted(by_name.items()):
            typer.echo(f"  {name:<21} {size:,} ({human(size)})")

    if "layout" in result:
        typer.echo(f"layout                  {result['layout']}")
    typer.echo(f"parameters              {result['parameters']:,}")
    for kind, counts in sorted(result.get("weights", {}).items()):
        typer.echo(f"  {kind:<21} {counts['parameters']:,} in {counts['tensors']:,} tensors ({human(counts['bytes'])})")
    typer.echo(f"bytes                   {result['bytes']:,} ({human(result['bytes'])})")
    sizes(result["bytes_by_dtype"])
    typer.echo("cache bytes per token")
    for form, size in result["cache_bytes_per_token"].items():
        typer.echo(f"  {form:<28} {size:,} ({human(size * 131072)} for 131,072 tokens)")
    for name, device in result.get("memory", {}).items():
        typer.echo(f"{name}: {human(device['bytes'])}")
        for form, tokens in device["cache_tokens"].items():
            if tokens is None:
                typer.echo(f"  the weights do not fit: {device['needed_for_weights']} of these would hold them")
                break
            typer.echo(f"  {form:<28} weights and a cache of {tokens:,} tokens")
    for disagreement in result.get("disagreements", []):
        typer.echo(f"disagreement: {disagreement}")


def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help='A checkpoint directory of either layout, "org/name" on the hub, "demo".'),
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The directory to write; it must not exist.")],
    to: Annotated[str | None, typer.Option("--to", help="orbax | hf. Default: the one that SRC is not in.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="bf16: dequantise the weights.")] = None,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint from the Hugging Face layout to Orbax, or from Orbax to the Hugging Face layout.

    An interrupted conversion goes on where it stopped when the command is given again.

    Example: dsv32 convert DeepSeek-V3.2-Exp converted
    """
    if to not in ("orbax", "hf", None):
        raise UserError(f"--to {to}: must be orbax or hf")
    from dsv32_jax import convert as converter
    from dsv32_jax.generate import loading

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        to = converter.convert(loading.find(source), target, to=to, dtype=dtype)
    if as_json:
        print_json(source=source, target=str(target), to=to)
    else:
        typer.echo(f"wrote {target} ({to})")


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
    from pallas_kernels.matmul import SCHEMES

    if scheme not in (*SCHEMES, "mixed"):
        raise UserError(f"--scheme {scheme}: must be one of {', '.join(SCHEMES)}, mixed")
    if plan is not None and scheme != "mixed":
        raise UserError(f"--plan: goes with --scheme mixed, not {scheme}")
    if to not in ("hf", "orbax"):
        raise UserError(f"--to {to}: must be hf or orbax")
    if migration is not None and calibration is None:
        raise UserError("--migrate: needs a text to see outliers in; give --calibration too")
    text = None if calibration is None else read_text(calibration, "--calibration")
    from dsv32_jax.common.reading import read_json
    from dsv32_jax.config import ModelConfig
    from dsv32_jax.convert.calibration import calibrate, windows_of
    from dsv32_jax.convert.migration import migrate
    from dsv32_jax.convert.quantization import check_ranges, mixed, quantize_checkpoint, uniform
    from dsv32_jax.convert.unfinished import new_directory
    from dsv32_jax.generate import loading
    from dsv32_jax.model.model import abstract_model
    from dsv32_jax.model.params import named_parameters

    check_ranges(ranges)
    source = loading.find(model)
    abstract = abstract_model(ModelConfig.from_hf(source))
    schemes = mixed(abstract) if scheme == "mixed" else uniform(abstract, scheme)
    if plan is not None:
        planned = read_json(plan).get("schemes")
        if not isinstance(planned, dict) or not all(isinstance(name, str) for name in planned.values()):
            raise UserError(f'--plan {plan}: must hold {{"schemes": {{path of a linear: scheme}}}}')
        schemes = planned
    provenance: dict[str, Any] = {"scheme": scheme, "source": model}
    provenance |= {} if ranges is None else {"ranges": ranges}
    statistics = None
    migrated_weights = None
    quiet = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    with quiet, new_directory(target) as locked:  # before a calibration too: no other process writes there meanwhile
        if text is not None:
            lm = loading.load(model)
            pieces = windows_of(lm, text, window_tokens, windows)
            statistics = calibrate(lm, pieces)
            digest = hashlib.sha256(text.encode()).hexdigest()
            provenance["calibration"] = {"sha256": digest, "windows": len(pieces), "tokens": len(pieces[0])}
            if migration is not None:
                migrated, statistics = migrate(lm.model, statistics, migration)
                migrated_weights = named_parameters(migrated)
                provenance["migration"] = migration
        quantize_checkpoint(
            source,
            locked,
            schemes,
            to=to,
            statistics=statistics,
            ranges=ranges,
            weights=migrated_weights,
            provenance=provenance,
        )
    if as_json:
        print_json(target=str(target), to=to, **provenance)
    else:
        typer.echo(f"wrote {target}")
