"""The model over whole sequences computes what the step computes, and selects as the ops do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv32_jax.config import ModelConfig
from dsv32_jax.model import sequence as sequence_model
from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.context import Options, StepContext
from dsv32_jax.model.model import DeepseekV32
from dsv32_jax.model.parts import Parts
from dsv32_jax.model.sequence import Run
from dsv32_jax.model.variants import VARIANTS
from pallas_kernels.top_k import top_k
from tests.harness import Piece, flat_batch, forward, load_golden, tables_of

ROWS, LENGTH = 2, 48


@pytest.fixture(scope="module")
def model() -> DeepseekV32:
    """Weights large enough that attention is not flat and the router has opinions."""
    config = ModelConfig.tiny(quantization_config=None, initializer_range=0.15)
    return DeepseekV32(config, nnx.Rngs(3))


@pytest.fixture(scope="module")
def ids(model) -> np.ndarray:
    return np.random.default_rng(0).integers(2, model.config.vocab_size, (ROWS, LENGTH))


def logits(model, ids, run):
    states, _ = jax.jit(lambda m, i: sequence_model.hidden_states(m, i, run))(model, jnp.asarray(ids))
    return np.asarray(states.astype(jnp.float32) @ model.head.astype(jnp.float32).T)


RUNS = {
    "indexer": Run(),
    "dense": Run("dense"),
    **{name: Run(parts=Parts(index_select=f)) for name, f in VARIANTS["index_select"].items() if name != "dense"},
}


@pytest.fixture(scope="module")
def logits_of(model, ids):
    """`logits` by selection, each computed once."""
    return functools.cache(lambda selection: logits(model, ids, RUNS[selection]))


@pytest.mark.parametrize(("attention", "selection"), [("sparse", "indexer"), ("dense", "dense")])
def test_states_are_those_of_the_step(model, ids, logits_of, attention, selection):
    step = forward(model, ids.tolist(), Options(attention=attention))
    ours = logits_of(selection)
    for row, result in enumerate(step):
        np.testing.assert_allclose(ours[row], result.logits, atol=1e-4 * result.logits.std(), rtol=0)


def test_sparse_differs_from_dense_beyond_k(model, logits_of):
    sparse, dense = logits_of("indexer"), logits_of("dense")
    k = model.config.index_topk
    np.testing.assert_allclose(sparse[:, :k], dense[:, :k], atol=1e-5)
    assert np.abs(sparse[:, k:] - dense[:, k:]).max() > 1e-2


def test_official_fp8_arithmetic_is_that_of_the_step():
    model = load_golden("tiny128_fp8")
    ids = np.random.default_rng(1).integers(2, model.config.vocab_size, (1, 40))
    step = forward(model, ids.tolist(), Options(act_quant=True, absorb=False))[0].logits
    ours = logits(model, ids, Run(act_quant=True))[0]
    # Sums of the experts are taken in another order: a rounding of the FP8 inputs may fall the other way.
    assert np.sqrt(((ours - step) ** 2).mean()) < 5e-3 * step.std()
    assert (ours.argmax(-1) == step.argmax(-1)).mean() > 0.9


def test_mtp_states_are_those_of_the_module(model, ids):
    row = ids[0]
    states = jax.random.normal(jax.random.key(0), (len(row) - 1, model.config.hidden_size))
    options = Options(attention="dense")
    batch = flat_batch([Piece(row[:-1])], tables_of(1, 1))

    @jax.jit
    def both(model, states, following, batch):
        config, run = model.config, Run("dense")
        ours, _ = sequence_model.mtp_states(model.mtp, model.mtp.embed, config, states[None], following[None], run)
        cache = KVCache.create(config, 1, options, layers=config.num_hidden_layers + 1)
        return ours, model.mtp(states, following, cache, StepContext(config, options, batch, options.seams()))[0]

    ours, expected = both(model, states, row[1:], batch)
    np.testing.assert_allclose(ours[0] @ model.mtp.head.astype(jnp.float32).T, expected, atol=1e-4)


@pytest.mark.parametrize("k", [1, 7, 64])
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "negative"])
def test_top_k_mask_is_top_k(k, kind):
    rng = np.random.default_rng(k)
    scores = {
        "normal": rng.normal(size=(64, 64)),
        "ties": rng.integers(-2, 3, (64, 64)),
        "equal": np.zeros((64, 64)),
        "negative": -rng.exponential(size=(64, 64)),
    }[kind].astype(np.float32)
    scores[rng.random(scores.shape) < 0.1] *= -0.0
    visible = np.tri(64, dtype=bool)
    mask = np.asarray(sequence_model.top_k_mask(jnp.asarray(scores), visible, k))
    for row, chosen in enumerate(np.asarray(top_k(jnp.where(visible, scores, -jnp.inf), k))):
        assert set(np.flatnonzero(mask[row])) == {int(i) for i in chosen if i >= 0}


def test_oracle_keeps_at_least_the_attention_mass_of_any_other(logits_of):
    """The loss in likelihood orders the selections the same way here: dense, oracle, then random."""
    far = {name: np.abs(logits_of(name) - logits_of("dense")).mean() for name in ("oracle", "random", "recent")}
    assert far["oracle"] < far["random"] and far["oracle"] < far["recent"]


def test_unknown_attention_is_refused():
    with pytest.raises(ValueError, match="sparse, dense"):
        Run("best")


def test_indexer_learns_from_its_own_loss_alone(model, ids):
    def language_loss(m):
        states, _ = sequence_model.hidden_states(m, jnp.asarray(ids), Run(index_loss=True))
        return -sequence_model.log_likelihoods(states, m.head, jnp.roll(jnp.asarray(ids), -1, 1)).mean()

    def index_loss(m):
        _, reports = sequence_model.hidden_states(m, jnp.asarray(ids), Run(index_loss=True))
        return sum(report.index_kl for report in reports)

    from dsv32_jax.model.params import named_parameters

    for loss, learns in ((language_loss, False), (index_loss, True)):
        gradients = named_parameters(jax.jit(jax.grad(loss))(model))
        for path, gradient in gradients.items():
            if path.startswith("mtp") or path.endswith("router_bias"):
                continue
            assert bool(jnp.any(gradient != 0)) == ((".indexer." in path) == learns), path


def test_gradient_of_products_is_that_of_einsum():
    x, y = jax.random.normal(jax.random.key(0), (4, 3, 5)), jax.random.normal(jax.random.key(1), (4, 6, 5))
    formula = "bth,bsh->bts"
    ours = jax.grad(lambda x, y: jnp.sin(sequence_model.product(formula, x, y)).sum(), (0, 1))(x, y)
    theirs = jax.grad(lambda x, y: jnp.sin(jnp.einsum(formula, x, y)).sum(), (0, 1))(x, y)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_recomputed_layers_have_the_same_gradient(model, ids):
    def loss(m, run):
        states, reports = sequence_model.hidden_states(m, jnp.asarray(ids), run)
        return (states.astype(jnp.float32) ** 2).mean() + sum(report.index_kl for report in reports)

    for attention in ("dense", "sparse"):
        plain, again = (
            jax.jit(jax.grad(loss), static_argnums=1)(model, Run(attention, index_loss=True, remat=remat))
            for remat in (False, True)
        )
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
            np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=2e-2, atol=1e-4)
