"""Makes the figures and the tables of docs/quantisation.md from the results alone."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from dsv32_jax.config import ModelConfig
from dsv32_jax.experiments.pages import between, drawing, signed, table, titled
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
"""Kinds of a step's kernels, with a regular expression of their names; the first that matches counts."""

SMALLEST_KL = 1e-9
"""About the fewest nats that float32 distinguishes from 0: smaller values are drawn as this."""


def write(page: Path = PAGE) -> None:
    """Writes the page's tables and sentences anew."""
    results, sensitivities, plan = (read_result(f"quantization_{name}") for name in ("table", "sensitivity", "plan"))
    results["rows"] = {name: row for name, row in results["rows"].items() if "kl" in row}  # the others are not finished
    speed = read_result("quantization_speed")
    text = page.read_text(encoding="utf-8")
    for name, content in {
        "settings": settings_of(results),
        "schemes": scheme_table(results),
        "verdict": verdict(results),
        "arithmetic": arithmetic_table(results),
        "layers": layer_table(results),
        "export": export_table(read_result("demo_model")),
        "planning": planning_of(sensitivities),
        "sensitivity": ranking(sensitivities),
        "kept": kept_table(sensitivities),
        "keeping": keeping(sensitivities),
        "plan": plan_table(plan),
        "additivity": additivity(plan),
        "speed": speed_tables(speed),
        "kernels": kernel_table(speed),
    }.items():
        text = between(text, name, content)
    page.write_text(text, encoding="utf-8")


def speed_tables(speeds: dict[str, Any]) -> str:
    """Times of decode steps and of the experts' layer by scheme, beside bfloat16 and the bytes that must be read."""
    setting = (
        f"{speeds['device']}, JAX {speeds['versions']['jax']}, {speeds['date']}; {speeds['layers']} layers, "
        f"{speeds['dense_layers']} of them dense; {speeds['timer']}; copy {speeds['ceilings']['copy'] / 1e12:.2f} TB/s."
    )
    parts = {"step": ("sequences", "a decode step"), "layer": ("tokens", "the experts' layer")}
    texts = [setting]
    for part, (size, title) in parts.items():
        rows = []
        for row in speeds["rows"]:
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
    return "\n\n".join([*texts, beside_experts(speeds)])


def beside_experts(speeds: dict[str, Any]) -> str:
    """The time of a step without its layers of experts, and the least time of the products of attention in it."""
    rows = {(row["part"], row["form"], *row["shape"].values()): row for row in speeds["rows"]}
    expert_layers = speeds["layers"] - speeds["dense_layers"]
    config = ModelConfig.full_width(speeds["layers"])
    shares = []
    for (part, form, sequences, *_), row in rows.items():
        layer = rows.get(("layer", form, sequences))
        if part != "step" or layer is None:
            continue
        time = row["seconds"]["median"] - expert_layers * layer["seconds"]["median"]
        read = sum(row["bytes"].values()) - expert_layers * sum(layer["bytes"].values())
        shares.append(f"{form} at {sequences} {time * 1e3:.2f} ms ({read / speeds['ceilings']['copy'] / time:.0%})")
    most_sequences = max(row["shape"]["sequences"] for row in speeds["rows"] if row["part"] == "step")
    wide = 2 * config.kv_lora_rank + config.qk_rope_head_dim  # queries with rows, probabilities with latents
    operations = 2 * most_sequences * config.index_topk * config.num_attention_heads * wide * speeds["layers"]
    bf16 = speeds["ceilings"]["bf16"]
    return (
        f"A step without its {expert_layers} layers of experts, and its share of the byte bound: {', '.join(shares)}. "
        f"The products of sparse attention alone, {operations / 1e9:.0f} GFLOP at {most_sequences} sequences, take "
        f"{operations / bf16 * 1e3:.2f} ms at the {bf16 / 1e12:.0f} TFLOP/s "
        "that a large product in bfloat16 reaches."
    )


def kernel_table(speeds: dict[str, Any]) -> str:
    """The time of a step's kernels, by kind."""
    rows = []
    for row in speeds["rows"]:
        if "kernels" not in row or row["form"] == "bf16":  # whose dense products have no names of their own
            continue
        microseconds = dict.fromkeys(KINDS, 0.0)
        for kernel in row["kernels"]:
            microseconds[next(kind for kind, names in KINDS.items() if re.search(names, kernel["name"]))] += kernel[
                "us"
            ]
        bound = sum(row["bytes"].values()) / speeds["ceilings"]["copy"]
        cells = [f"{time:.0f} µs" for time in (row["seconds"]["median"] * 1e6, bound * 1e6, *microseconds.values())]
        rows.append([row["form"], str(row["shape"]["sequences"]), *cells])
    setting = f"{speeds['device']}, JAX {speeds['versions']['jax']}, {speeds['date']}; {speeds['layers']} layers."
    return f"{setting}\n\n{table(['a decode step', 'sequences', 'time', 'its bytes need', *KINDS], rows)}"


def settings_of(results: dict[str, Any]) -> str:
    """A sentence on the texts and the machine of the table."""
    settings = results["settings"]
    parts = {name: last - first for name, (first, last) in settings["documents"].items()}
    environment = settings["environment"]
    return (
        f"Measured on {parts['evaluation']} windows of {settings['length']} tokens; calibrated on "
        f"{parts['calibration']} windows of other documents, planned on {parts['planning']} of others still. "
        f"{settings['needles']['each']} needles of each context. Computed on {environment['device']} "
        f"{environment['platform'].upper()}, JAX {environment['versions']['jax']}, {results['date']}."
    )


def loss_of(row: dict[str, Any]) -> str:
    """Relative loss of perplexity and its standard error."""
    return f"{row['relative_loss']:+.3%} ± {row['relative_loss_error']:.3%}"


def scheme_table(results: dict[str, Any]) -> str:
    """The table of each scheme on the whole model; cells that are not measured yet stay empty."""
    contexts = list(map(str, results["settings"]["needles"]["contexts"]))
    rows = []
    for name, row in results["rows"].items():
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


def verdict(results: dict[str, Any]) -> str:
    """Sentences on whether the targets are met, which the numbers decide."""
    rows = results["rows"]
    sentences = []
    for name, target in {
        "int8": 0.008,
        "int8, activations": 0.008,
        "int4 calibrated": 0.015,
        "mixed, activations": 0.003,
    }.items():
        if name in rows:
            loss = rows[name]["relative_loss"]
            within = "within" if loss <= target else "NOT within"
            sentences.append(f"{name}: {loss_of(rows[name])}, {within} {target:.1%}.")
    kls = {name: rows[name]["kl"] for name in ("int4", "int4 range searched", "int4 calibrated") if name in rows}
    if "int4" in kls and "int4 calibrated" in kls:
        share = kls["int4 calibrated"] / kls["int4"]
        sentences.append(f"In four bits, rounding for the inputs leaves {share:.0%} of the KL of plain rounding.")
    if "int4" in kls and "int4 range searched" in kls:
        sentences.append(f"The search for ranges alone leaves {kls['int4 range searched'] / kls['int4']:.0%}.")
    needles = [share for row in rows.values() for share in row.get("needles", {}).values()]
    sentences.append(f"Needles found: from {min(needles):.0%} to {max(needles):.0%}." if needles else "")
    return " ".join(sentences)


def arithmetic_table(results: dict[str, Any]) -> str:
    """The table of what is quantised besides weights, with the base's weights."""
    names = {name: name for name in results["arithmetic"]} | {
        form: f"cache of the step: {form} ({row['windows']} windows)" for form, row in results["caches"].items()
    }
    rows = [
        [names[name], loss_of(row), f"{row['kl']:.6f}", f"{row['top1_agreement']:.2%}"]
        for name, row in (results["arithmetic"] | results["caches"]).items()
    ]
    return table(["quantised", "loss", "KL, nats", "same best token"], rows)


def layer_table(results: dict[str, Any]) -> str:
    """Layer by layer over one window: recall of the chosen positions, and the KL of the attention."""
    rows = []
    for name, row in results["rows"].items():
        if "fidelity" not in row:
            continue
        layers = row["fidelity"]["layers"]
        rows.append([name, *(f"{layer['topk_recall']:.4f} / {layer['attention_kl']:.1e}" for layer in layers)])
    return table(["weights", *(f"layer {n}" for n in range(len(rows[0]) - 1))], rows)


def export_table(model: dict[str, Any]) -> str:
    """FP8 against the weights it was made from, as recorded when the model was exported."""
    precisions = model["precision"]
    base = precisions["bfloat16 weights"]["perplexity"]
    rows = [
        [name, f"{row['perplexity']:.3f}", f"{row['perplexity'] / base - 1:+.2%}"] for name, row in precisions.items()
    ]
    return table(["weights", "perplexity", "loss"], rows)


def planning_of(sensitivities: dict[str, Any]) -> str:
    """A sentence on the texts of the sensitivities."""
    settings = sensitivities["settings"]
    first, last = settings["documents"]["planning"]
    return (
        f"On {last - first} windows of {settings['planning_length']} tokens, of other documents than the table's; the "
        f"{MOST_SENSITIVE} most sensitive of each scheme. What the indexer costs in longer text is in the table above."
    )


def ranking(sensitivities: dict[str, Any]) -> str:
    """The families of layers that lose the most, in each scheme."""
    parts = []
    for scheme in dict.fromkeys(row["scheme"] for row in sensitivities["rows"]):
        scheme_rows = sorted(
            (row for row in sensitivities["rows"] if row["scheme"] == scheme), key=lambda row: -row["kl"]
        )
        rows = [
            [str(row["layer"]), row["family"], f"{row['kl']:.2e}", loss_of(row), f"{row['parameters'] / 1e3:.0f}"]
            for row in scheme_rows[:MOST_SENSITIVE]
        ]
        head = ["layer", f"family, in {scheme}", "KL, nats", "loss", "thousand weights"]
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def kept_table(sensitivities: dict[str, Any]) -> str:
    """The table of tensors that are never quantised, rounded all the same: the worst layer of each family, and of the
    linears."""
    rows = []
    for part in ("kept", "rows"):
        for family in dict.fromkeys(row["family"] for row in sensitivities[part]):
            for scheme in dict.fromkeys(row["scheme"] for row in sensitivities[part]):
                family_rows = [row for row in sensitivities[part] if (row["family"], row["scheme"]) == (family, scheme)]
                if scheme == "int4":
                    continue
                total, weights = sum(row["kl"] for row in family_rows), sum(row["parameters"] for row in family_rows)
                worst = max(row["kl"] for row in family_rows)
                rows.append([family, scheme, f"{worst:.1e}", f"{total:.1e}", f"{weights:,}"])
    return table(["tensors", "rounded to", "KL of the worst layer", "sum over layers", "values"], rows)


def keeping(sensitivities: dict[str, Any]) -> str:
    """Sentences on the loss of a million values in int8: of the linears, and of tensors that are never quantised."""

    def per_million(rows: list[dict[str, Any]]) -> float:
        return sum(row["kl"] for row in rows) / sum(row["parameters"] for row in rows) * 1e6

    linears = per_million([row for row in sensitivities["rows"] if row["scheme"] == "int8"])
    kept_rows = [row for row in sensitivities["kept"] if row["scheme"] == "int8"]
    times = {
        family: per_million([row for row in kept_rows if row["family"] == family]) / linears
        for family in dict.fromkeys(row["family"] for row in kept_rows)
    }
    small = sum(row["parameters"] for row in kept_rows if row["layer"] is not None)
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
    """A sentence on the ratio of a plan's loss to the sum of single losses."""
    ratios = [row["kl"] / row["predicted_kl"] for row in plan["curve"]]
    return f"Measured over predicted KL: {min(ratios):.2f} to {max(ratios):.2f}."


def draw(directory: Path = RESULTS) -> list[Path]:
    """Heat map of the sensitivities, and KL by size of the plans; returns the files."""
    plt, save = drawing(directory)
    sensitivities, plan = read_result("quantization_sensitivity"), read_result("quantization_plan")
    schemes = list(dict.fromkeys(row["scheme"] for row in sensitivities["rows"]))
    layers = 1 + max(row["layer"] for row in sensitivities["rows"])
    figure, axes = plt.subplots(1, len(schemes), figsize=(12, 4.4), squeeze=False)
    for axis, scheme in zip(axes[0], schemes, strict=True):
        grid = np.full((len(FAMILIES), layers), np.nan)
        rows = [row for row in sensitivities["rows"] if row["scheme"] == scheme]
        for row in rows:
            grid[list(FAMILIES).index(row["family"]), row["layer"]] = np.log10(max(row["kl"], SMALLEST_KL))
        image = axis.imshow(grid, aspect="auto")
        axis.set_facecolor("#dddddd")
        axis.set_yticks(range(len(FAMILIES)), list(FAMILIES))
        worst = max(rows, key=lambda row: row["kl"])
        title = f"{scheme}: {worst['family']} of layer {worst['layer']} costs most, {worst['kl']:.1e} nats"
        titled(axis, title, 40)
        axis.set(xlabel="layer (grey: it has no experts)", ylabel="the linears in that scheme")
        figure.colorbar(image, ax=axis, label="log10 of the KL in nats")
    signed(figure, f"demo model, one family of one layer rounded at a time; {measured_on(sensitivities)}")
    files = [save(figure, "quantization_heat_map")]

    figure, axis = plt.subplots(figsize=(7, 4.4))
    curve = sorted(plan["curve"], key=lambda row: row["megabytes"]["total"])
    sizes = [row["megabytes"]["total"] for row in curve]
    axis.plot(sizes, [row["predicted_kl"] for row in curve], label="predicted: the sum of single losses")
    axis.plot(sizes, [row["kl"] for row in curve], label="measured")
    shipped = next(row for row in curve if row["name"] == "shipped")
    at = (shipped["megabytes"]["total"], shipped["kl"])
    axis.plot(*at, "s", markersize=11, fillstyle="none", color="black")
    axis.annotate("the plan that ships", at, xytext=(-12, -12), textcoords="offset points", ha="right", va="top")
    ratios = [row["predicted_kl"] / row["kl"] for row in curve]
    title = f"A mixture loses {min(ratios):.1f} to {max(ratios):.1f} times less than its parts alone add up to"
    if min(ratios) < 1:
        title = f"What the parts lose alone predicts a mixture within {max(*ratios, 1 / min(ratios)):.1f} times"
    axis.set(xlabel="weights, MB (from int4 everywhere to int8 everywhere)", yscale="log")
    titled(axis, title)
    axis.set_ylabel("KL of the next token from bf16, nats")
    axis.legend()
    signed(figure, f"demo model; {measured_on(plan)}")
    return [*files, save(figure, "quantization_pareto")]


def measured_on(result: dict[str, Any]) -> str:
    """Device, JAX and date of a result."""
    environment = result["settings"]["environment"]
    device = environment["device"] + " CPU" * (environment["platform"] == "cpu")
    return f"{device}, JAX {environment['versions']['jax']}, {result['date']}"
