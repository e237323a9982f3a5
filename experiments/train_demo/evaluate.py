"""Evaluates the trained model: held-out likelihood and needles, under every selection of the same size."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax import fidelity
from dsv32_jax.common.reading import read_json
from dsv32_jax.experiments.results import environment, write_json
from dsv32_jax.experiments.studies import held_out
from dsv32_jax.experiments.train_demo.recall import HELD_OUT_ANIMALS, fact
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.loading import find, load
from dsv32_jax.generate.tokenizer import Tokenizer
from dsv32_jax.model import variants
from dsv32_jax.model.model import DeepseekV32
from dsv32_jax.model.parts import Parts
from dsv32_jax.model.sequence import Run, hidden_states, log_likelihoods

MODES: dict[str, dict[str, Callable[..., Any]]] = {
    "dense": {},
    "indexer": {},
    "oracle": {"index_select": variants.oracle},
    "recent and first": {"index_select": variants.recent_and_first},
    "recent": {"index_select": variants.recent},
    "random": {"index_select": variants.random},
    "interleaved rope": {"index_rope": variants.VARIANTS["index_rope"]["interleaved"]},
}
"""The parts that each mode replaces; the last is a bug: the first official demo's RoPE in the indexer."""
NEEDLE_MODES = ("dense", "indexer", "recent and first", "recent", "interleaved rope")
BUCKETS = ((1, 256), (256, 1024), (1024, 2048), (2048, 4096))
"""Positions of the predicted tokens; in the first bucket, a selection of k = 256 leaves out nothing."""
BATCH = 8
FACTS = 4
"""Facts in a needle's window; the question asks for one, the others only look like it."""
DISTANCES = (256, 512, 1024, 2048, 4096)

Score = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def scorer(model: DeepseekV32, mode: str, k: int, compute_dtype: str, act_quant: bool) -> Score:
    """Makes a function of ids [N, T] that returns the log-likelihood float32 [N, T - 1] of each next token, and bool
    [N, T - 1] whether that is the likeliest.

    Args:
      model: the model to score with.
      mode: one of `MODES`.
      k: positions that a selection keeps.
      compute_dtype: of activations.
      act_quant: quantise activations as the official FP8 code does.
    """
    run = Run("dense" if mode == "dense" else "sparse", k, compute_dtype, act_quant, Parts(**MODES[mode]))

    @jax.jit
    def score(model: DeepseekV32, ids: jax.Array):
        states, _ = hidden_states(model, ids, run)
        states, targets = states[:, :-1], ids[:, 1:]
        likeliest = jnp.argmax(states.astype(jnp.float32) @ model.head.astype(jnp.float32).T, -1)
        return log_likelihoods(states, model.head, targets), likeliest == targets

    def run_all(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        likelihoods, right = [], []
        for start in range(0, len(ids), BATCH):
            rows = ids[start : start + BATCH]
            padded = np.pad(rows, ((0, BATCH - len(rows)), (0, 0)))
            likelihood, correct = score(model, jnp.asarray(padded))
            likelihoods.append(np.asarray(likelihood)[: len(rows)])
            right.append(np.asarray(correct)[: len(rows)])
        return np.concatenate(likelihoods), np.concatenate(right)

    return run_all


def summarise(likelihood: np.ndarray, ids: np.ndarray, bytes_of: np.ndarray) -> dict[str, Any]:
    """Perplexity (a token) and bits per byte over all predicted tokens, and by position.

    Args:
      likelihood: float32 [N, T - 1], natural logarithms.
      ids: int32 [N, T].
      bytes_of: int64 [V].
    """
    sizes = bytes_of[ids[:, 1:]]

    def over(part: slice) -> dict[str, float]:
        total = -likelihood[:, part].sum(dtype=np.float64)
        return {
            "perplexity": float(np.exp(total / likelihood[:, part].size)),
            "bits_per_byte": float(total / np.log(2) / sizes[:, part].sum()),
        }

    by_position = {f"{low}-{high}": over(slice(low - 1, high - 1)) for low, high in BUCKETS if low < ids.shape[1]}
    return over(slice(None)) | {"by_position": by_position}


@dataclasses.dataclass(frozen=True)
class Needle:
    """One window with a hidden fact and a question about it.

    Attributes:
      ids: int32 [context]; zeros behind the answer, if anything, which causality hides from it.
      context: the length that was asked for.
      length: tokens up to the answer's end (fewer where the text is short).
      answer: position of the answer's first token.
      distance: tokens between the fact's end and the answer.
    """

    ids: np.ndarray
    context: int
    length: int
    answer: int
    distance: int


def needles(tokenizer: Tokenizer, texts: np.ndarray, lengths: tuple[int, ...], each: int) -> list[Needle]:
    """Makes windows of held-out text with four facts in it, and at the end a question about one of them.

    Args:
      tokenizer: the model's.
      texts: int32 [N, T] to hide them in.
      lengths: of the contexts, question and answer included; at most T.
      each: windows of each length; the asked fact's place is spread evenly over them.
    """
    rng = np.random.default_rng(0)
    result = []
    for length in lengths:
        for n in range(each):
            hidden: dict[str, tuple[str, str]] = {}
            while len(hidden) < FACTS:
                says, asks, answer = fact(rng, HELD_OUT_ANIMALS)
                hidden[says] = (asks, answer)
            statements = [tokenizer.encode(f"\n{says}{answer}.\n") for says, (_, answer) in hidden.items()]
            asks, answer = next(iter(hidden.values()))  # the first is asked for
            question, digits = tokenizer.encode("\n" + asks), tokenizer.encode(answer)
            places = rng.uniform(0, 1, FACTS)
            places[0] = (n + 0.5) / each
            room = length - len(question) - len(digits) - sum(map(len, statements))
            text = texts[n % len(texts)][: max(1, room)]
            pieces, copied, end = [], 0, 0
            for index in np.argsort(places):
                offset = max(1, int(places[index] * len(text)))
                pieces += [text[copied:offset], statements[index]]
                copied = offset
                if index == 0:
                    end = sum(map(len, pieces))
            pieces += [text[copied:], question]
            start = sum(map(len, pieces))
            ids = np.zeros(length, np.int32)
            ids[: start + len(digits)] = np.concatenate([*pieces, digits])
            result.append(Needle(ids, length, start + len(digits), start, start - end))
    return result


def found_needles(score: Score, needles: list[Needle]) -> np.ndarray:
    """bool [N]: whether greedy decoding would generate every digit of a needle's answer."""
    is_found = np.zeros(len(needles), bool)
    for context in {needle.context for needle in needles}:
        numbers = [number for number, needle in enumerate(needles) if needle.context == context]
        right = score(np.stack([needles[number].ids for number in numbers]))[1]
        for number, row in zip(numbers, right, strict=True):
            is_found[number] = row[needles[number].answer - 1 : needles[number].length - 1].all()
    return is_found


def selection_fidelity(lm: LanguageModel, ids: np.ndarray, k: int) -> list[dict[str, float]]:
    """Measures the share of attention on the indexer's choice, in each layer, over positions that see more than k.

    It uses traces of the real step with dense attention; see `dsv32_jax.fidelity`.

    Returns:
      For each layer `recall` (of the k positions with most attention), and the attention's mass on the indexer's
      choice, on that best choice (`mass_oracle`), on the last k (`mass_recent`) and on k random ones (`mass_random`).
    """
    options = dataclasses.replace(lm.options, attention="dense", index_topk=k)
    traced = LanguageModel(lm.model, lm.config, lm.tokenizer, options)
    sums: list[dict[str, float]] = []
    rng = np.random.default_rng(0)
    for row in ids:
        trace = traced.trace(row)
        size = len(row)
        later = np.arange(k, size)
        for layer, attention in enumerate(trace.attention):
            attention, chosen = attention[later], trace.topk[layer][later]
            best = np.argpartition(-attention, k - 1, axis=-1)[:, :k]
            recent = later[:, None] - np.arange(k)
            random = np.stack([rng.choice(t + 1, k, replace=False) for t in later])
            row_of = {
                "recall": float(fidelity.recall(best, chosen, size).mean()),
                "mass": fidelity.mass(attention, chosen),
                "mass_oracle": fidelity.mass(attention, best),
                "mass_recent": fidelity.mass(attention, recent),
                "mass_random": fidelity.mass(attention, random),
            }
            if len(sums) <= layer:
                sums.append(dict.fromkeys(row_of, 0.0))
            for name, value in row_of.items():
                sums[layer][name] += value / len(ids)
    return [{"layer": layer, **row} for layer, row in enumerate(sums)]


def evaluate(
    model: str | Path,
    out: Path,
    *,
    run: Path | None = None,
    length: int = 4096,
    windows: int = 32,
    needles_each: int = 16,
    traced: int = 2,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measures every figure of the model card, and writes each to `out`: an interrupted evaluation is resumed.

    Args:
      model: a checkpoint, as `load` takes it: the one that ships.
      out: JSON; results of the same model and settings in it are kept.
      run: folder of the training run, to price FP8 and the sparse stage from its bfloat16 checkpoints.
      length: tokens of a window.
      windows: held-out windows, at most.
      needles_each: windows of each length and mode.
      traced: windows whose selection is compared with the attention, layer by layer.
      report: takes a line at a time.
    """
    lm = load(model)
    assert lm.tokenizer is not None
    k, dtype, quantised = lm.config.index_topk, lm.options.compute_dtype, lm.options.act_quant
    ids = held_out.windows(lm.tokenizer, length, windows)
    bytes_of = held_out.token_bytes(lm.tokenizer, lm.config.vocab_size)
    lengths = tuple(n for n in (k // 2, k, 2 * k, 4 * k, 8 * k, 16 * k) if n <= length)
    hidden_needles = needles(lm.tokenizer, ids, lengths, needles_each)
    settings = {
        "model": weights_digest(find(model)),
        "arithmetic": {"compute_dtype": dtype, "act_quant": quantised},
        "index_topk": k,
        "length": length,
        "windows": len(ids),
        "needles": {"each": needles_each, "facts": FACTS, "lengths": list(lengths)},
        "traced": traced,
    }
    result = read_json(out) if out.exists() else {}
    if result.get("settings") != settings:
        result = {"settings": settings, "environment": environment(), "perplexity": {}, "precision": {}, "stages": {}}
        result["bytes_per_token"] = float(bytes_of[ids[:, 1:]].mean())
        result["needles"] = {"by_length": {}, "by_distance": {}}

    def keep(part: str, name: str, value: Any) -> None:
        result[part][name] = value
        write_json(out, result)
        report(f"{part}, {name}: {value.get('perplexity', value) if isinstance(value, dict) else value}")

    for mode in MODES:
        score = scorer(lm.model, mode, k, dtype, quantised)
        if mode not in result["perplexity"]:
            keep("perplexity", mode, summarise(score(ids)[0], ids, bytes_of))
        if mode in NEEDLE_MODES and mode not in result["needles"]["by_length"]:
            is_found = found_needles(score, hidden_needles)
            result["needles"]["by_distance"][mode] = by_distance(is_found, hidden_needles)
            shares = {
                str(n): float(is_found[[needle.context == n for needle in hidden_needles]].mean()) for n in lengths
            }
            result["needles"]["by_length"][mode] = shares
            keep("needles", "by_length", result["needles"]["by_length"])
    for part, name, place, mode in (
        ("precision", "FP8 weights alone", model if quantised else None, "indexer"),
        ("precision", "bfloat16 weights", run and run / "talk", "indexer"),
        ("stages", "dense stage, dense", run and run / "long", "dense"),
        ("stages", "dense stage, warm indexer", run and run / "warmup", "indexer"),
        ("stages", "sparse stage, indexer", run and run / "sparse", "indexer"),
    ):
        if place is not None and name not in result[part]:
            score = scorer(load(place).model, mode, k, dtype, False)
            keep(part, name, summarise(score(ids)[0], ids, bytes_of))
    if quantised:
        result["precision"]["FP8 weights and activations"] = result["perplexity"]["indexer"]
    if "selection" not in result:
        result["selection"] = selection_fidelity(lm, ids[:traced], k)
    write_json(out, result)
    return result


def weights_digest(directory: Path) -> str:
    """SHA-256 over the tensor files of a checkpoint."""
    digest = hashlib.sha256()
    for file in sorted(directory.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def by_distance(is_found: np.ndarray, needles: list[Needle]) -> dict[str, float]:
    """Share of needles found, by the distance between fact and answer."""
    distances = np.array([needle.distance for needle in needles])
    shares = {}
    for low, high in zip((0, *DISTANCES), DISTANCES, strict=False):
        inside = (distances >= low) & (distances < high)
        if inside.any():
            shares[f"{low}-{high}"] = float(is_found[inside].mean())
    return shares
