"""Makes the figures and the model card from the results alone."""

import json
from pathlib import Path
from string import Template
from typing import Any

from dsv32_jax.common.units import human
from dsv32_jax.config import ModelConfig
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.pages import apart, drawing, signed, table, titled
from dsv32_jax.experiments.results import RESULTS, read_result, write_json
from dsv32_jax.experiments.train_demo.evaluate import MODES, NEEDLE_MODES
from dsv32_jax.generate.loading import DEMO

CARD = Path(__file__).parent / "card.md"
TRAINING, MODEL = "train_demo", "demo_model"
KEPT_POINTS = 400


def collect(run: Path) -> None:
    """Writes a run's log and summaries to `experiments/results/train_demo.json`."""
    log = run / "log.jsonl"
    if not log.exists():
        raise UserError(f"{run}: has no log.jsonl; give the folder of a run")
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    stages = []
    for name in dict.fromkeys(row["stage"] for row in rows):
        stage_rows = [row for row in rows if row["stage"] == name]
        summary = run / f"{name}.json"
        if not summary.exists():
            raise UserError(f"{run}: stage {name} is not finished")
        # A resumed stage logged some steps twice: the later line counts, but the time is that of both.
        ends = [
            n
            for n in range(len(stage_rows))
            if n + 1 == len(stage_rows) or stage_rows[n + 1]["seconds"] < stage_rows[n]["seconds"]
        ]
        steps = list({row["step"]: row for row in stage_rows}.values())
        points = steps[:: -(-len(steps) // KEPT_POINTS)]
        points += steps[-1:] if steps[-1] not in points else []
        stage = json.loads(summary.read_text(encoding="utf-8"))
        stage["seconds"] = round(sum(stage_rows[n]["seconds"] for n in ends), 1)
        stage["processes"] = len(ends)
        stage["tokens"] = stage["settings"]["steps"] * stage["settings"]["batch"] * stage["settings"]["length"]
        columns = [column for column in points[0] if column not in ("stage", "tokens")]
        curve = {column: [row.get(column) for row in points] for column in columns}
        stages.append(stage | {"name": name, "curve": curve})
    manifest = run / "corpus.json"
    corpus = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else None
    write_json(RESULTS / f"{TRAINING}.json", {"stages": stages, "corpus": corpus})


def draw(directory: Path = RESULTS) -> list[Path]:
    """Losses by stage; needles by distance and attention mass by layer; returns the files."""
    plt, save = drawing(directory)
    training, model = read_result(TRAINING), read_result(MODEL)
    figure, (left_axis, right_axis) = plt.subplots(1, 2, figsize=(12, 4.2), width_ratios=(6, 4))
    first, last = draw_losses(left_axis, training["stages"], "loss")
    left_axis.set(ylim=(None, 5), ylabel="training loss, nats a token")
    titled(left_axis, f"The loss on text falls from {first:.1f} to {last:.2f} nats a token", 60)
    first, last = draw_losses(right_axis, [s for s in training["stages"] if "index_kl" in s["curve"]], "index_kl")
    right_axis.set(yscale="log", ylabel="KL of indexer from attention, nats\n(mean over layers)")
    titled(right_axis, f"The indexer's KL falls from {first:.1f} to {last:.2f} nats")
    devices = ", ".join(dict.fromkeys(device_of(stage) for stage in training["stages"]))
    dates = ", ".join(dict.fromkeys(stage["environment"]["date"] for stage in training["stages"]))
    signed(figure, f"demo model; each stage as wide as the others, its tokens below it; {devices}, {dates}")
    files = [save(figure, "train_demo_loss")]

    figure, (left_axis, right_axis) = plt.subplots(1, 2, figsize=(12, 4.2))
    needles = model["needles"]["by_length"]
    lengths = list(map(int, needles["indexer"]))
    for number, mode in enumerate(NEEDLE_MODES):
        left_axis.plot(lengths, [100 * share for share in needles[mode].values()], label=mode, **apart(number))
    k, longest = model["settings"]["index_topk"], str(lengths[-1])
    left_axis.axvline(k, color="grey", linestyle=":", linewidth=1, marker="")
    left_axis.annotate(f" k = {k}", (k, 3), color="#555555")
    left_axis.set(xscale="log", xlabel="context, tokens", ylabel="needles found, %", ylim=(-3, 104))
    found, recent = needles["indexer"][longest], needles["recent"][longest]
    titled(left_axis, f"At {longest} tokens the indexer finds {found:.0%} of needles, the last k {recent:.0%}", 42)
    left_axis.set_xticks(lengths, list(map(str, lengths)))
    left_axis.minorticks_off()
    layers = [row["layer"] for row in model["selection"]]
    for number, (column, label) in enumerate(MASSES.items()):
        masses = [100 * row[column] for row in model["selection"]]
        right_axis.plot(layers, masses, label=label, **apart(number))
    right_axis.set(xlabel="layer", ylabel=f"attention mass on {k} chosen keys, %", ylim=(0, 103), xticks=layers)
    worst = min(row["mass"] / row["mass_oracle"] for row in model["selection"])
    titled(right_axis, f"The indexer keeps at least {worst:.0%} of the best possible attention mass", 42)
    for axis in (left_axis, right_axis):
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    version = model["environment"]["versions"]["jax"]
    signed(figure, f"demo model, held-out text; {device_of(model)}, JAX {version}, {model['environment']['date']}")
    return [*files, save(figure, "demo_model_selection")]


MASSES = {"mass_oracle": "best possible", "mass": "indexer", "mass_recent": "last k", "mass_random": "random"}
"""Selections of a layer by the column of their attention mass."""


def draw_losses(axis: Any, stages: list[dict[str, Any]], column: str) -> tuple[float, float]:
    """Draws a loss over the stages, each of them one wide whatever its tokens; returns its first and last value on
    text, where a stage has steps on text."""
    values: list[float] = []
    for place, stage in enumerate(stages):
        curve = stage["curve"]
        on_text = [n for n, chat in enumerate(curve["chat"]) if not chat]
        steps = on_text or range(len(curve["chat"]))
        at = [place + (curve["step"][n] + 1) / stage["settings"]["steps"] for n in steps]
        values += [curve[column][n] for n in on_text]
        axis.plot(at, [curve[column][n] for n in steps], linewidth=1, linestyle="-", marker="." * (len(at) < 10))
        axis.axvline(place, color="#bbbbbb", linewidth=0.8, linestyle="-", marker="")
    names = [f"{stage['name']}\n{stage['tokens'] / 1e6:.3g} M" for stage in stages]
    axis.set_xticks([place + 0.5 for place in range(len(stages))], names)
    axis.tick_params(axis="x", length=0)
    axis.set(xlim=(0, len(stages)), xlabel="stage, tokens")
    return values[0], values[-1]


def write_card(directory: Path = DEMO) -> Path:
    """README.md of the demo checkpoint, from `card.md` and the results."""
    training, model = read_result(TRAINING), read_result(MODEL)
    config = ModelConfig.from_hf(directory / "config.json")
    size = sum(file.stat().st_size for file in directory.iterdir() if file.name != "README.md")
    values = {
        "size": human(size),
        "architecture": architecture(config),
        "corpus": corpus_table(training["corpus"]) if training["corpus"] else "",
        "stages": stage_table(training),
        "perplexity": perplexity_table(model),
        "precision": precision_table(model),
        "needles": needle_table(model),
        "selection": selection_table(model),
        "verdict": verdict(model),
        "stage_perplexity": stage_perplexity_table(model),
        "length": model["settings"]["length"],
        "windows": model["settings"]["windows"],
        "each": model["settings"]["needles"]["each"],
        "traced": model["settings"]["traced"],
        "device": device_of(model),
        "jax": model["environment"]["versions"]["jax"],
        "topk": model["settings"]["index_topk"],
    }
    file = directory / "README.md"
    file.write_text(Template(CARD.read_text(encoding="utf-8")).substitute(values), encoding="utf-8")
    return file


def device_of(result: dict[str, Any]) -> str:
    """The device of a result."""
    environment = result["environment"]
    return environment["device"] + " CPU" * (environment["platform"] == "cpu")


def architecture(config: ModelConfig) -> str:
    """The table of the model's sizes."""
    rows = [
        ["layers", f"{config.num_hidden_layers} ({config.first_k_dense_replace} dense), and an MTP module"],
        ["hidden, vocabulary", f"{config.hidden_size}, {config.vocab_size}"],
        ["attention heads; query latent", f"{config.num_attention_heads}; {config.q_lora_rank}"],
        ["latent, RoPE, nope, value", f"{config.kv_lora_rank}, {config.qk_rope_head_dim}, "
            f"{config.qk_nope_head_dim}, {config.v_head_dim}"],
        ["indexer", f"{config.index_n_heads} heads of {config.index_head_dim}, top {config.index_topk}"],
        ["experts", f"{config.n_routed_experts} of width {config.moe_intermediate_size} in {config.n_group} groups, "
            f"{config.num_experts_per_tok} of {config.topk_group} groups chosen; {config.n_shared_experts} shared"],
        ["context", f"{config.max_position_embeddings} tokens"],
    ]  # fmt: skip
    return table(["part", "size"], rows)


def corpus_table(corpus: dict[str, Any]) -> str:
    """The largest packages by bytes."""
    packages = sorted(corpus["packages"], key=lambda package: -package["train_bytes"])
    rows = [
        [f"{p['name']} {p['version']}", f"{p['train_bytes'] / 1e6:.1f}", p["license"].replace("|", "/")]
        for p in packages[:15]
    ]
    others = packages[15:]
    rows.append([f"{len(others)} more", f"{sum(p['train_bytes'] for p in others) / 1e6:.1f}", "see train_demo.json"])
    return table(["package", "MB of text", "licence"], rows)


def stage_table(training: dict[str, Any]) -> str:
    """Settings, tokens, time and last loss of each stage."""
    rows = []
    for stage in training["stages"]:
        settings, curve = stage["settings"], stage["curve"]
        last = max([n for n, chat in enumerate(curve["chat"]) if not chat], default=len(curve["chat"]) - 1)
        kl = curve.get("index_kl")
        rows.append(
            [
                stage["name"],
                f"{settings['trains']}, {settings['selection']}",
                f"{settings['batch']} × {settings['length']}",
                str(settings["steps"]),
                f"{settings['learning_rate']:g}",
                f"{stage['tokens'] / 1e6:.1f} M",
                f"{stage['recall_share_of_tokens']:.1%}",
                f"{curve['loss'][last]:.3f}",
                f"{kl[last]:.3f}" if kl else "",
                f"{stage['seconds']:.0f} s, {device_of(stage)}",
            ]
        )
    head = ["stage", "trains, attention", "batch", "steps", "rate", "tokens", "recall", "loss", "index KL", "time"]
    return table(head, rows)


def perplexity_table(model: dict[str, Any]) -> str:
    """Held-out likelihood under every selection."""
    by_mode = model["perplexity"]
    parts = list(by_mode["dense"]["by_position"])
    rows = compared({mode: by_mode[mode] for mode in MODES}, by_mode["dense"]["perplexity"])
    for row in rows:
        row += [f"{by_mode[row[0]]['by_position'][part]['perplexity']:.3f}" for part in parts]
    return table(["attention", "perplexity", "bits per byte", "against dense", *(f"at {part}" for part in parts)], rows)


def precision_table(model: dict[str, Any]) -> str:
    """The table of FP8 against bfloat16."""
    names = ("bfloat16 weights", "FP8 weights alone", "FP8 weights and activations")
    by_weights = {name: model["precision"][name] for name in names}
    base = by_weights["bfloat16 weights"]["perplexity"]
    return table(["weights", "perplexity", "bits per byte", "against bfloat16"], compared(by_weights, base))


def stage_perplexity_table(model: dict[str, Any]) -> str:
    """The table of perplexity after each stage, on its bfloat16 weights."""
    by_stage = model["stages"] | {"last stage, indexer (what ships)": model["precision"]["bfloat16 weights"]}
    base = by_stage["dense stage, dense"]["perplexity"]
    return table(["weights, attention", "perplexity", "bits per byte", "against the first"], compared(by_stage, base))


def compared(figures: dict[str, Any], base: float) -> list[list[str]]:
    """Rows of name, perplexity, bits per byte and relative difference to a perplexity."""
    return [
        [name, f"{row['perplexity']:.3f}", f"{row['bits_per_byte']:.4f}", f"{row['perplexity'] / base - 1:+.2%}"]
        for name, row in figures.items()
    ]


def needle_table(model: dict[str, Any]) -> str:
    """Needles found by context length and attention."""
    shares = model["needles"]["by_length"]
    lengths = list(shares["dense"])
    rows = [[mode, *(f"{shares[mode][length]:.0%}" for length in lengths)] for mode in NEEDLE_MODES]
    far = model["needles"]["by_distance"]
    parts = list(far["dense"])
    more = [[mode, *(f"{far[mode][part]:.0%}" for part in parts)] for mode in NEEDLE_MODES]
    return table(["context", *lengths], rows) + "\n\n" + table(["distance", *parts], more)


def selection_table(model: dict[str, Any]) -> str:
    """Layer by layer: recall, and the mass of attention on each choice."""
    columns = ("recall", "mass", "mass_oracle", "mass_recent", "mass_random")
    rows = [[str(row["layer"]), *(f"{row[name]:.3f}" for name in columns)] for row in model["selection"]]
    return table(["layer", "recall", "mass: indexer", "best possible", "last k", "random"], rows)


def verdict(model: dict[str, Any]) -> str:
    """Sentences on whether the indexer meets its target, which the numbers decide."""
    perplexities = {mode: row["perplexity"] for mode, row in model["perplexity"].items()}
    loss = {mode: row / perplexities["dense"] - 1 for mode, row in perplexities.items()}
    within = "within" if loss["indexer"] <= 0.01 else "NOT within"
    stages = {name: row["perplexity"] for name, row in model["stages"].items()}
    warm = stages["dense stage, warm indexer"] / stages["dense stage, dense"] - 1
    cost = {mode: f"{row:+.2%}" for mode, row in loss.items()}
    return (
        f"Sparse attention is {within} 1% of dense: {cost['indexer']} perplexity on the same weights, last trained "
        f"sparse; on those of the dense stage, which were not, the warm indexer changes it by {warm:+.2%}. The last "
        f"{model['settings']['index_topk']} positions alone cost {cost['recent']}, with the first position among them "
        f"{cost['recent and first']}, random ones {cost['random']}, and the wrong RoPE layout in the indexer "
        f"{cost['interleaved rope']}."
    )
