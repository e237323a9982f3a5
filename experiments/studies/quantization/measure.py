"""Measures how far a model is from the base: the shipped weights dequantised to bfloat16, activations unquantised.

Layers run one by one, each as a program of its own. Layers of one structure share a program, so that a model whose
weights were quantised and then dequantised needs no compiling, and a model that only differs from some layer on starts
with that layer.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax import fidelity
from dsv32_jax.config import ModelConfig
from dsv32_jax.convert.conversion import nbytes
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.model.model import DecoderLayer, DeepseekV32
from dsv32_jax.model.params import is_linear, named_parameters, replace_parameters
from dsv32_jax.model.sequence import Run, Sequences, decoder_layer, log_likelihoods, product
from pallas_kernels.matmul import dense

BATCH = 4
PLAIN_RUN = Run()
"""Float32, the indexer's selection, nothing quantised but the weights."""

State = tuple[jax.Array, jax.Array]
"""Residual and update [B * T, D] before a layer."""


def dequantised(model: DeepseekV32) -> DeepseekV32:
    """The same weights with every linear a float32 array: one structure, whatever the schemes were."""
    parameters = named_parameters(model)
    plain = replace_parameters(
        model, {path: dense(leaf, jnp.float32) if is_linear(path) else leaf for path, leaf in parameters.items()}
    )
    plain.config = model.config.replace(quantization_config=None)
    return plain


def megabytes(model: DeepseekV32) -> dict[str, float]:
    """10^6 bytes of the model's linears and of everything else, the MTP module included."""
    sizes = {"linears": 0, "rest": 0}
    for path, leaf in named_parameters(model).items():
        sizes["linears" if is_linear(path) else "rest"] += nbytes(leaf)
    sizes_in_mb = {name: size / 1e6 for name, size in sizes.items()}
    return sizes_in_mb | {"total": sizes_in_mb["linears"] + sizes_in_mb["rest"]}


@partial(jax.jit, static_argnames=("config", "run", "shape"))
def _layer(layer: DecoderLayer, state: State, config: ModelConfig, run: Run, shape: tuple[int, int]) -> State:
    return decoder_layer(layer, *state, 0, Sequences(config, run, *shape))[:2]


def forward(model: DeepseekV32, ids: np.ndarray, run: Run, first: int = 0, state: State | None = None) -> list[State]:
    """Computes the states before each layer from the `first` on, and after the last.

    Args:
      model: any weights.
      ids: int32 [B, T].
      run: how to compute.
      first: the layer to begin with.
      state: the state before it; needed unless `first` is 0.
    """
    if first == 0:
        embedded = model.embed[ids.reshape(-1)].astype(run.compute_dtype)
        state = embedded, jnp.zeros_like(embedded)
    assert state is not None
    states = [state]
    for layer in model.layers[first:]:
        states.append(_layer(layer, states[-1], model.config, run, ids.shape))
    return states


@partial(jax.jit, static_argnames=("config", "run", "shape"))
def _hidden(state: State, norm: jax.Array, config: ModelConfig, run: Run, shape: tuple[int, int]) -> jax.Array:
    """States after the final norm [B, T, D]."""
    numerics = Sequences(config, run, *shape).numerics
    return numerics.add_rms_norm(*state, norm, config.rms_norm_eps)[1].reshape(*shape, -1)


@jax.jit
def _likeliest(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """int32 [B, T]: the likeliest next token."""
    return jnp.argmax(hidden.astype(jnp.float32) @ head.astype(jnp.float32).T, -1)


@jax.jit
def _compare(
    hidden: jax.Array, head: jax.Array, base_hidden: jax.Array, base_head: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-likelihood, KL(base || model) in nats and whether both think the same token likeliest: each [B, T - 1]."""

    def logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return product("btd,vd->btv", hidden.astype(jnp.float32), head.astype(jnp.float32))

    model_logits, base_logits = logits(hidden, head), logits(base_hidden, base_head)
    p, q = jax.nn.log_softmax(base_logits), jax.nn.log_softmax(model_logits)
    return (
        log_likelihoods(hidden, head, targets),
        (jnp.exp(p) * (p - q)).sum(-1),
        model_logits.argmax(-1) == base_logits.argmax(-1),
    )


class Ruler:
    """Windows with the base's results for them, with which models are compared.

    Args:
      base: with plain arrays, see `dequantised`.
      ids: int32 [windows, T], a multiple of `BATCH` of them.
      keep: whether to keep the base's states before each layer, so that models can be measured from a later layer on.
    """

    def __init__(self, base: DeepseekV32, ids: np.ndarray, keep: bool = False):
        self.head = base.head
        self.batches = [ids[start : start + BATCH] for start in range(0, len(ids), BATCH)]
        states = [forward(base, rows, PLAIN_RUN) for rows in self.batches]
        self.before = states if keep else [[] for _ in states]
        self.hidden = [
            self._hidden(base, states_of_batch[-1], rows)
            for states_of_batch, rows in zip(states, self.batches, strict=True)
        ]
        self.likelihood = self._compared(base, self.hidden)[0]

    @staticmethod
    def _hidden(model: DeepseekV32, state: State, rows: np.ndarray) -> jax.Array:
        return _hidden(state, model.norm, model.config, PLAIN_RUN, rows.shape)[:, :-1]

    def _compared(self, model: DeepseekV32, hidden: list[jax.Array]) -> list[np.ndarray]:
        rows = [
            _compare(model_hidden, model.head, base_hidden, self.head, jnp.asarray(ids[:, 1:]))
            for model_hidden, base_hidden, ids in zip(hidden, self.hidden, self.batches, strict=True)
        ]
        return [np.concatenate(list(map(np.asarray, column))) for column in zip(*rows, strict=True)]

    def measure(self, model: DeepseekV32, run: Run = PLAIN_RUN, first: int = 0) -> dict[str, float]:
        """`perplexity`, and against the base: its `relative_loss`, the standard error of that, `kl`, `top1_agreement`.

        Args:
          model: the model to measure.
          run: how to compute.
          first: the first layer in which the model differs from the base; it starts with the base's states before that.
        """
        hidden = []
        for rows, before in zip(self.batches, self.before, strict=True):
            state = forward(model, rows, run, first, before[first] if first else None)[-1]
            hidden.append(self._hidden(model, state, rows))
        return self.summary(*self._compared(model, hidden))

    def of_logits(self, logits: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The arguments of `summary`, arrays [T - 1], from logits [T, V] that another program computed for a window."""
        logits, batch, row = logits[:-1], *divmod(window, BATCH)
        base = np.asarray(self.hidden[batch][row], np.float32) @ np.asarray(self.head, np.float32).T
        targets = self.batches[batch][row, 1:, None]
        likelihood = np.take_along_axis(fidelity.log_softmax(logits), targets, -1)[:, 0]
        return likelihood, fidelity.kl_divergence(base, logits), base.argmax(-1) == logits.argmax(-1)

    def summary(self, likelihood: np.ndarray, kl: np.ndarray, same: np.ndarray) -> dict[str, float]:
        """Summarises the results of each token, arrays [windows, T - 1] of the ruler's first windows."""
        losses = (self.likelihood[: len(likelihood)] - likelihood).astype(np.float64)
        return {
            "perplexity": float(np.exp(-likelihood.mean(dtype=np.float64))),
            "relative_loss": float(np.expm1(losses.mean())),
            "relative_loss_error": float(losses.std() / np.sqrt(losses.size)),
            "kl": float(kl.mean(dtype=np.float64)),
            "top1_agreement": float(same.mean()),
        }


def score(model: DeepseekV32, run: Run, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A `Score` for `dsv32_jax.experiments.train_demo.evaluate.found_needles`, which needs no likelihoods."""
    right = []
    for start in range(0, len(ids), BATCH):
        rows = ids[start : start + BATCH]
        padded = np.pad(rows, ((0, BATCH - len(rows)), (0, 0)))
        state = forward(model, padded, run)[-1]
        likeliest = _likeliest(Ruler._hidden(model, state, padded), model.head)
        right.append(np.asarray(likeliest)[: len(rows)] == rows[:, 1:])
    return np.zeros((0, 0)), np.concatenate(right)


def trace(lm: LanguageModel, model: DeepseekV32, act_quant: bool, ids: np.ndarray) -> fidelity.Trace:
    """A trace of the real step over one window, in float32."""
    options = dataclasses.replace(lm.options, compute_dtype="float32", act_quant=act_quant, cache_dtype=None)
    return LanguageModel(model, model.config, None, options).trace(ids)


def by_layer(reference: fidelity.Trace, other: fidelity.Trace) -> dict[str, Any]:
    """`fidelity.compare`, and in each layer `attention_kl`: of the dense attention, in nats, mean over tokens."""
    comparison = fidelity.compare(reference, other)
    for row, p, q in zip(comparison["layers"], reference.attention, other.attention, strict=True):
        p, q = p.astype(np.float64), q.astype(np.float64)
        terms = np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300))), 0)
        row["attention_kl"] = float(terms.sum(-1).mean())
    return comparison
