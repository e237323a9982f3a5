"""What an approximation changed: one ruler for FP8, INT8, INT4, another k, another tie rule, reused indices.

A trace records what every layer of a run chose and computed; `compare` holds a run against a reference run.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

EQUAL_FIELDS = ("vocab_size", "num_hidden_layers", "hidden_size", "first_k_dense_replace")
"""Fields of the config in which two models must agree for their traces to be comparable."""


OF_LAYER = ("attn.topk", "attn.index_scores", "attn.attention", "ffn.experts", "ffn.expert_weights", "hidden")
"""Names of what a trace holds of a layer, among the values of a step; see `dsv32_jax.model.taps`."""
TAPS = ("embedded", *(f"layers.*.{name}" for name in OF_LAYER))
"""And of all layers."""


@dataclasses.dataclass(frozen=True, repr=False)
class Trace:
    """What every layer did over the tokens of one sequence; NumPy arrays over T tokens and L layers (M with experts).

    Attributes:
      hidden: float32 [L + 1, T, D], the residual stream after the embedding and after each layer.
      topk: int32 [L, T, K], positions the indexer chose, ascending, then -1.
      index_scores: float32 [L, T, T], the indexer's score of each position, -inf after the token's own.
      attention: float32 [L, T, T], attention probabilities over all visible positions, mean over heads (what a dense
        attention would have looked at, whichever ran).
      experts: int32 [M, T, experts], chosen experts, ascending.
      expert_weights: float32 [M, T, experts], their routing weights, in that order.
      logits: float32 [T, V].
    """

    hidden: np.ndarray
    topk: np.ndarray
    index_scores: np.ndarray
    attention: np.ndarray
    experts: np.ndarray
    expert_weights: np.ndarray
    logits: np.ndarray

    def __repr__(self) -> str:
        """The sizes, and what the shares of `topk` and `attention` come to, instead of millions of numbers."""
        layers, tokens, k = self.topk.shape
        sizes = f"{layers} layers, {tokens} tokens, {k} chosen positions, {len(self.experts)} layers with experts"
        on_chosen = ", ".join(f"{mass(*pair):.3f}" for pair in zip(self.attention, self.topk, strict=True))
        arrays = "\n".join(
            f"  {field.name:<15} {array.dtype} {list(array.shape)}"
            for field in dataclasses.fields(self)
            if (array := getattr(self, field.name)) is not None
        )
        return f"Trace of {sizes}\n{arrays}\n  attention that falls on the chosen positions, by layer: {on_chosen}"

    @staticmethod
    def from_taps(logits: Any, values: Mapping[str, Any], tokens: int) -> "Trace":
        """From the values of the taps `TAPS`, and the logits, of one sequence whose first `tokens` rows are real."""
        layers = 1 + max(int(name.split(".")[1]) for name in values if name.startswith("layers."))

        def stacked(name: str, width: int | None = None) -> np.ndarray:
            names = [f"layers.{layer}.{name}" for layer in range(layers)]
            rows = [np.asarray(values[name])[:tokens] for name in names if name in values]
            return np.stack(rows)[..., :width] if rows else np.zeros((0, tokens, 0), np.float32)

        topk = stacked("attn.topk").astype(np.int32)
        ascending = np.sort(np.where(topk < 0, np.iinfo(np.int32).max, topk), axis=-1)
        experts, weights = stacked("ffn.experts").astype(np.int32), stacked("ffn.expert_weights")
        order = np.argsort(experts, axis=-1)
        embedded = np.asarray(values["embedded"], np.float32)[None, :tokens]
        return Trace(
            hidden=np.concatenate([embedded, stacked("hidden").astype(np.float32)]),
            topk=np.where(ascending == np.iinfo(np.int32).max, -1, ascending),
            index_scores=stacked("attn.index_scores", tokens),
            attention=stacked("attn.attention", tokens),
            experts=np.take_along_axis(experts, order, axis=-1),
            expert_weights=np.take_along_axis(weights, order, axis=-1),
            logits=np.asarray(logits, np.float32)[:tokens],
        )


def membership(chosen: np.ndarray, size: int) -> np.ndarray:
    """Index lists [..., K] with -1 for none -> bool [..., size]."""
    mask = np.zeros((*chosen.shape[:-1], size + 1), bool)
    np.put_along_axis(mask, np.where(chosen < 0, size, chosen), True, axis=-1)
    return mask[..., :size]


def recall(reference: np.ndarray, chosen: np.ndarray, size: int) -> np.ndarray:
    """Share of each row of `reference` [..., K] that `chosen` [..., K'] holds too; 1 where the reference is empty."""
    wanted, got = membership(reference, size), membership(chosen, size)
    count = wanted.sum(-1)
    return np.where(count == 0, 1.0, (wanted & got).sum(-1) / np.maximum(count, 1))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(softmax(reference) || softmax(other)) over the last axis, in nats; computed in float64."""
    p, q = log_softmax(reference), log_softmax(other)
    return (np.exp(p) * (p - q)).sum(-1)


def compare(reference: Trace, other: Trace) -> dict[str, Any]:
    """How far `other` is from `reference` over the same tokens.

    Returns:
      A JSON-able dict:
        tokens: int.
        layers: for each layer, `topk_recall` and `topk_sets_equal` (the reference's chosen positions found in the
          other's), `attention_mass` (the share of the reference's own dense attention that falls on the other's set)
          beside `attention_mass_reference` (on its own set), `hidden_relative_rms`, and in layers with experts
          `expert_recall`.
        kl, kl_max: KL of the logits in nats, mean and maximum over tokens.
        top1_agreement: share of tokens with the same best logit.
        logits_relative_rms: rms of the difference over rms of the reference.

    Raises:
      ValueError: the runs differ in tokens, layers or vocabulary.
    """
    if reference.logits.shape != other.logits.shape or reference.hidden.shape != other.hidden.shape:
        raise ValueError(
            f"runs differ in shape: logits {reference.logits.shape} and {other.logits.shape}, "
            f"hidden {reference.hidden.shape} and {other.hidden.shape}"
        )
    layers, tokens = reference.topk.shape[:2]
    first_moe = layers - reference.experts.shape[0]
    num_experts = int(max(reference.experts.max(initial=-1), other.experts.max(initial=-1))) + 1
    rows = []
    for layer in range(layers):
        shares = recall(reference.topk[layer], other.topk[layer], tokens)
        row: dict[str, Any] = {
            "layer": layer,
            "topk_recall": float(shares.mean()),
            "topk_sets_equal": float(same_sets(reference.topk[layer], other.topk[layer], tokens).mean()),
            "attention_mass": mass(reference.attention[layer], other.topk[layer]),
            "attention_mass_reference": mass(reference.attention[layer], reference.topk[layer]),
            "hidden_relative_rms": relative_rms(reference.hidden[layer + 1], other.hidden[layer + 1]),
        }
        if layer >= first_moe:
            chosen = [run.experts[layer - first_moe] for run in (reference, other)]
            row["expert_recall"] = float(recall(chosen[0], chosen[1], num_experts).mean())
        rows.append(row)
    kl = kl_divergence(reference.logits, other.logits)
    return {
        "tokens": tokens,
        "layers": rows,
        "kl": float(kl.mean()),
        "kl_max": float(kl.max()),
        "top1_agreement": float((reference.logits.argmax(-1) == other.logits.argmax(-1)).mean()),
        "logits_relative_rms": relative_rms(reference.logits, other.logits),
    }


def same_sets(a: np.ndarray, b: np.ndarray, size: int) -> np.ndarray:
    """Whether index lists [..., K] and [..., K'] hold the same set."""
    return (membership(a, size) == membership(b, size)).all(-1)


def mass(attention: np.ndarray, chosen: np.ndarray) -> float:
    """Mean over tokens of the attention [T, T] that falls on the chosen positions [T, K]."""
    return float((attention * membership(chosen, attention.shape[-1])).sum(-1).mean())


def relative_rms(reference: np.ndarray, other: np.ndarray) -> float:
    """rms(other - reference) / rms(reference)."""
    difference = other.astype(np.float64) - reference
    return float(np.sqrt((difference**2).mean() / np.maximum((reference.astype(np.float64) ** 2).mean(), 1e-300)))
