"""Indexer scores over a paged context."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.cache_format import index_block_bytes, store_keys
from pallas_kernels.indexer_logits import indexer_logits, mosaic_gpu
from pallas_kernels.indexer_logits.config import CONFIGS, DECODE, DECODE_PAIRS, PREFILL, choose_config
from pallas_kernels.indexer_logits.shares import shares
from pallas_kernels.quantize import quantize
from tests import numpy_model
from tests.kernels.cases import indexer_logits as cases

TOKENS, HEADS, DIM, BLOCKS = 6, 3, 128, 5
TABLES = np.array([[4, 1], [2, -1]], np.int32)
SEQUENCE = np.array([0, 1, 0, 1, 0, 0], np.int32)
POSITIONS = np.array([0, 63, 70, 5, 127, -1], np.int32)


def case(form: str):
    """Arguments of the ops, and the scores of float64 NumPy."""
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((TOKENS, HEADS, DIM)).astype(np.float32)
    weights = rng.standard_normal((TOKENS, HEADS)).astype(np.float32)
    keys = rng.standard_normal((BLOCKS * 64, DIM)).astype(np.float32)
    fp8 = form == "fp8"
    index = jnp.zeros((1, BLOCKS, index_block_bytes(DIM)), jnp.uint8) if fp8 else jnp.zeros((1, BLOCKS, 64, DIM))
    kv = jnp.zeros((1, BLOCKS, 64, 9))
    _, index = store_keys(kv, index, 0, jnp.arange(len(keys)), keys[:, :8], keys[:, :1], keys)
    key_scale = np.ones(len(keys))
    q = queries
    if fp8:
        keys, scale = numpy_model.quantise_rows(keys, "ue8m0")
        key_scale = scale[:, 0]
        q, _ = quantize(jnp.asarray(queries), "ue8m0")
        queries = np.asarray(q, np.float64)
    expected = np.full((TOKENS, TABLES.shape[1] * 64), -np.inf)
    for t in range(TOKENS):
        for s in range(POSITIONS[t] + 1):
            slot = TABLES[SEQUENCE[t], s // 64] * 64 + s % 64
            dots = np.maximum(queries[t].astype(np.float64) @ keys[slot], 0)
            expected[t, s] = dots @ weights[t] * key_scale[slot]
    arguments = (jnp.asarray(q), jnp.asarray(weights), index, 0, *map(jnp.asarray, (TABLES, SEQUENCE, POSITIONS)))
    return arguments, expected


@pytest.mark.parametrize("form", ["float32", "fp8"])
@pytest.mark.parametrize("chunk_bytes", [1, 2**26])
def test_scores_match_numpy(form, chunk_bytes):
    arguments, expected = case(form)
    scores = np.asarray(indexer_logits(*arguments, chunk_bytes=chunk_bytes))
    visible = np.arange(expected.shape[1]) <= POSITIONS[:, None]
    assert (scores[~visible] == -np.inf).all()
    np.testing.assert_allclose(scores[visible], expected[visible], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("case", cases.tiny(), ids=lambda case: case.name)
def test_reference_on_the_kernels_cases(case):
    scores = np.asarray(indexer_logits(*map(jnp.asarray, case.arguments), backend="reference"))
    expected = cases.expected(case)
    assert (scores[~case.visible] == -np.inf).all()
    np.testing.assert_allclose(
        scores[case.visible], expected[case.visible], atol=1e-6 * np.abs(expected).max(where=case.visible, initial=0)
    )


# ---- the kernel --------------------------------------------------------------------------------------------------

SMALL = {"ctas": 2, "warpgroups": 2, "stages": 3, "ahead": 1}
INTERPRETED = [
    ("one sequence", PREFILL, SMALL | {"ctas": 1}),
    ("mixture with decode tokens and padding", PREFILL, SMALL),
    ("mixture with decode tokens and padding", PREFILL, SMALL | {"ctas": 1, "ahead": 2}),
    ("padding alone", PREFILL, SMALL | {"ctas": 5}),
    ("one token", DECODE, SMALL),
    ("one token a sequence", DECODE, SMALL | {"ctas": 1, "ahead": 2}),
    ("two tokens a sequence", DECODE_PAIRS, SMALL),
]


def interpreted(name, config, changes, **options):
    """(case, the kernel's scores) in the interpreter, with a smaller config of the same form."""
    (case,) = (case for case in cases.tiny() if case.name == name)
    config = dataclasses.replace(config, **changes)
    arguments = map(jnp.asarray, case.arguments)
    return case, np.asarray(
        mosaic_gpu.indexer_logits(*arguments, config=config, interpret=mosaic.interpreter(), **options)
    )


@pytest.mark.interpret
@pytest.mark.parametrize(("name", "config", "changes"), INTERPRETED, ids=lambda x: x if isinstance(x, str) else None)
def test_kernel_in_the_interpreter(name, config, changes, capfd):
    case, scores = interpreted(name, config, changes)
    expected = cases.expected(case)
    assert (scores[~case.visible] == -np.inf).all()
    error = np.abs(scores[case.visible] - expected[case.visible]).max()
    assert error <= 1e-6 * np.abs(expected[case.visible]).max()
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.interpret
def test_kernel_without_fill_writes_the_blocks_that_are_seen(capfd):
    case, scores = interpreted("one token a sequence", DECODE, SMALL, fill=False)
    columns = np.arange(scores.shape[1])
    written = columns < (case.positions[:, None] + 64) // 64 * 64
    assert (scores[written & ~case.visible] == -np.inf).all() and np.isfinite(scores[case.visible]).all()
    assert not (scores[~written] == -np.inf).any()
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.interpret
def test_kernel_through_the_op(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "choose_config", lambda *_: dataclasses.replace(PREFILL, **SMALL))
    (case,) = (case for case in cases.tiny() if case.name == "padding alone")
    arguments = list(map(jnp.asarray, case.arguments))
    scores = np.asarray(indexer_logits(*arguments, backend="interpret"))
    np.testing.assert_array_equal(scores == -np.inf, ~case.visible)
    with pytest.raises(NotImplementedError, match="the kernel of indexer_logits has no gradient"):
        jax.grad(lambda w: indexer_logits(arguments[0], w, *arguments[2:], backend="interpret").sum())(arguments[1])


def shapes(tokens, sequences, heads=64, blocks=20):
    of = jax.ShapeDtypeStruct
    return (
        of((tokens, heads, 128), jnp.float8_e4m3fn),
        of((tokens, heads), jnp.float32),
        of((2, 40, 64 * 132), jnp.uint8),
        of((), jnp.int32),
        of((sequences, blocks), jnp.int32),
        of((tokens,), jnp.int32),
        of((tokens,), jnp.int32),
    )


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("fill", [True, False])
def test_every_config_lowers(config, fill):
    call = jax.jit(functools.partial(mosaic_gpu.indexer_logits, config=config, fill=fill))
    call.trace(*shapes(65, 65)).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(("tokens", "sequences"), [(1, 1), (64, 64), (6, 3), (1500, 1500), (7, 1)])
def test_the_choice_is_one_of_the_configs(tokens, sequences):
    assert choose_config(tokens, sequences) in CONFIGS
    jax.jit(mosaic_gpu.indexer_logits).trace(*shapes(tokens, sequences, 3, 3)).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
    ("backend", "tokens", "blocks"), [("reference", 0, 3), ("interpret", 0, 3), ("interpret", 5, 0)]
)
def test_nothing_to_score(backend, tokens, blocks):
    arguments = [jnp.zeros(x.shape, x.dtype) for x in shapes(tokens, 2, blocks=blocks)]
    assert indexer_logits(*arguments, backend=backend).shape == (tokens, 64 * blocks)


@pytest.mark.parametrize("config", [PREFILL, DECODE, DECODE_PAIRS])
@pytest.mark.parametrize("ctas", [1, 3, 132])
def test_shares_cover_every_tile_once(config, ctas):
    config = dataclasses.replace(config, ctas=ctas)
    rng = np.random.default_rng(0)
    for count in (1, 5, 6, 13, 40):
        sequence = np.sort(rng.integers(0, 4, count)).astype(np.int32)
        positions = rng.integers(-1, 3000, count).astype(np.int32)
        limit = 2048
        runs, t = [], 0
        while t < count:
            stop = t + 1
            while stop < count and stop % config.group and sequence[stop] == sequence[t]:
                stop += 1
            keys = min(max(positions[t:stop].max() + 1, 0), limit)
            runs += [(t, tile) for tile in range(max(1, -(-keys // config.tile_keys)))]
            t = stop
        found = np.asarray(shares(jnp.asarray(sequence), jnp.asarray(positions), limit, config))
        sizes = found[2]
        assert sizes.sum() == len(runs) and sizes.max() - sizes.min() <= 1
        at = np.cumsum(sizes) - sizes
        assert [tuple(x) for x in found[:2, sizes > 0].T] == [runs[i] for i in at[sizes > 0]]


def test_what_the_kernel_does_not_take():
    def refused(message, **changes):
        arguments = dict(zip(("queries", "head_weights", "index"), shapes(6, 2)[:3], strict=True)) | changes
        arrays = [jnp.zeros(x.shape, x.dtype) for x in (*arguments.values(), *shapes(6, 2)[3:])]
        with pytest.raises(ValueError, match=message):
            indexer_logits(*arrays, backend="mosaic_gpu")

    of = jax.ShapeDtypeStruct
    refused("index keys of dtype float32; it takes the FP8 form", index=of((1, 3, 64, 128), jnp.float32))
    refused("queries of dtype float32; it takes float8_e4m3fn", queries=of((6, 64, 128), jnp.float32))
    refused(
        r"blocks of 4352 bytes; it takes keys of width 128",
        queries=of((6, 64, 64), jnp.float8_e4m3fn),
        index=of((1, 3, 64 * 68), jnp.uint8),
    )
    refused(
        r"\(6, 65, 128\); it takes 1 to 64 heads",
        queries=of((6, 65, 128), jnp.float8_e4m3fn),
        head_weights=of((6, 65), jnp.float32),
    )
    refused("do not go with queries", head_weights=of((6, 3), jnp.float32))


def test_wrong_configs_are_refused():
    for changes, message in (
        ({"tokens": 3}, "1, 2 or 4 tokens"),
        ({"ahead": 4}, "at least 5 stages, not 3"),
        ({"query_slots": 1}, "at least 2, not 1"),
        ({"stages": 24}, "bytes of shared memory; there are 232448"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(PREFILL, **changes)
