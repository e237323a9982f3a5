"""Losses, optimiser and one step of training."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsv32_jax.config import ModelConfig
from dsv32_jax.experiments.train_demo.sizes import Stage
from dsv32_jax.model.model import DeepseekV32, abstract_model
from dsv32_jax.model.params import named_parameters, replace_parameters
from dsv32_jax.model.sequence import Run, hidden_states, log_likelihoods, mtp_states

Params = dict[str, jax.Array]
"""Parameters by path, float32. The MTP module's embedding and head are the main model's and have no entry."""

TIED = {"mtp.embed": "embed", "mtp.head": "head"}
BALANCE = 1e-4
"""Factor of the sequence-wise balance loss (V3 report, section 4.2)."""
INDEXER_RATE = 0.2
"""The indexer's rate as a share of the others' when both train: it is warm by then."""
CLIP = 1.0
WEIGHT_DECAY = 0.1


def initial_params(config: ModelConfig, seed: int) -> Params:
    """The model's own random initialisation."""
    from flax import nnx

    model = jax.jit(lambda: DeepseekV32(config, nnx.Rngs(seed)))()
    return from_model(model)


def from_model(model: DeepseekV32) -> Params:
    """The parameters of a model without quantised weights, in float32."""
    return {path: jnp.asarray(leaf, jnp.float32) for path, leaf in named_parameters(model).items() if path not in TIED}


def to_model(config: ModelConfig, params: Params) -> DeepseekV32:
    """The model in the checkpoint's storage types: matrices bfloat16, norms and biases float32."""
    shapes = abstract_model(config)
    values = params | {copy: params[original] for copy, original in TIED.items() if config.has_mtp}
    types = {path: leaf.dtype for path, leaf in named_parameters(shapes).items()}
    return replace_parameters(shapes, {path: value.astype(types[path]) for path, value in values.items()})


def trainable(path: str, stage: Stage) -> bool:
    """Whether a stage's optimiser changes a parameter; router biases follow the load instead."""
    if path.endswith("router_bias"):
        return False
    return stage.trains == "all" or (".indexer." in path) == (stage.trains == "indexer")


def stack(params: Params) -> Params:
    """Parameters of the same kind in all layers as one array [layers, ...]: the optimiser's view, in few arrays."""
    return {kind: jnp.stack([params[path] for path in paths]) for kind, paths in kinds(params).items()}


def unstack(stacked: Params, like: Params) -> Params:
    """The inverse of `stack`; `like` has the paths."""
    return {path: leaf for kind, paths in kinds(like).items() for path, leaf in zip(paths, stacked[kind], strict=True)}


def kinds(params: Params) -> dict[str, list[str]]:
    """Paths by their name within the layer, for instance "attn.q_a"."""
    by_kind: dict[str, list[str]] = {}
    for path in sorted(params):
        by_kind.setdefault(re.sub(r"^(layers\.\d+|mtp\.layer)\.", "", path), []).append(path)
    return by_kind


def uses_muon(kind: str, shape: tuple[int, ...]) -> bool:
    """Hidden matrices (stacked: [layers, ..., out, in]) are Muon's; embedding, head, router, indexer, norms Adam's."""
    return len(shape) >= 3 and kind not in ("embed", "head") and "router" not in kind and "indexer." not in kind


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up, constant, linear decay over the last part."""
    if step < stage.warmup:
        return stage.learning_rate * (step + 1) / (stage.warmup + 1)
    decay = max(1, int(stage.decay * (stage.steps - stage.warmup)))
    remaining = min(1.0, (stage.steps - step) / decay)
    return stage.learning_rate * (stage.final + (1 - stage.final) * remaining)


def optimizer(rate: jax.Array | float) -> optax.GradientTransformation:
    """Muon for hidden matrices, its updates scaled to Adam's size (arXiv 2502.16982); Adam for the rest.

    Over stacked parameters (`stack`). The rate is an argument of the step, so that no schedule is compiled in.
    """

    def dimensions(params: Params) -> dict[str, Any]:
        # Muon asks again without the other group's leaves.
        shapes = {kind: getattr(leaf, "shape", ()) for kind, leaf in params.items()}
        return {
            kind: optax.contrib.MuonDimensionNumbers(reduction_axis=len(shape) - 1, output_axis=len(shape) - 2)
            if uses_muon(kind, shape)
            else None
            for kind, shape in shapes.items()
        }

    return optax.chain(
        optax.clip_by_global_norm(CLIP),
        optax.contrib.muon(
            rate,
            weight_decay=WEIGHT_DECAY,
            consistent_rms=0.2,
            adam_b1=0.9,
            adam_b2=0.95,
            adam_learning_rate=rate,
            muon_weight_dimension_numbers=dimensions,
        ),
    )


@functools.partial(jax.checkpoint, static_argnums=4)
def cross_entropy(states: jax.Array, head: jax.Array, ids: jax.Array, weights: jax.Array, ahead: int) -> jax.Array:
    """Nats a token, of the token `ahead` positions later; the last positions, which have none, count nothing."""
    target_weights = jnp.roll(weights, -ahead, 1).at[:, -ahead:].set(0)
    likelihoods = log_likelihoods(states, head, jnp.roll(ids, -ahead, 1))
    return -(likelihoods * target_weights).sum() / jnp.maximum(target_weights.sum(), 1)


def losses(
    params: Params, frozen: Params, ids: jax.Array, weights: jax.Array, config: ModelConfig, stage: Stage, run: Run
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The stage's loss and what goes into the log.

    Args:
      params: what the stage trains.
      frozen: the rest.
      ids: int32 [B, T].
      weights: float32 [B, T], of each token as a target.
      config: the model's.
      stage: has the weights of the losses.
      run: how to compute.

    Returns:
      The scalar loss, and a dict of `loss`, `mtp_loss` (nats a token), `index_kl` (mean over layers, nats) and `load`
      [layers, E], with the MTP layer's last where there is one.
    """
    model = to_model(config, params | frozen)
    states, reports = hidden_states(model, ids, run)
    log = {"loss": cross_entropy(states, model.head, ids, weights, 1)}
    if config.has_mtp:
        assert model.mtp is not None
        after, report = mtp_states(model.mtp, model.embed, config, states, jnp.roll(ids, -1, 1), run)
        log["mtp_loss"] = cross_entropy(after, model.head, ids, weights, 2)
        reports.append(report)
    total = jnp.float32(0)
    if stage.trains != "indexer":
        total += log["loss"] + BALANCE * sum(report.balance for report in reports)
        total += stage.mtp_weight * log.get("mtp_loss", 0)
    if stage.index_loss:
        index_kl = sum(report.index_kl for report in reports)
        log["index_kl"] = index_kl / len(reports)
        total += index_kl
    log["load"] = jnp.stack([report.load for report in reports if report.load.size])
    return total, log


def moved_biases(config: ModelConfig, params: Params, load: jax.Array, speed: float) -> Params:
    """Moves router biases: up by `speed` for experts below the mean load, down above (V3 report, 2.1.2)."""
    layers = [f"layers.{n}" for n in range(config.num_hidden_layers) if config.is_moe(n)]
    layers += ["mtp.layer"] * config.has_mtp
    moved = {}
    for layer, layer_load in zip(layers, load, strict=True):
        path = f"{layer}.ffn.router_bias"
        moved[path] = params[path] + speed * jnp.sign(layer_load.mean() - layer_load)
    return params | moved


def make_step(config: ModelConfig, stage: Stage, compute_dtype: str):
    """The jitted step `(params, state, ids, weights, rate) -> (params, state, log)`; params and state are donated."""
    run = Run(
        stage.attention,
        compute_dtype=compute_dtype,
        index_loss=stage.index_loss,
        remat=stage.length > 1024,
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: Any, ids: jax.Array, weights: jax.Array, rate: jax.Array):
        trained = {path: leaf for path, leaf in params.items() if trainable(path, stage)}
        frozen = {path: leaf for path, leaf in params.items() if path not in trained}
        (_, log), gradients = jax.value_and_grad(losses, has_aux=True)(
            trained, frozen, ids, weights, config, stage, run
        )
        updates, state = optimizer(rate).update(stack(gradients), state, stack(trained))
        if stage.trains == "all":
            updates = {kind: u * INDEXER_RATE if "indexer." in kind else u for kind, u in updates.items()}
        params = frozen | optax.apply_updates(trained, unstack(updates, trained))
        load = log.pop("load")
        if stage.trains != "indexer":
            params = moved_biases(config, params, load, stage.bias_speed)
        log |= {"gradient_norm": optax.tree.norm(gradients), "busiest_expert": load.max() * load.shape[1]}
        return params, state, log

    return step


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def mean_loss(config: ModelConfig, attention: str, compute_dtype: str, params: Params, ids: jax.Array) -> jax.Array:
    """Nats a token of ids int32 [B, T], the first of each row aside, which is not predicted."""
    model = to_model(config, params)

    def of_row(row: jax.Array) -> jax.Array:
        states, _ = hidden_states(model, row[None], Run(attention, compute_dtype=compute_dtype))
        return -log_likelihoods(states, model.head, jnp.roll(row, -1)[None])[0, :-1].mean()

    return jax.lax.map(of_row, ids).mean()


def optimizer_state(stage: Stage, params: Params) -> Any:
    """The optimiser's state at the start of a stage."""
    return optimizer(0.0).init(stack({path: leaf for path, leaf in params.items() if trainable(path, stage)}))
