"""Measures what a routing plan that is kept for some steps costs: `python -m experiments.studies.plan_reuse`.

In decoding, each sequence adds a token a step. A plan made every N steps sends the tokens in between to the experts
that their sequence's last routed token chose, weighted by their own scores. This takes the router and the sort out of
those steps. This program measures its effect on the logits, on held-out text, against a fresh plan at every step.

A whole prompt computes this in one step: token t takes the choice of token t - t % N, in every layer.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.common.progress import tracked
from dsv32_jax.experiments import command_line
from dsv32_jax.experiments.results import RESULTS, environment, write_json
from dsv32_jax.experiments.studies import held_out
from dsv32_jax.fidelity import kl_divergence, log_softmax, recall
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.loading import load
from pallas_kernels.moe_dispatch import route
from pallas_kernels.moe_dispatch.reference import weights_of

RESULT = RESULTS / "plan_reuse.json"
LENGTH, WINDOWS = 512, 16
"""A power of two, and no longer than what one step takes: rows of the step are positions."""
PERIODS = (2, 4, 8, 16)


def reusing(period: int) -> Callable[..., Any]:
    """A `route` whose tokens take the experts of the first of their `period` tokens, weighted by their own scores.

    Row t of a step is position t.
    """
    return functools.partial(route_again, period=period)


def route_again(
    logits: jax.Array, bias: jax.Array, *, period: int, normalize: bool, scaling_factor: float, **choice: Any
) -> tuple[jax.Array, jax.Array]:
    """Experts int32 [T, K] of an earlier token and float32 weights [T, K] of the token itself; see `reusing`."""
    fresh, _ = route(logits, bias, normalize=normalize, scaling_factor=scaling_factor, **choice)
    experts = fresh[jnp.arange(len(logits)) // period * period]
    return experts, weights_of(jax.nn.sigmoid(logits), experts, normalize, scaling_factor)


def agreement(experts: np.ndarray, distance: int, num_experts: int) -> list[float]:
    """For each layer of experts [M, T, K]: the share of a token's choice that the token `distance` before made too."""
    return [float(recall(layer[distance:], layer[:-distance], num_experts).mean()) for layer in experts]


def measure(lm: LanguageModel, windows: np.ndarray, periods: Sequence[int]) -> dict[str, Any]:
    """Measures the agreement of neighbouring tokens, and for each period the effect of reuse on the logits.

    Args:
      lm: a model with experts.
      windows: int32 [windows, length] of token ids.
      periods: steps for which a plan is kept.
    """
    models = {period: lm.with_parts(route=reusing(period)) for period in periods}
    agreements: list[list[list[float]]] = []
    measured: dict[int, list[tuple[float, float, float]]] = {period: [] for period in periods}
    for ids in tracked(list(windows), "reading", "windows"):
        trace = lm.trace(ids)
        agreements.append([agreement(trace.experts, 2**n, lm.config.n_routed_experts) for n in range(4)])
        target = ids[1:, None]
        likelihood = log_likelihood(trace.logits[:-1], target)
        for period, model in models.items():
            logits = model.logits(ids)[0]
            measured[period].append(
                (
                    kl_divergence(trace.logits, logits).mean(),
                    (trace.logits.argmax(-1) == logits.argmax(-1)).mean(),
                    (likelihood - log_likelihood(logits[:-1], target)).mean(),
                )
            )
    rows = []
    for period in periods:
        kl, same, loss = np.mean(measured[period], axis=0)
        rows.append(
            {
                "period": period,
                "kl": float(kl),
                "top1_agreement": float(same),
                "relative_perplexity": float(np.expm1(loss)),
            }
        )
    return {
        "windows": len(windows),
        "length": int(windows.shape[1]),
        "chance_agreement": lm.config.num_experts_per_tok / lm.config.n_routed_experts,
        "agreement": {str(2**n): list(map(float, layers)) for n, layers in enumerate(np.mean(agreements, axis=0))},
        "reuse": rows,
    }


def log_likelihood(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """float64 [T] of targets [T, 1] under logits [T, V]."""
    return np.take_along_axis(log_softmax(logits), targets, -1)[:, 0]


def main() -> None:
    """The command."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--model", default="demo", help="a checkpoint; default: the demo model")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="texts")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    lm = load(arguments.model)
    assert lm.tokenizer is not None
    result = measure(lm, held_out.windows(lm.tokenizer, LENGTH, arguments.windows), PERIODS)
    write_json(arguments.out, {**environment(), "model": arguments.model, **result})
    print("steps  KL (nats)  same best token  perplexity")
    for row in result["reuse"]:
        shares = f"{row['top1_agreement']:>15.1%}  {row['relative_perplexity']:>+10.1%}"
        print(f"{row['period']:>5}  {row['kl']:>9.4f}  {shares}")
    mean = {distance: np.mean(layers) for distance, layers in result["agreement"].items()}
    print("agreement:", ", ".join(f"{share:.0%} at distance {distance}" for distance, share in mean.items()))


if __name__ == "__main__":
    command_line.run(main)
