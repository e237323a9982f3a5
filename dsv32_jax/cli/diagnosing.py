"""`dsv32 diagnose`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dsv32_jax.cli.inputs import name_of, print_json, say
from dsv32_jax.cli.options import Backends, CheckFlag, Json, PartFlag
from dsv32_jax.cli.workbench import ModelOrRandom, Out, SetFlag, check_writable
from dsv32_jax.errors import UserError


def diagnose(
    model: ModelOrRandom = "demo",
    context: Annotated[
        str, typer.Option("--context", metavar="N,...", help="Tokens of a sequence, for instance 1k,4k,32k.")
    ] = "1k",
    batch: Annotated[str, typer.Option("--batch", metavar="N,...", help="Sequences of a decode step.")] = "1,32",
    phase: Annotated[str, typer.Option("--phase", help="decode | prefill | both")] = "both",
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            min=1,
            help="Of a prompt, which a prefill step reads, its last. Default: 512, on a GPU 2048.",
        ),
    ] = None,
    sets: SetFlag = None,
    part: PartFlag = None,
    backend: Backends = None,
    check: CheckFlag = False,
    out: Out = None,
    figure: Annotated[
        Path | None, typer.Option("--figure", help="Draw the parts into this PNG (needs matplotlib).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show where the time and the memory of a step go, part by part, beside what the device could do.

    A decode step continues --batch sequences by one token each; a prefill step reads the last --tokens of one prompt.
    Weights are the model's, keys in the cache random.

    bound: the least time that the part's bytes and operations take at the rates measured in the same run; reached: the
    bound over the part's time. "nothing runs": the device waits for the host. "within graphs", on a GPU: what the parts
    take more (or less, below 0) where CUDA graphs start their kernels, as a normal step does; a profile shows parts
    only without graphs. The shares are those of the normal step under the profiler, which on a CPU takes some time for
    each operation: parts with many small ones look longer than they are.

    Example: dsv32 diagnose --model demo --context 1k,4k --batch 1,32 --figure step.png
    """
    from dsv32_jax.experiments.workbench import diagnose as workbench
    from dsv32_jax.experiments.workbench.diagnose_report import check_figure, draw, lines_of
    from dsv32_jax.experiments.workbench.models import model_named
    from dsv32_jax.experiments.workbench.settings import Setting

    shapes = _shapes(phase, _sizes(context, "--context"), _sizes(batch, "--batch"), tokens)
    if figure is not None:
        check_figure(figure)
    setting = Setting.of(name_of(model), sets or (), part or (), backend or ())
    check_writable(out)
    m = setting.apply(model_named(model, mtp=False))
    if check:
        m = m.with_parts(check=True)
    content = workbench.diagnose(m, shapes, name=name_of(model), out=out, say=say)
    if figure is not None and not all("error" in row for row in content["rows"]):
        draw(content, figure)
    if as_json:
        print_json(**content)
        return
    for row in content["rows"]:
        typer.echo("\n".join([*lines_of(row), ""]))
    if all("error" in row for row in content["rows"]):
        raise UserError("--context, --batch: the device has no memory for any of these steps; give smaller ones")


def _sizes(text: str, flag: str) -> list[int]:
    """The numbers of "1k,4096": each at least 1; k is 1024."""
    sizes = []
    for word in text.split(","):
        number, kilo = word.strip().removesuffix("k"), word.strip().endswith("k")
        if not (number.isascii() and number.isdigit()) or int(number) < 1:
            raise UserError(f"{flag} {text}: {word!r} is no number; give some like 1,32 or 1k,4k, with k for 1024")
        sizes.append(int(number) * (1024 if kilo else 1))
    return sizes


def _shapes(phase: str, contexts: list[int], batches: list[int], tokens: int | None) -> list[Any]:
    """The `StepShape`s that the flags ask for."""
    import jax

    from dsv32_jax.experiments.workbench.steps import PHASES, StepShape
    from dsv32_jax.generate.batching import LARGEST_CHUNK, LARGEST_CHUNK_FOR_KERNELS

    tokens = tokens or (LARGEST_CHUNK_FOR_KERNELS if jax.default_backend() == "gpu" else LARGEST_CHUNK)

    if phase not in (*PHASES, "both"):
        raise UserError(f"--phase {phase!r} is unknown; it is one of {', '.join(PHASES)}, both")
    shapes = []
    if phase != "prefill":
        shapes += [StepShape(sequences=count, context=context) for context in contexts for count in batches]
    if phase != "decode":
        shapes += [StepShape(phase="prefill", context=context, tokens=min(tokens, context)) for context in contexts]
    return shapes
