"""The measurement: shapes one after another, and a file that is whole after each."""

import dataclasses
import functools
import gc
import itertools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from dsv32_jax.common.reading import decoded, parsed_json
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.bench import attention, cases, dispatch, matmuls, moe_layer, roofline
from dsv32_jax.experiments.bench import timer as timing
from dsv32_jax.experiments.bench.peers import Peers
from dsv32_jax.experiments.bench.report import three
from dsv32_jax.experiments.bench.shapes import SHAPES, TINY, Attention, MoELayer
from dsv32_jax.experiments.bench.targets import target_of
from dsv32_jax.experiments.command_line import writable
from dsv32_jax.experiments.results import environment, write_json
from pallas_kernels.backend import BACKENDS, on_hopper
from pallas_kernels.matmul.shapes import GroupedMatmul, Matmul
from pallas_kernels.moe_dispatch.shapes import MoEDispatch
from pallas_kernels.named_shape import Shape
from pallas_kernels.quantize.shapes import Quantize

REST_SECONDS = 0.25
"""Between measurements, so that the power limit does not carry over from one to the next."""
AHEAD = 16
"""Shapes whose calls are compiled together, before the first of them is measured."""
MODULES: dict[type[Shape], Any] = {
    Attention: attention,
    GroupedMatmul: matmuls,
    Matmul: matmuls,
    Quantize: dispatch,
    MoEDispatch: dispatch,
    MoELayer: moe_layer,
}
"""Where the `build`, `build_reference` and `config` of a kind of shape are, if not in `cases`."""
Content = dict[str, Any]


def module_of(shape: Shape) -> Any:
    """The module with this shape's `build`, `build_reference` and `config`."""
    return MODULES.get(type(shape), cases)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured and how.

    Attributes:
      ops: names; all if empty.
      shape: a shape's name; all of the ops' if None.
      backend: of the ops.
      peers: peers' files.
      out: the results' file, if one is written; rows of other ops, shapes and devices that it has are kept.
      repetitions: at most, of one call.
      budget_seconds: after this time no further shape is begun.
      quick: only shapes with a target, and no reference.
      tiny: small shapes, for tests.
    """

    ops: Sequence[str] = ()
    shape: str | None = None
    backend: str = "auto"
    peers: Sequence[Path] = ()
    out: Path | None = None
    repetitions: int = 20
    budget_seconds: float | None = None
    quick: bool = False
    tiny: bool = False


def chosen_shapes(settings: Settings) -> list[Shape]:
    """The shapes that these settings name.

    Raises:
      UserError: no such op or shape.
    """
    grid = TINY if settings.tiny else SHAPES
    unknown = [op for op in settings.ops if op not in grid]
    if unknown:
        raise UserError(f"op {unknown[0]}: unknown; ops are {', '.join(grid)}")
    found = [shape for op in settings.ops or grid for shape in grid[op]]
    if settings.shape is not None:
        named = [shape for shape in found if shape.name == settings.shape]
        if not named:
            raise UserError(f"--shape {settings.shape}: unknown; shapes are {', '.join(shape.name for shape in found)}")
        found = named
    return [shape for shape in found if target_of(shape) is not None] if settings.quick else found


def measure(settings: Settings, say: Callable[[str], None] = print) -> tuple[Content, int]:
    """Measures the chosen shapes.

    Args:
      settings: what and how.
      say: takes a line of progress.

    Returns:
      The content of the results' file, and how many shapes failed.

    Raises:
      UserError: wrong settings, or no GPU and not `tiny`.
    """
    begun = time.monotonic()
    shapes = chosen_shapes(settings)
    if settings.out is not None:
        writable(settings.out)
    if settings.backend not in BACKENDS:
        raise UserError(f"--backend {settings.backend}: unknown; choose one of {', '.join(BACKENDS)}")
    if jax.default_backend() != "gpu" and not settings.tiny:
        raise UserError("bench: needs a GPU; --tiny runs small shapes on any device")
    machine = environment()
    peers = Peers.read(settings.peers, machine["device"])
    for file in peers.files:
        if not file["used"]:
            conditions = f"measured on {file['device']}, L2 emptied by: {file['flush']}"
            say(f"{file['name']}: {conditions}; this is {machine['device']}, {timing.FLUSH}; not used")
    timer, trouble = timing.device_timer()
    say(f"timer: {timer.name}" + (f" ({trouble})" if trouble else ""))
    ceilings = roofline.measure(timer, peers, settings.tiny)
    run = {
        **machine,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "tiny": settings.tiny,
        "timer": timer.name,
        "timer_trouble": trouble,
        "peers": peers.files,
        "roofline": ceilings,
    }
    for line in describe(ceilings):
        say(line)
    content = open_content(settings.out, run)
    failed, left = 0, []

    def late() -> bool:
        return settings.budget_seconds is not None and time.monotonic() - begun > settings.budget_seconds

    for batch in itertools.batched(shapes, AHEAD):
        ready = [{} for _ in batch] if late() else compile_ahead(batch, settings.backend)
        for shape, programs in zip(batch, ready, strict=True):
            if late():
                left.append(f"{shape.op} {shape.name}")
                continue
            row = {**one(shape, settings, timer, peers, ceilings, programs), "run": run["time"]}
            failed += "error" in row
            place(content, row)
            if settings.out is not None:
                write_json(settings.out, content)
            say(line_of(row))
            time.sleep(0 if settings.tiny else REST_SECONDS)
    if left:
        say(f"not begun within {settings.budget_seconds:g} s: {', '.join(left)}")
    return content, failed


def measured_backend(backend: str, shape: Shape) -> str:
    """The backend of a shape's measured call, for the `backend` of the settings.

    "auto" is the kernel wherever kernels run: a shape that should have one and that it does not take fails and says so.
    """
    if backend != "auto":
        return backend
    return "mosaic_gpu" if shape.kernel and on_hopper() else "reference"


def compile_ahead(shapes: Sequence[Shape], backend: str) -> list[cases.Programs]:
    """The compiled calls of each shape, several shapes at once: `build` run on shapes alone makes no inputs.

    References are not among them: XLA tries out algorithms for their products on the device, each with its operands.
    """

    def compile_one(shape: Shape) -> cases.Programs:
        programs: cases.Programs = {}
        build = functools.partial(module_of(shape).build, shape, measured_backend(backend, shape))
        with cases.compiled(programs):
            try:
                jax.eval_shape(lambda: (build(), 0)[1])
            except Exception:  # the measurement meets it again, and records it
                programs.clear()
        return programs

    with ThreadPoolExecutor(min(len(shapes), os.cpu_count() or 1)) as pool:
        return list(pool.map(compile_one, shapes))


def one(
    shape: Shape,
    settings: Settings,
    timer: timing.Timer,
    peers: Peers,
    ceilings: dict[str, Any],
    programs: cases.Programs,
) -> dict[str, Any]:
    """The row of one shape, by its compiled `programs`. Whatever stops it, out of memory too, is in `error`."""
    row: dict[str, Any] = {"op": shape.op, "shape": shape.name, "dims": shape.dims()}
    if (target := target_of(shape)) is not None:
        row["target"] = dataclasses.asdict(target)
    module = module_of(shape)
    build = functools.partial(module.build, shape, measured_backend(settings.backend, shape))
    with cases.compiled(programs):
        row |= timed(build, timer, settings.repetitions)
    if "error" in row:
        return row
    median = row["seconds"]["median"]
    operations = sum(row["work"].values())
    row["tflops"] = operations / median / 1e12 if operations else None
    row["gbytes_per_second"] = row["bytes"] / median / 1e9
    bound = roofline.bound(row["work"], row["bytes"], ceilings["ceilings"])
    row["roofline"] = None if bound is None else {"bound": bound[1], "seconds": bound[0], "fraction": bound[0] / median}
    row["config"] = module.config(shape) if row["backend"] == "mosaic_gpu" else None
    row["peer"] = peers.join(shape)
    if row["peer"] is not None:
        row["peer"] |= peers.ratio(row["peer"], median, ceilings["empty_call_seconds"])
    if not settings.quick:
        row["reference"] = reference(functools.partial(module.build_reference, shape), timer, settings, shape, median)
    return row


def reference(
    build: Callable[[], cases.Case], timer: timing.Timer, settings: Settings, shape: Shape, median: float
) -> dict[str, Any]:
    """What plain JAX takes for the same; scaled by tokens where it ran on fewer."""
    found = timed(build, timer, settings.repetitions)
    if "error" in found:
        return {"error": found["error"]}
    tokens: int = getattr(shape, "tokens", found["tokens"])
    own = found["seconds"]["median"]
    scaled = own * tokens / found["tokens"]
    return {
        "name": found["name"],
        "measured_tokens": found["tokens"],
        "measured_seconds": own,
        "seconds_scaled_to_shape": scaled,
        "ratio": scaled / median,
        "memory": found["memory"],
    }


def timed(build: Callable[[], cases.Case], timer: timing.Timer, repetitions: int) -> dict[str, Any]:
    """A case built, run and forgotten: its numbers, or its error."""

    def numbers() -> dict[str, Any]:
        case = build()
        jax.block_until_ready(case.run())
        times = timing.seconds(timer, case.run, repetitions)
        fields = {name: value for name, value in vars(case).items() if name != "run"}
        return {**fields, "seconds": timing.summary(times)}

    try:
        return numbers()
    except Exception as error:  # recorded; the other shapes are still measured
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
    finally:
        gc.collect()  # the case's arrays, before the next shape's are made


# ---- the file --------------------------------------------------------------------------------------------------


def open_content(out: Path | None, run: dict[str, Any]) -> Content:
    """The file's content with this run added, or a new one."""
    content: Content = {"runs": [], "rows": []}
    if out is not None and out.exists():
        try:
            content = parsed_json(decoded(out.read_bytes()))
            if not (isinstance(content["runs"], list) and isinstance(content["rows"], list)):
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--out {out}: is no results' file of bench; give another name") from error
    content["runs"].append(run)
    return content


def place(content: Content, row: dict[str, Any]) -> None:
    """Puts a row in the place of an older one of the same op, shape and device; forgets runs without rows."""
    device = {run["time"]: run["device"] for run in content["runs"]}

    def same(other: dict[str, Any]) -> bool:
        return all(other[name] == row[name] for name in ("op", "shape")) and device[other["run"]] == device[row["run"]]

    grid = [(op, shape.name) for shapes in (SHAPES, TINY) for op in shapes for shape in shapes[op]]
    rows = [other for other in content["rows"] if not same(other)] + [row]
    content["rows"] = sorted(rows, key=lambda other: (device[other["run"]], grid.index((other["op"], other["shape"]))))
    used = {other["run"] for other in rows}
    content["runs"] = [run for run in content["runs"] if run["time"] in used]


# ---- lines -----------------------------------------------------------------------------------------------------


def describe(ceilings: dict[str, Any]) -> list[str]:
    """Lines about the roofline and the timer."""
    copy, bf16, fp8 = (ceilings["ceilings"][name] for name in roofline.CEILINGS)

    def shown(rate: float | None) -> str:
        return "-" if rate is None else three(rate / 1e12)

    lines = [f"copy {shown(copy)} TB/s, bf16 {shown(bf16)} TFLOP/s, FP8 {shown(fp8)} TFLOP/s"]
    lines += [
        f"timer check, {name}: {entry['seconds'] * 1e6:.1f} us, PyTorch's {entry['torch'] * 1e6:.1f} us: "
        f"{entry['ratio']:.3f}"
        for name, entry in ceilings["timer_check"].items()
    ]
    return [*lines, f"timer, of nothing: {ceilings['empty_call_seconds'] * 1e6:.1f} us"]


def line_of(row: dict[str, Any]) -> str:
    """A row on one line, as progress."""
    head = f"{row['op']:<15} {row['shape']:<22}"
    if "error" in row:
        return f"{head} failed: {row['error'][:160]}"
    line = f"{head} {row['seconds']['median'] * 1e6:>10.1f} us"
    for name in ("peer", "reference"):
        if row.get(name) and "ratio" in row[name]:
            line += f"  {name} x{row[name]['ratio']:.2f}"
    return line if row["backend"] == "mosaic_gpu" else f"{line}  ({row['backend']})"
