"""Verbs on checkpoints: `info`, `convert`, `quantize`."""

import contextlib
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
    config: Annotated[str | None, typer.Option("--config", help="671b | tiny | a config.json")] = None,
    memory: Annotated[bool, typer.Option("--memory", help="What fits on GPUs and on this machine.")] = False,
    as_json: Json = False,
) -> None:
    """Parameters, bytes by dtype and cache bytes per token; nothing is allocated.

    Example: dsv32 info --config 671b --memory
    """
    from dsv32_jax import convert, loading
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

    if model is not None and config is not None:
        raise UserError("--model, --config: give one of the two")
    if config is None:
        settings = ModelConfig.from_hf(loading.find(model or "demo"))
    elif config in PRESETS:
        settings = PRESETS[config]
    elif Path(config).exists():
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
        print_json(**result)
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


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help='A checkpoint directory, of either layout, or "demo".')],
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
    from dsv32_jax import convert as converter
    from dsv32_jax import loading

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        converter.convert(loading.find(source), target, to=to, dtype=dtype)
    if as_json:
        print_json(source=str(source), target=str(target), to=to)
    else:
        typer.echo(f"wrote {target}")


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
    text = None if calibration is None else read_text(calibration, "--calibration")
    from dsv32_jax import loading
    from dsv32_jax.config import ModelConfig, read_json
    from dsv32_jax.convert.calibration import calibrate, windows_of
    from dsv32_jax.convert.migration import migrate
    from dsv32_jax.convert.quantization import check_ranges, mixed, quantize_checkpoint, uniform
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
        print_json(target=str(target), to=to, **provenance)
    else:
        typer.echo(f"wrote {target}")
