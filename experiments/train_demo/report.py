"""Figures and the model card, made from the results and from nothing else."""

import json
from pathlib import Path
from string import Template
from typing import Any

from dsv32_jax.common.units import human
from dsv32_jax.config import ModelConfig
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.pages import drawing, table
from dsv32_jax.experiments.results import RESULTS, read_result, write_json
from dsv32_jax.experiments.train_demo.evaluate import MODES, NEEDLE_MODES
from dsv32_jax.generate.loading import DEMO

CARD = Path(__file__).parent / "card.md"
TRAINING, MODEL = "train_demo", "demo_model"
KEPT_POINTS = 400


def collect(run: Path) -> None:
    """A run's log and summaries as `experiments/results/train_demo.json`."""
    log = run / "log.jsonl"
    if not log.exists():
        raise UserError(f"{run}: has no log.jsonl; give the folder of a run")
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    stages = []
    for name in dict.fromkeys(row["stage"] for row in rows):
        own = [row for row in rows if row["stage"] == name]
        summary = run / f"{name}.json"
        if not summary.exists():
            raise UserError(f"{run}: stage {name} is not finished")
        # A resumed stage logged some steps twice: the later line counts, but the time of both was spent.
        ends = [n for n in range(len(own)) if n + 1 == len(own) or own[n + 1]["seconds"] < own[n]["seconds"]]
        steps = list({row["step"]: row for row in own}.values())
        kept = steps[:: -(-len(steps) // KEPT_POINTS)]
        kept += steps[-1:] if steps[-1] not in kept else []
        stage = json.loads(summary.read_text(encoding="utf-8"))
        stage["seconds"] = round(sum(own[n]["seconds"] for n in ends), 1)
        stage["processes"] = len(ends)
        stage["tokens"] = stage["settings"]["steps"] * stage["settings"]["batch"] * stage["settings"]["length"]
        columns = [column for column in kept[0] if column not in ("stage", "tokens")]
        curve = {column: [row.get(column) for row in kept] for column in columns}
        stages.append(stage | {"name": name, "curve": curve})
    manifest = run / "corpus.json"
    corpus = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else None
    write_json(RESULTS / f"{TRAINING}.json", {"stages": stages, "corpus": corpus})


def draw(directory: Path = RESULTS) -> list[Path]:
    """Loss curves, needles by distance, attention mass by layer; returns the files."""
    plt, save = drawing(directory)
    training, model = read_result(TRAINING), read_result(MODEL)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    before = 0
    for stage in training["stages"]:
        curve = stage["curve"]
        a_step = stage["settings"]["batch"] * stage["settings"]["length"]
        points = [n for n, chat in enumerate(curve["chat"]) if not chat] or range(len(curve["chat"]))
        tokens = [(before + curve["step"][n] * a_step) / 1e6 for n in points]
        left.plot(tokens, [curve["loss"][n] for n in points], label=stage["name"], linewidth=1)
        if "index_kl" in curve:
            right.plot(tokens, [curve["index_kl"][n] for n in points], label=stage["name"], linewidth=1)
        before += stage["tokens"]
    left.set(xlabel="million tokens", ylabel="training loss, nats a token", ylim=(None, 5), title="language loss")
    right.set(xlabel="million tokens", ylabel="KL, nats (mean over layers)", yscale="log", title="indexer's loss")
    left.legend(), right.legend()
    files = [save(figure, "train_demo_loss")]

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    for mode in NEEDLE_MODES:
        found = model["needles"]["by_length"][mode]
        left.plot(list(map(int, found)), list(found.values()), marker="o", label=mode)
    left.axvline(model["settings"]["index_topk"], color="grey", linestyle=":", label="index_topk")
    left.set(xscale="log", xlabel="context, tokens", ylabel="needles found", ylim=(-0.03, 1.03), title="needles")
    left.set_xticks(list(map(int, found)), list(found))
    left.minorticks_off()
    layers = [row["layer"] for row in model["selection"]]
    for column, label in {
        "mass_oracle": "best possible", "mass": "indexer", "mass_recent": "last k", "mass_random": "random",
    }.items():  # fmt: skip
        right.plot(layers, [row[column] for row in model["selection"]], marker="o", label=label)
    right.set(
        xlabel="layer", ylabel="attention mass kept", ylim=(0, 1.03), title=f"k = {model['settings']['index_topk']}"
    )
    left.legend(), right.legend()
    return [*files, save(figure, "demo_model_selection")]


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
    """What a result was measured on."""
    environment = result["environment"]
    return environment["device"] + " CPU" * (environment["platform"] == "cpu")


def architecture(config: ModelConfig) -> str:
    """The sizes that a reader asks for."""
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
    rest = packages[15:]
    rows.append([f"{len(rest)} more", f"{sum(p['train_bytes'] for p in rest) / 1e6:.1f}", "see train_demo.json"])
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
    found = model["perplexity"]
    parts = list(found["dense"]["by_position"])
    rows = compared({mode: found[mode] for mode in MODES}, found["dense"]["perplexity"])
    for row in rows:
        row += [f"{found[row[0]]['by_position'][part]['perplexity']:.3f}" for part in parts]
    return table(["attention", "perplexity", "bits per byte", "against dense", *(f"at {part}" for part in parts)], rows)


def precision_table(model: dict[str, Any]) -> str:
    """What FP8 costs."""
    names = ("bfloat16 weights", "FP8 weights alone", "FP8 weights and activations")
    found = {name: model["precision"][name] for name in names}
    base = found["bfloat16 weights"]["perplexity"]
    return table(["weights", "perplexity", "bits per byte", "against bfloat16"], compared(found, base))


def stage_perplexity_table(model: dict[str, Any]) -> str:
    """What the stages did, on their bfloat16 weights."""
    found = model["stages"] | {"last stage, indexer (what ships)": model["precision"]["bfloat16 weights"]}
    base = found["dense stage, dense"]["perplexity"]
    return table(["weights, attention", "perplexity", "bits per byte", "against the first"], compared(found, base))


def compared(found: dict[str, Any], base: float) -> list[list[str]]:
    """Rows of name, perplexity, bits per byte and relative difference to a perplexity."""
    return [
        [name, f"{own['perplexity']:.3f}", f"{own['bits_per_byte']:.4f}", f"{own['perplexity'] / base - 1:+.2%}"]
        for name, own in found.items()
    ]


def needle_table(model: dict[str, Any]) -> str:
    """Needles found by context length and attention."""
    found = model["needles"]["by_length"]
    lengths = list(found["dense"])
    rows = [[mode, *(f"{found[mode][length]:.0%}" for length in lengths)] for mode in NEEDLE_MODES]
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
    """Whether the indexer met what was asked of it, in a sentence that the numbers decide."""
    found = {mode: own["perplexity"] for mode, own in model["perplexity"].items()}
    loss = {mode: own / found["dense"] - 1 for mode, own in found.items()}
    within = "within" if loss["indexer"] <= 0.01 else "NOT within"
    stages = {name: own["perplexity"] for name, own in model["stages"].items()}
    warm = stages["dense stage, warm indexer"] / stages["dense stage, dense"] - 1
    cost = {mode: f"{own:+.2%}" for mode, own in loss.items()}
    return (
        f"Sparse attention is {within} 1% of dense: {cost['indexer']} perplexity on the same weights, last trained "
        f"sparse; on those of the dense stage, which were not, the warm indexer changes it by {warm:+.2%}. The last "
        f"{model['settings']['index_topk']} positions alone cost {cost['recent']}, with the first position among them "
        f"{cost['recent and first']}, random ones {cost['random']}, and the wrong RoPE layout in the indexer "
        f"{cost['interleaved rope']}."
    )
