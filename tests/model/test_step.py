"""The step: a sequence's logits depend on its own tokens alone, however they are cut, mixed, padded and stored."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv32_jax.config import ModelConfig
from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.model import Batch, DeepseekV32, Options, abstract_model, step
from dsv32_jax.model.params import named_parameters, replace_parameters
from tests.harness import EXACT, Piece, flat_batch, load_golden, tables_of

LENGTH = 150
"""Three blocks of the cache, the last one partly filled, and far above `index_topk`."""


@functools.cache
def small_model() -> DeepseekV32:
    """Random, with matrices large enough that attention and routing matter, and nothing stored in FP8."""
    model = DeepseekV32(ModelConfig.tiny(quantization_config=None), nnx.Rngs(0))
    parameters = named_parameters(model)
    return replace_parameters(
        model, {path: leaf * 4 if leaf.dtype == jnp.bfloat16 else leaf for path, leaf in parameters.items()}
    )


@functools.cache
def tokens(length: int = LENGTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, small_model().config.vocab_size, length).astype(np.int32)


def run(model, steps, tables, options=EXACT, cache=None, blocks=None, total=0, **batch_options):
    """Each element of `steps` is one batch, a list of pieces, padded to `total` rows so that few shapes are compiled.

    Returns the logits [T, V] of each sequence, and the cache.
    """
    if cache is None:
        cache = KVCache.create(model.config, blocks or tables.size, options)
    found: dict[int, list[np.ndarray]] = {}
    for pieces in steps:
        padding = {"padding": max(0, total - sum(len(piece.ids) for piece in pieces))} if total else {}
        batch = flat_batch(pieces, tables, **padding, **batch_options)
        logits, cache = step(model, batch, cache, options)
        logits = np.asarray(logits)[np.asarray(batch.logit_rows) >= 0]
        for piece, own in zip(pieces, np.split(logits, np.cumsum([len(p.ids) for p in pieces])[:-1]), strict=True):
            found.setdefault(piece.sequence, []).append(own)
    return {sequence: np.concatenate(parts) for sequence, parts in found.items()}, cache


@functools.cache
def whole(options: Options = EXACT) -> np.ndarray:
    """Logits of `tokens()` in one batch."""
    return alone(tokens(), options)


def alone(ids: np.ndarray, options: Options = EXACT) -> np.ndarray:
    """Logits of one sequence, in one batch of its own."""
    return run(small_model(), [[Piece(ids)]], tables_of(1, 3), options, total=LENGTH)[0][0]


def assert_close(got: np.ndarray, expected: np.ndarray, tolerance: float = 2e-5) -> None:
    assert got.shape == expected.shape
    error = np.abs(got - expected).max()
    assert error <= tolerance * expected.std(), f"off by {error / expected.std():.1e} of the standard deviation"


def test_the_small_model_is_worth_testing():
    """Its logits change with every earlier token's presence; otherwise all that follows would prove little."""
    changed = tokens().copy()
    changed[3] = (changed[3] + 1) % small_model().config.vocab_size
    other = alone(changed)
    np.testing.assert_array_equal(other[:3], whole()[:3])
    assert np.abs(other[3:] - whole()[3:]).max(-1).min() > 1e-3 * whole().std()
    dense = whole(dataclasses.replace(EXACT, attention="dense"))
    assert np.abs(dense[100:] - whole()[100:]).max(-1).min() > 1e-2 * whole().std()


# ---- cutting ---------------------------------------------------------------------------------------------------------


def test_prefill_then_decode_equals_the_whole_at_every_split():
    """One sequence a split, all splits in one batch: prefill to the split, then one token, then one more."""
    ids = tokens(24)
    splits = range(1, 23)
    tables = tables_of(len(splits), 1)
    expected = whole()[:24]
    steps = [[Piece(ids[:n], 0, row) for row, n in enumerate(splits)]]
    steps += [[Piece(ids[n + more : n + more + 1], n + more, row) for row, n in enumerate(splits)] for more in (0, 1)]
    got, _ = run(small_model(), steps, tables)
    for row, n in enumerate(splits):
        assert_close(got[row], expected[: n + 2])


def test_decoding_token_by_token_across_blocks():
    start = 60  # decoding crosses from the first block into the second
    _, cache = run(small_model(), [[Piece(tokens()[:start])]], tables_of(1, 3), total=64)
    steps = [[Piece(tokens()[n : n + 1], n)] for n in range(start, 70)]
    got, _ = run(small_model(), steps, tables_of(1, 3), cache=cache)
    assert_close(got[0], whole()[start:70])


@pytest.mark.parametrize("chunk", [50, 64])
def test_chunked_prefill_changes_nothing(chunk):
    steps = [[Piece(tokens()[n : n + chunk], n)] for n in range(0, LENGTH, chunk)]
    assert_close(run(small_model(), steps, tables_of(1, 3), total=64)[0][0], whole())


def test_prefill_and_decode_mixed_in_one_step():
    """While one sequence decodes, another's prompt comes in pieces."""
    ids, other = tokens(), tokens(40, seed=1)
    steps = [
        [Piece(ids[:100], 0, 0)],
        [Piece(ids[100:101], 100, 0), Piece(other[:20], 0, 1)],
        [Piece(other[20:40], 20, 1), Piece(ids[101:102], 101, 0)],
    ]
    got, _ = run(small_model(), steps, tables_of(2, 3), total=100)
    assert_close(got[0], whole()[:102])
    assert_close(got[1], alone(other))


# ---- neighbours, padding, blocks -------------------------------------------------------------------------------------


def test_batch_neighbours_change_nothing():
    rows = [tokens(n, seed=n) for n in (5, 64, 33)]
    got, _ = run(small_model(), [[Piece(row, 0, n) for n, row in enumerate(rows)]], tables_of(3, 1))
    for n, row in enumerate(rows):
        assert_close(got[n], alone(row))


@pytest.mark.parametrize("layout", [{"padding": 37}, {"spread": True}])
def test_padding_rows_change_nothing_and_write_nothing(layout):
    ids = tokens(40)
    tables = tables_of(1, 1)
    expected, clean = run(small_model(), [[Piece(ids)]], tables, blocks=2)
    got, cache = run(small_model(), [[Piece(ids)]], tables, blocks=2, **layout)
    assert_close(got[0], expected[0])
    for padded, plain in zip(jax.tree.leaves(cache), jax.tree.leaves(clean), strict=True):
        np.testing.assert_allclose(padded, plain, atol=1e-5)
        assert not np.asarray(padded)[:, 0, 40:].any() and not np.asarray(padded)[:, 1].any()


def test_rows_without_wanted_logits_are_zero():
    batch = dataclasses.replace(flat_batch([Piece(tokens(8))], tables_of(1, 1)), logit_rows=jnp.array([7, -1, 2]))
    logits, _ = step(small_model(), batch, KVCache.create(small_model().config, 1, EXACT), EXACT)
    assert_close(np.asarray(logits)[[0, 2]], whole()[[7, 2]])
    assert not np.asarray(logits)[1].any()


def test_scattered_blocks_equal_contiguous_ones():
    tables = tables_of(2, 3, spare=5, seed=3)
    assert (np.diff(tables[0]) != 1).any()
    other = tokens(130, seed=2)
    got, _ = run(small_model(), [[Piece(tokens(), 0, 0), Piece(other, 0, 1)]], tables, blocks=11)
    assert_close(got[0], whole())
    assert_close(got[1], alone(other))


@pytest.mark.parametrize(
    "options", [EXACT, dataclasses.replace(EXACT, attention="dense"), dataclasses.replace(EXACT, absorb=False)]
)
def test_unused_cache_may_hold_nan(options):
    """Blocks of nobody, slots past a sequence's end, and a block table with absent entries."""
    config = small_model().config
    tables = np.array([[5, 2, -1], [0, -1, -1]], np.int32)
    cache = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), KVCache.create(config, 7, options))
    other = tokens(20, seed=2)
    steps = [[Piece(tokens()[:90], 0, 0)], [Piece(tokens()[90:100], 90, 0), Piece(other, 0, 1)]]
    got, _ = run(small_model(), steps, tables, options, cache, total=96)
    assert np.isfinite(got[0]).all() and np.isfinite(got[1]).all()
    clean, _ = run(small_model(), steps, tables_of(2, 3), options, blocks=7, total=96)
    assert_close(got[0], clean[0])
    assert_close(got[1], clean[1])


# ---- index_topk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [64, 65])
def test_a_context_within_index_topk_is_dense(k):
    """At and below the limit sparse equals dense; one token above it does not."""
    ids = tokens(65)
    sparse = alone(ids, dataclasses.replace(EXACT, index_topk=k))
    dense = alone(ids, dataclasses.replace(EXACT, attention="dense"))
    assert_close(sparse[:k], dense[:k])
    if k < len(ids):
        assert np.abs(sparse[k:] - dense[k:]).max() > 1e-4 * dense.std()


def test_absorbed_and_unabsorbed_agree():
    assert_close(whole(dataclasses.replace(EXACT, absorb=False)), whole())
    dense = dataclasses.replace(EXACT, attention="dense")
    assert_close(whole(dataclasses.replace(dense, absorb=False)), whole(dense))


def test_bfloat16_stays_near_float32_on_the_golden_model():
    """Choices may flip, so the measure is the relative rms over all logits."""
    model = load_golden("tiny128_bf16")
    ids = np.arange(40, dtype=np.int32) * 7 % model.config.vocab_size
    options = Options(compute_dtype="bfloat16", index_topk=64)  # no choice of keys to flip
    exact, _ = run(model, [[Piece(ids)]], tables_of(1, 1), dataclasses.replace(EXACT, index_topk=64))
    rounded, _ = run(model, [[Piece(ids)]], tables_of(1, 1), options)
    relative = np.sqrt(np.mean((rounded[0] - exact[0]) ** 2)) / exact[0].std()
    assert 1e-4 < relative < 0.1


# ---- the compiled step -----------------------------------------------------------------------------------------------


def size(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_the_compiled_step_copies_neither_weights_nor_cache():
    """One decode token: temporaries stay far below the stacked experts, and the donated cache is written in place."""
    # Not FP8: the CPU has no such arithmetic, and XLA widens whole arrays of it there.
    config = ModelConfig.tiny(n_routed_experts=64, moe_intermediate_size=512, quantization_config=None)
    options = Options(compute_dtype="bfloat16")
    model = abstract_model(config)
    int32 = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    batch = Batch(*[int32((1,))] * 4, int32((1, 64)), int32((1,)))
    cache = KVCache.shapes(config, 64, "bfloat16", fp8_index=False)
    memory = step.lower(model, batch, cache, options).compile().memory_analysis()
    experts = max(size(leaf) for path, leaf in named_parameters(model).items() if ".experts." in path)
    assert experts > 2**21
    assert memory.temp_size_in_bytes < experts / 2, (memory.temp_size_in_bytes, experts)
    assert memory.alias_size_in_bytes >= size(cache)
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes <= 2 * 4 * config.vocab_size  # the logits


def test_the_number_of_compilations_is_the_number_of_shapes():
    model = small_model()
    tables = tables_of(1, 5)  # a shape that no other test uses
    before = step._cache_size()
    run(model, [[Piece(tokens()[:9])]], tables)
    assert step._cache_size() == before + 1
    decode = [[Piece(tokens()[n : n + 1], n)] for n in range(9, 15)]
    run(model, [[Piece(tokens()[:9], 0)], *decode, *decode], tables)
    assert step._cache_size() == before + 2
    scaled = replace_parameters(model, named_parameters(model) | {"norm": model.norm * 2})  # new values, same shapes
    run(scaled, [[Piece(tokens()[:9])]], tables)
    assert step._cache_size() == before + 2


def test_gradients_are_finite_and_match_finite_differences():
    """The reference path is differentiable in every parameter, with padding in the batch."""
    model = small_model()
    parameters = {path: leaf.astype(jnp.float32) for path, leaf in named_parameters(model).items()}
    ids = tokens(20)
    batch = flat_batch([Piece(ids)], tables_of(1, 1), padding=3)
    cache = KVCache.create(model.config, 1, EXACT)

    @jax.jit
    def loss(parameters):
        logits, _ = replace_parameters(model, parameters)(batch, cache, EXACT)
        likelihood = jax.nn.log_softmax(logits[: len(ids) - 1])
        return -likelihood[jnp.arange(len(ids) - 1), ids[1:]].mean()

    gradients = jax.jit(jax.grad(loss))(parameters)
    for path, gradient in gradients.items():
        assert np.isfinite(gradient).all(), path
        # The choice of keys has no gradient, nor has the bias that only chooses experts; MTP is not in this loss.
        without = ".indexer." in path or path.endswith("router_bias") or path.startswith("mtp.")
        assert bool(np.any(gradient)) != without, path
    for path in ("layers.0.attn.kv_b", "layers.1.attn.q_a", "norm"):
        direction = gradients[path] / jnp.linalg.norm(gradients[path])
        epsilon = 1e-2 * float(jnp.linalg.norm(parameters[path])) / np.sqrt(parameters[path].size)
        up, down = (loss(parameters | {path: parameters[path] + s * epsilon * direction}) for s in (1, -1))
        expected = float(jnp.linalg.norm(gradients[path]))
        assert float(up - down) / (2 * epsilon) == pytest.approx(expected, rel=0.05), path
