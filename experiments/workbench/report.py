"""Writes what was measured into the pages: `python -m experiments.workbench.report`.

README's table has a row for each operator of the model, from the results of several commands; `docs/workbench.md` has
the tables of those that ran end to end.
"""

from pathlib import Path
from typing import Any

from dsv32_jax.common.units import human
from dsv32_jax.experiments import command_line
from dsv32_jax.experiments.command_line import writable
from dsv32_jax.experiments.pages import between, table
from dsv32_jax.experiments.results import read_result
from dsv32_jax.experiments.workbench import before_after

ROOT = Path(__file__).resolve().parents[2]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "workbench.md"


def operators() -> str:
    """README's table: baseline, speed, memory and quality of each operator, losses beside gains."""
    head = ["operator", "before → after", "speed", "memory", "quality"]
    rows = [attention(), routing(), cache(), quantisation(), access()]
    devices = sorted({device(name) for name in ("ablate_full_width", "kernels")})
    note = (
        f"Measured at full width on {' and '.join(devices)} (which one, says each result in `experiments/results`); "
        "quality on the demo model's held-out text. Below 1x is a loss."
    )
    return f"{table(head, rows)}\n\n{note}"


def device(name: str) -> str:
    """The device of a result."""
    result = read_result(name)
    return result["device"] if "device" in result else result["runs"][-1]["device"]


def step_row(name: str) -> dict[str, Any]:
    """A row of the ablation at full width, by the end of its name."""
    return next(row for row in read_result("ablate_full_width")["rows"] if row["name"].endswith(name))


def times(seconds: float, other: float) -> str:
    """How many times as fast the second is."""
    return f"{seconds / other:.2f}x"


def attention() -> list[str]:
    """Sparse attention beside dense: one layer against cuDNN's, and the workspace of a prompt's step."""
    layers = {row["shape"]: row for row in read_result("kernels")["rows"] if row["op"] == "attention"}
    speeds = [
        f"{context // 1024}k {layers[f'prefill-{context}']['reference']['ratio']:.2f}x"
        for context in (2048, 8192, 32768, 131072)
    ]
    masked, sparse = (step_row(name)["memory"]["prompt_workspace"] for name in ("baseline", "dense flash -> sparse"))
    perplexity = read_result("demo_model")["perplexity"]
    dense, chosen = (perplexity[name]["perplexity"] for name in ("dense", "indexer"))
    return [
        "sparse attention",
        "dense (cuDNN) → indexer, top-k, sparse MLA; one layer, a prompt",
        ", ".join(speeds),
        f"workspace of a step {human(masked)} (masked) → {human(sparse)}",
        f"perplexity {dense:.2f} → {chosen:.2f}",
    ]


def routing() -> list[str]:
    """The experts' products behind one routing plan, beside a loop over experts."""
    loop, ours = step_row("dense flash -> sparse"), step_row("one plan -> ours")
    apart, together = step_row("grouped, a plan each"), step_row("grouped, one plan")
    speeds = [f"{phase} {times(*medians(phase, loop, ours))}" for phase in ("decode", "prompt")]
    plans = [f"{phase} {times(*medians(phase, apart, together))}" for phase in ("decode", "prompt")]
    workspaces = (row["memory"]["decode_workspace"] for row in (loop, ours))
    return [
        "routing and experts",
        "a loop over experts → one plan, grouped kernels; a whole step",
        f"{', '.join(speeds)} (of it one plan instead of three: {', '.join(plans)})",
        " → ".join(human(size) for size in workspaces),
        "the same experts",
    ]


def medians(phase: str, *rows: dict[str, Any]) -> tuple[float, float]:
    """Median seconds of a phase of two rows."""
    before, after = (row["seconds"][phase]["median"] for row in rows)
    return before, after


def cache() -> list[str]:
    """The block cache with shared prefixes, beside a contiguous one with static batches."""
    serving = read_result("serving_32")["rows"][0]
    loads = [side["loads"]["code"] for side in read_result("before_after")["sides"].values()]
    return [
        "KV cache",
        "contiguous, static batches → blocks, shared prefixes, continuous batching; 32 requests at a time",
        f"requests/s {serving['engine']['ratio']:.2f}x, prefixes shared {serving['engine_shared']['ratio']:.2f}x, "
        f"four times as many in the same cache {serving['engine_shared_fourfold']['ratio']:.2f}x",
        f"{human(loads[0]['cache_bytes'])} → {human(loads[1]['cache_bytes'])} for the same requests (FP8 rows), used "
        f"{loads[0]['cache_used']:.0%} → {loads[1]['cache_used']:.0%}",
        "the tokens of each request alone",
    ]


def quantisation() -> list[str]:
    """Weights in each scheme beside bfloat16: a decode step of 32 sequences."""
    forms = {"fp8_block": "FP8", "int8": "INT8", "int4": "INT4", "mixed": "mixed"}
    steps = {
        row["form"]: row
        for row in read_result("quantization_speed")["rows"]
        if row["part"] == "step" and row["shape"]["sequences"] == 32
    }
    schemes = read_result("quantization_table")["rows"]
    losses = {"fp8_block": "fp8_block", "int8": "int8", "int4": "int4 calibrated", "mixed": "mixed"}

    def bytes_read(form: str) -> int:
        return sum(steps[form]["bytes"].values())

    return [
        "quantisation",
        "bfloat16 weights → in each scheme; a decode step of 32",
        ", ".join(f"{name} {steps[form]['times_bf16']:.2f}x" for form, name in forms.items()),
        f"read in a step: {human(bytes_read('bf16'))} → "
        + ", ".join(f"{name} {human(bytes_read(form))}" for form, name in forms.items()),
        "loss "
        + ", ".join(f"{name} {schemes[losses[form]]['relative_loss']:+.2%}" for form, name in forms.items())
        + " (INT4 calibrated)",
    ]


def access() -> list[str]:
    """What share of the device's bandwidth the memory-bound kernels reach, and how often plain JAX's time they take."""
    shapes = {
        "index scores": ("indexer_logits", "decode-64x131072"),
        "cache writes": ("cache_write", "65536"),
        "dispatch": ("moe_dispatch", "gather-4096"),
        "combine": ("moe_dispatch", "combine-4096"),
        "sparse MLA": ("sparse_mla", "decode-128x32768"),
    }
    rows = {(row["op"], row["shape"]): row for row in read_result("kernels")["rows"]}
    chosen = {name: rows[key] for name, key in shapes.items()}
    copy = read_result("kernels")["runs"][-1]["roofline"]["ceilings"]["copy"]
    reached = ", ".join(f"{name} {row['gbytes_per_second'] / (copy / 1e9):.0%}" for name, row in chosen.items())
    return [
        "memory access",
        "plain JAX → kernels with their own layouts and copies ahead",
        ", ".join(f"{name} {row['reference']['ratio']:.2f}x" for name, row in chosen.items()),
        f"of a copy's bandwidth: {reached}",
        "tested against the reference",
    ]


def before_and_after() -> str:
    """The comparison end to end as a table."""
    content = read_result("before_after")
    rows = []
    for row in content["comparison"]:
        target = "" if row["target"] is None else f"{row['target']:.2f}x, {'reached' if row['reached'] else 'missed'}"
        rows.append([*before_after.label_and_sides(row), f"{row['times']:.2f}x", target])
    place = f"{content['device']}, JAX {content['versions']['jax']}, {content['date']}; {content['layers']} layers"
    return f"{place}.\n\n{table(['', 'baseline', 'optimised', 'times', 'target'], rows)}"


def ablated() -> str:
    """The ablation at full width as a table."""
    content = read_result("ablate_full_width")
    names = {row["number"]: f"{row['group'] or ''}: {row['name'].rpartition(' -> ')[2]}" for row in content["rows"]}
    names[0] = "baseline"
    rows = []
    for row in content["rows"]:
        seconds = [f"{row['seconds'][phase]['median'] * 1e3:.3g} ms" for phase in ("decode", "prompt")]
        faster = [
            f"{row['speedup'][phase]['median']:.3g}x" + ("" if row["speedup"][phase]["differs"] else " (spread)")
            if phase in row["speedup"]
            else ""
            for phase in ("decode", "prompt")
        ]
        against = "" if row["against"] is None else names[row["against"]]
        rows.append([names[row["number"]], against, seconds[0], faster[0], seconds[1], faster[1]])
    work = content["work"]
    place = (
        f"{content['device']}, JAX {content['versions']['jax']}, {content['date']}; {content['model']}; decode: "
        f"{work['sequences']} sequences of {work['context']} tokens; prompt: {work['prompt_tokens']} tokens"
    )
    missing = "".join(f" Left out: {name} ({reason})." for name, reason in content["left_out"].items())
    head = ["row", "beside", "decode", "faster", "prompt", "faster"]
    return f"{place}.{missing}\n\n{table(head, rows)}"


def pages() -> dict[Path, str]:
    """The pages with their tables as the results have them."""
    readme = between(README.read_text(encoding="utf-8"), "operators", operators())
    page = between(PAGE.read_text(encoding="utf-8"), "before-after", before_and_after())
    return {README: readme, PAGE: between(page, "ablate", ablated())}


def main() -> None:
    """The command."""
    command_line.parser(__doc__).parse_args()
    for path, text in pages().items():
        writable(path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    command_line.run(main)
