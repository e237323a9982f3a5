"""Figures and the tables of docs/quantisation.md, made from the results and from nothing else."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from dsv32_jax.config import ModelConfig
from dsv32_jax.experiments.pages import between, drawing, table
from dsv32_jax.experiments.results import RESULTS, read_result
from dsv32_jax.experiments.studies.quantization.sensitivity import FAMILIES

PAGE = Path(__file__).parents[3] / "docs" / "quantisation.md"
MOST_SENSITIVE = 12
"""Rows of the ranking that are shown for each scheme."""

KINDS = {
    "products with weights": "^(few_rows|many_rows)",
    "sparse attention": "^sparse_mla",
    "head": "^nvjet|dot_general",
    "indexer": "^(indexer_logits|top_k)",
    "quantisation": "_quantize_",
    "other kernels of ours": "mosaic_gpu_kernel$",
    "XLA's": "",
}
"""What a step's kernels are, by their names; the first that fits."""

SMALLEST_KL = 1e-9
"""Nats that float32 still tells from nothing, about: what is below is drawn as this."""


def write(page: Path = PAGE) -> None:
    """The page's tables and sentences, anew."""
    found, sensitivity, plan = (read_result(f"quantization_{name}") for name in ("table", "sensitivity", "plan"))
    found["rows"] = {name: row for name, row in found["rows"].items() if "kl" in row}  # others are only begun
    speed = read_result("quantization_speed")
    text = page.read_text(encoding="utf-8")
    for name, content in {
        "settings": settings_of(found),
        "schemes": scheme_table(found),
        "verdict": verdict(found),
        "arithmetic": arithmetic_table(found),
        "layers": layer_table(found),
        "export": export_table(read_result("demo_model")),
        "planning": planning_of(sensitivity),
        "sensitivity": ranking(sensitivity),
        "kept": kept_table(sensitivity),
        "keeping": keeping(sensitivity),
        "plan": plan_table(plan),
        "additivity": additivity(plan),
        "speed": speed_tables(speed),
        "kernels": kernel_table(speed),
    }.items():
        text = between(text, name, content)
    page.write_text(text, encoding="utf-8")


def speed_tables(found: dict[str, Any]) -> str:
    """Times of decode steps and of the experts' layer by scheme, beside bfloat16 and the bytes that must be read."""
    said = (
        f"{found['device']}, JAX {found['versions']['jax']}, {found['date']}; {found['layers']} layers, "
        f"{found['dense_layers']} of them dense; {found['timer']}; copy {found['ceilings']['copy'] / 1e12:.2f} TB/s."
    )
    parts = {"step": ("sequences", "a decode step"), "layer": ("tokens", "the experts' layer")}
    texts = [said]
    for part, (size, title) in parts.items():
        rows = []
        for row in found["rows"]:
            if row["part"] != part:
                continue
            time = row["seconds"]["median"]
            spread = (row["seconds"]["max"] - row["seconds"]["min"]) / time
            rows.append(
                [
                    row["form"],
                    str(row["shape"][size]),
                    f"{time * 1e6:.0f} µs",
                    f"{spread:.1%}",
                    f"{row['times_bf16']:.2f}x",
                    f"{sum(row['bytes'].values()) / 1e9:.2f} GB",
                    f"{row['bound']['of_time']:.0%}",
                ]
            )
        texts.append(table([title, size, "time", "spread", "against bf16", "read", "of the byte bound"], rows))
    return "\n\n".join([*texts, beside_experts(found)])


def beside_experts(found: dict[str, Any]) -> str:
    """What a step takes without its layers of experts, and the least time of attention's products in it."""
    rows = {(row["part"], row["form"], *row["shape"].values()): row for row in found["rows"]}
    expert_layers = found["layers"] - found["dense_layers"]
    config = ModelConfig.full_width(found["layers"])
    said = []
    for (part, form, sequences, *_), row in rows.items():
        layer = rows.get(("layer", form, sequences))
        if part != "step" or layer is None:
            continue
        time = row["seconds"]["median"] - expert_layers * layer["seconds"]["median"]
        read = sum(row["bytes"].values()) - expert_layers * sum(layer["bytes"].values())
        said.append(f"{form} at {sequences} {time * 1e3:.2f} ms ({read / found['ceilings']['copy'] / time:.0%})")
    most = max(row["shape"]["sequences"] for row in found["rows"] if row["part"] == "step")
    wide = 2 * config.kv_lora_rank + config.qk_rope_head_dim  # queries with rows, probabilities with latents
    operations = 2 * most * config.index_topk * config.num_attention_heads * wide * found["layers"]
    return (
        f"A step without its {expert_layers} layers of experts, and its share of the byte bound: {', '.join(said)}. "
        f"The products of sparse attention alone, {operations / 1e9:.0f} GFLOP at {most} sequences, take "
        f"{operations / found['ceilings']['bf16'] * 1e3:.2f} ms at the {found['ceilings']['bf16'] / 1e12:.0f} TFLOP/s "
        "that a large product in bfloat16 reaches."
    )


def kernel_table(found: dict[str, Any]) -> str:
    """What a step's kernels take, by what they are."""
    rows = []
    for row in found["rows"]:
        if "kernels" not in row or row["form"] == "bf16":  # whose dense products have no names of their own
            continue
        took = dict.fromkeys(KINDS, 0.0)
        for kernel in row["kernels"]:
            took[next(kind for kind, names in KINDS.items() if re.search(names, kernel["name"]))] += kernel["us"]
        bound = sum(row["bytes"].values()) / found["ceilings"]["copy"]
        cells = [f"{time:.0f} µs" for time in (row["seconds"]["median"] * 1e6, bound * 1e6, *took.values())]
        rows.append([row["form"], str(row["shape"]["sequences"]), *cells])
    said = f"{found['device']}, JAX {found['versions']['jax']}, {found['date']}; {found['layers']} layers."
    return f"{said}\n\n{table(['a decode step', 'sequences', 'time', 'its bytes need', *KINDS], rows)}"


def settings_of(found: dict[str, Any]) -> str:
    """What the table was measured on."""
    settings = found["settings"]
    parts = {name: last - first for name, (first, last) in settings["documents"].items()}
    where = settings["environment"]
    return (
        f"Measured on {parts['evaluation']} windows of {settings['length']} tokens; calibrated on "
        f"{parts['calibration']} windows of other documents, planned on {parts['planning']} of others still. "
        f"{settings['needles']['each']} needles of each context. Computed on {where['device']} "
        f"{where['platform'].upper()}, JAX {where['versions']['jax']}, {found['date']}."
    )


def loss_of(row: dict[str, Any]) -> str:
    """Relative loss of perplexity and its standard error."""
    return f"{row['relative_loss']:+.3%} ± {row['relative_loss_error']:.3%}"


def scheme_table(found: dict[str, Any]) -> str:
    """Each scheme on the whole model; what is not measured yet stays empty."""
    contexts = list(map(str, found["settings"]["needles"]["contexts"]))
    rows = []
    for name, row in found["rows"].items():
        size = row["megabytes"]
        rows.append(
            [
                name,
                f"{size['linears']:.2f} + {size['rest']:.2f}",
                f"{row['perplexity']:.4f}",
                loss_of(row),
                f"{row['kl']:.5f}",
                f"{row['top1_agreement']:.2%}",
                *(f"{row['needles'][n]:.0%}" if "needles" in row else "" for n in contexts),
            ]
        )
    head = [
        "weights",
        "MB",
        "perplexity",
        "loss",
        "KL, nats",
        "same best token",
        *(f"needles at {n}" for n in contexts),
    ]
    return table(head, rows)


def verdict(found: dict[str, Any]) -> str:
    """Whether the targets were met, in sentences that the numbers decide."""
    rows = found["rows"]
    said = []
    for name, target in {
        "int8": 0.008,
        "int8, activations": 0.008,
        "int4 calibrated": 0.015,
        "mixed, activations": 0.003,
    }.items():
        if name in rows:
            loss = rows[name]["relative_loss"]
            within = "within" if loss <= target else "NOT within"
            said.append(f"{name}: {loss_of(rows[name])}, {within} {target:.1%}.")
    kls = {name: rows[name]["kl"] for name in ("int4", "int4 range searched", "int4 calibrated") if name in rows}
    if "int4" in kls and "int4 calibrated" in kls:
        share = kls["int4 calibrated"] / kls["int4"]
        said.append(f"In four bits, rounding for the inputs leaves {share:.0%} of the KL of plain rounding.")
    if "int4" in kls and "int4 range searched" in kls:
        said.append(f"The search for ranges alone leaves {kls['int4 range searched'] / kls['int4']:.0%}.")
    needles = [share for row in rows.values() for share in row.get("needles", {}).values()]
    said.append(f"Needles found: from {min(needles):.0%} to {max(needles):.0%}." if needles else "")
    return " ".join(said)


def arithmetic_table(found: dict[str, Any]) -> str:
    """What is quantised besides weights, with those of the base."""
    names = {name: name for name in found["arithmetic"]} | {
        form: f"cache of the step: {form} ({row['windows']} windows)" for form, row in found["caches"].items()
    }
    rows = [
        [names[name], loss_of(row), f"{row['kl']:.6f}", f"{row['top1_agreement']:.2%}"]
        for name, row in (found["arithmetic"] | found["caches"]).items()
    ]
    return table(["quantised", "loss", "KL, nats", "same best token"], rows)


def layer_table(found: dict[str, Any]) -> str:
    """Layer by layer over one window: recall of the chosen positions, and the KL of the attention."""
    rows = []
    for name, row in found["rows"].items():
        if "fidelity" not in row:
            continue
        layers = row["fidelity"]["layers"]
        rows.append([name, *(f"{own['topk_recall']:.4f} / {own['attention_kl']:.1e}" for own in layers)])
    return table(["weights", *(f"layer {n}" for n in range(len(rows[0]) - 1))], rows)


def export_table(model: dict[str, Any]) -> str:
    """FP8 against the weights it was made from, as recorded when the model was exported."""
    own = model["precision"]
    base = own["bfloat16 weights"]["perplexity"]
    rows = [[name, f"{row['perplexity']:.3f}", f"{row['perplexity'] / base - 1:+.2%}"] for name, row in own.items()]
    return table(["weights", "perplexity", "loss"], rows)


def planning_of(found: dict[str, Any]) -> str:
    """What the sensitivities were measured on."""
    settings = found["settings"]
    first, last = settings["documents"]["planning"]
    return (
        f"On {last - first} windows of {settings['planning_length']} tokens, of other documents than the table's; the "
        f"{MOST_SENSITIVE} most sensitive of each scheme. What the indexer costs in longer text is in the table above."
    )


def ranking(found: dict[str, Any]) -> str:
    """The families of layers that lose the most, in each scheme."""
    parts = []
    for scheme in dict.fromkeys(row["scheme"] for row in found["rows"]):
        own = sorted((row for row in found["rows"] if row["scheme"] == scheme), key=lambda row: -row["kl"])
        rows = [
            [str(row["layer"]), row["family"], f"{row['kl']:.2e}", loss_of(row), f"{row['parameters'] / 1e3:.0f}"]
            for row in own[:MOST_SENSITIVE]
        ]
        head = ["layer", f"family, in {scheme}", "KL, nats", "loss", "thousand weights"]
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def kept_table(found: dict[str, Any]) -> str:
    """What no scheme takes, rounded all the same: the worst layer of each, beside that of the linears."""
    rows = []
    for part in ("kept", "rows"):
        for family in dict.fromkeys(row["family"] for row in found[part]):
            for scheme in dict.fromkeys(row["scheme"] for row in found[part]):
                own = [row for row in found[part] if (row["family"], row["scheme"]) == (family, scheme)]
                if scheme == "int4":
                    continue
                total, weights = sum(row["kl"] for row in own), sum(row["parameters"] for row in own)
                worst = max(row["kl"] for row in own)
                rows.append([family, scheme, f"{worst:.1e}", f"{total:.1e}", f"{weights:,}"])
    return table(["tensors", "rounded to", "KL of the worst layer", "sum over layers", "values"], rows)


def keeping(found: dict[str, Any]) -> str:
    """What a million values lose in int8: of the linears, and of what no scheme takes."""

    def per_million(rows: list[dict[str, Any]]) -> float:
        return sum(row["kl"] for row in rows) / sum(row["parameters"] for row in rows) * 1e6

    linears = per_million([row for row in found["rows"] if row["scheme"] == "int8"])
    kept = [row for row in found["kept"] if row["scheme"] == "int8"]
    times = {
        family: per_million([row for row in kept if row["family"] == family]) / linears
        for family in dict.fromkeys(row["family"] for row in kept)
    }
    small = sum(row["parameters"] for row in kept if row["layer"] is not None)
    listed = ", ".join(f"{family} {ratio:.1f}" for family, ratio in sorted(times.items(), key=lambda pair: -pair[1]))
    cheap = [family for family, ratio in times.items() if ratio <= 2]
    return (
        f"In int8 a million values of the linears lose {linears:.1e} nats, one at a time. Times as much by value: "
        f"{listed}. Router, biases, head weights and norms of all layers have {small / 1e3:.1f} thousand values."
        + (f" Of {', '.join(cheap)}, eight bits would cost no more by value than those of linears." if cheap else "")
    )


def plan_table(plan: dict[str, Any]) -> str:
    """The curve of plans."""
    rows = [
        [
            row["name"],
            f"{row['megabytes']['total']:.2f}",
            str(row["in_int4"]),
            f"{row['predicted_kl']:.5f}",
            f"{row['kl']:.5f}",
            loss_of(row),
        ]
        for row in sorted(plan["curve"], key=lambda row: row["megabytes"]["total"])
    ]
    return table(["plan", "MB", "linears in int4", "KL predicted", "KL measured", "loss"], rows)


def additivity(plan: dict[str, Any]) -> str:
    """How far the sum of single losses is from what a plan loses."""
    ratios = [row["kl"] / row["predicted_kl"] for row in plan["curve"]]
    return f"Measured over predicted KL: {min(ratios):.2f} to {max(ratios):.2f}."


def draw(directory: Path = RESULTS) -> list[Path]:
    """Heat map of the sensitivities, and KL by size of the plans; returns the files."""
    plt, save = drawing(directory)
    found, plan = read_result("quantization_sensitivity"), read_result("quantization_plan")
    schemes = list(dict.fromkeys(row["scheme"] for row in found["rows"]))
    layers = 1 + max(row["layer"] for row in found["rows"])
    figure, axes = plt.subplots(1, len(schemes), figsize=(11, 4.2), squeeze=False)
    for axis, scheme in zip(axes[0], schemes, strict=True):
        grid = np.full((len(FAMILIES), layers), np.nan)
        for row in found["rows"]:
            if row["scheme"] == scheme:
                grid[list(FAMILIES).index(row["family"]), row["layer"]] = np.log10(max(row["kl"], SMALLEST_KL))
        image = axis.imshow(grid, aspect="auto", cmap="viridis")
        axis.set_yticks(range(len(FAMILIES)), list(FAMILIES))
        axis.set(xlabel="layer", title=f"{scheme} alone: log10 of the KL in nats")
        figure.colorbar(image, ax=axis)
    files = [save(figure, "quantization_heat_map")]

    figure, axis = plt.subplots(figsize=(6.5, 4))
    curve = sorted(plan["curve"], key=lambda row: row["megabytes"]["total"])
    sizes = [row["megabytes"]["total"] for row in curve]
    axis.plot(sizes, [row["predicted_kl"] for row in curve], marker="x", linestyle=":", label="sum of single losses")
    axis.plot(sizes, [row["kl"] for row in curve], marker="o", label="measured")
    shipped = next(row for row in curve if row["name"] == "shipped")
    axis.plot([shipped["megabytes"]["total"]], [shipped["kl"]], "s", markersize=9, fillstyle="none", label="shipped")
    axis.set(xlabel="MB of weights", ylabel="KL, nats", yscale="log", title="plans between int4 and int8")
    axis.legend()
    return [*files, save(figure, "quantization_pareto")]
