"""Attention over chosen slots against float64 NumPy, and its edge cases; the kernel in Pallas' interpreter."""

import dataclasses
import os
import re

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.backend import BackendError
from pallas_kernels.cache_format import record_bytes, store_keys
from pallas_kernels.hopper import SMS
from pallas_kernels.mosaic import interpreter
from pallas_kernels.sparse_mla import dense_mla, mosaic_gpu, sparse_mla
from pallas_kernels.sparse_mla.combine import combine
from pallas_kernels.sparse_mla.config import BF16, CONFIGS, FP8, choose_config
from pallas_kernels.sparse_mla.gather import InterpretedGather
from pallas_kernels.sparse_mla.products import InterpretedProducts
from tests import numpy_model
from tests.kernels.cases import sparse_mla as cases

TOKENS, HEADS, LATENT, ROPE, BLOCKS, CHOSEN, SCALE = 5, 3, 128, 16, 3, 10, 0.11


def case(seed: int = 0):
    rng = np.random.default_rng(seed)
    queries = rng.standard_normal((TOKENS, HEADS, LATENT + ROPE)).astype(np.float32)
    kv = rng.standard_normal((2, BLOCKS, 64, LATENT + ROPE)).astype(np.float32)
    slots = np.stack([rng.permutation(BLOCKS * 64)[:CHOSEN] for _ in range(TOKENS)]).astype(np.int32)
    return queries, kv, slots


def attend(queries, kv, slots, **options):
    out, lse = sparse_mla(
        jnp.asarray(queries), jnp.asarray(kv), 1, jnp.asarray(slots), scale=SCALE, rope_dim=ROPE, **options
    )
    return np.asarray(out), np.asarray(lse)


def expected(queries, kv, slots):
    rows = kv[1].reshape(-1, kv.shape[-1]).astype(np.float64)
    out, lse = np.zeros((TOKENS, HEADS, LATENT)), np.full((TOKENS, HEADS), -np.inf)
    for t in range(TOKENS):
        keys = rows[slots[t][slots[t] >= 0]]
        if len(keys):
            scores = SCALE * queries[t].astype(np.float64) @ keys.T
            weights = np.exp(scores)
            lse[t] = np.log(weights.sum(-1))
            out[t] = weights @ keys[:, :LATENT] / weights.sum(-1, keepdims=True)
    return out, lse


def assert_same(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=2e-5, atol=2e-6)


def test_matches_numpy_with_absent_slots():
    queries, kv, slots = case()
    slots[1, 3:] = -1
    slots[2, ::2] = -1
    slots[3] = -1
    assert_same(attend(queries, kv, slots), expected(queries, kv, slots))


def test_a_row_without_slots_gives_zeros_and_minus_infinity():
    queries, kv, slots = case()
    slots[0] = -1
    out, lse = attend(queries, kv, slots)
    assert (out[0] == 0).all() and (lse[0] == -np.inf).all()
    assert np.isfinite(out).all() and np.isfinite(lse[1:]).all()


def test_a_duplicate_counts_twice():
    queries, kv, slots = case()
    slots[0, 1] = slots[0, 0]
    got = attend(queries, kv, slots)
    assert_same(got, expected(queries, kv, slots))
    once = slots.copy()
    once[0, 1] = -1
    assert (attend(queries, kv, once)[1][0] < got[1][0]).all()


def test_order_of_the_slots_does_not_matter():
    queries, kv, slots = case()
    slots[2, 4:] = -1
    shuffled = np.random.default_rng(9).permuted(slots, axis=1)
    assert_same(attend(queries, kv, shuffled), attend(queries, kv, slots))


def test_rows_that_nobody_chose_may_hold_anything():
    queries, kv, slots = case()
    slots[1, 5:] = -1
    poisoned = np.full_like(kv, np.nan)
    flat, chosen = poisoned.reshape(2, -1, kv.shape[-1]), np.unique(slots[slots >= 0])
    flat[1, chosen] = kv.reshape(2, -1, kv.shape[-1])[1, chosen]
    assert_same(attend(queries, poisoned, slots), attend(queries, kv, slots))


def test_large_scores_do_not_overflow():
    queries, kv, slots = case()
    out, lse = attend(queries * 1e4, kv, slots)
    assert np.isfinite(out).all() and np.isfinite(lse).all()


def test_chunks_of_tokens_change_nothing():
    queries, kv, slots = case()
    whole = attend(queries, kv, slots)
    for part, same in zip(attend(queries, kv, slots, chunk_bytes=1), whole, strict=True):
        np.testing.assert_allclose(part, same, rtol=1e-6, atol=1e-6)


def test_fp8_records_equal_their_dequantised_rows():
    queries, _, slots = case()
    rng = np.random.default_rng(3)
    latent, rope_key, key = (rng.standard_normal((BLOCKS * 64, n)).astype(np.float32) for n in (LATENT, ROPE, 8))
    rope_key = np.asarray(jnp.asarray(rope_key, jnp.bfloat16), np.float32)
    packed = jnp.zeros((2, BLOCKS, 64, record_bytes(LATENT, ROPE)), jnp.uint8)
    packed, _ = store_keys(packed, jnp.zeros((2, BLOCKS, 64, 8)), 1, jnp.arange(BLOCKS * 64), latent, rope_key, key)
    rows = np.concatenate([numpy_model.fake_quantise(latent, "ue8m0"), rope_key], -1)
    plain = np.stack([np.zeros_like(rows), rows]).reshape(2, BLOCKS, 64, -1).astype(np.float32)
    assert_same(attend(queries, packed, slots), expected(queries, plain, slots))


@pytest.mark.parametrize("chunk_bytes", [1, 2**26])
def test_dense_equals_sparse_over_all_visible_keys(chunk_bytes):
    queries, kv, _ = case()
    positions = np.array([0, 7, 100, 191, -1], np.int32)
    slots = np.where(np.arange(BLOCKS * 64) <= positions[:, None], np.arange(BLOCKS * 64), -1).astype(np.int32)
    context = jnp.asarray(kv[1].reshape(1, BLOCKS * 64, -1))
    dense = dense_mla(
        jnp.asarray(queries),
        context,
        jnp.zeros(TOKENS, jnp.int32),
        jnp.asarray(positions),
        scale=SCALE,
        rope_dim=ROPE,
        chunk_bytes=chunk_bytes,
    )
    np.testing.assert_allclose(dense, attend(queries, kv, slots)[0], rtol=2e-5, atol=2e-6)


def run(case: cases.Case, **options):
    arrays = [jnp.asarray(x) for x in case.arguments]
    lengths = None if case.lengths is None else jnp.asarray(case.lengths)
    return sparse_mla(*arrays, **{**case.options, "lengths": lengths}, **options)


REFERENCE_CASES = [
    cases.case("anywhere", [40, 0, 1, 17], heads=3, keys=40, blocks=2),
    cases.case("prefix", [40, 0, 1, 17], heads=3, keys=40, blocks=2, prefix=True),
    cases.case("records", [40, 0, 1, 17], heads=3, keys=40, blocks=2, fp8=True),
    cases.case("records, other scales", [40, 0, 17], heads=3, keys=40, blocks=2, fp8=True, powers=False, prefix=True),
    cases.case("rising", [40, 0, 17], heads=3, keys=40, blocks=2, prefix=True, rising=True),
]


@pytest.mark.parametrize("case", REFERENCE_CASES, ids=lambda case: case.name)
def test_reference_on_hard_cases(case):
    """In float32, where only the order of sums differs."""
    case = dataclasses.replace(case, queries=case.queries.astype(np.float32))
    cases.check(case, *run(case, backend="reference"), rms=1e-5, largest=1e-5, of_lse=1e-5)


def test_keys_at_and_after_a_length_do_not_count():
    queries, kv, slots = case()
    lengths = np.array([10, 0, 1, 7, 3], np.int32)
    shortened = np.where(np.arange(CHOSEN) < lengths[:, None], slots, -1).astype(np.int32)
    got = attend(queries, kv, slots, lengths=jnp.asarray(lengths))
    assert_same(got, attend(queries, kv, shortened))
    assert_same(got, expected(queries, kv, shortened))


def test_shapes_must_fit_together():
    queries, kv, slots = (jnp.asarray(x) for x in case())
    with pytest.raises(ValueError, match=r"lengths \[T\].*\(4,\)"):
        attend(queries, kv, slots, lengths=jnp.zeros(4, jnp.int32))
    with pytest.raises(ValueError, match=r"slots \[T, K\].*\(3, 10\)"):
        attend(queries, kv, slots[:3])


def shapes(tokens=2, heads=128, keys=2048, *, fp8=False, latent=512, rope=64, block=64, dtype=jnp.bfloat16, layers=2):
    cache = (record_bytes(latent, rope), jnp.uint8) if fp8 else (latent + rope, jnp.bfloat16)
    return (
        jax.ShapeDtypeStruct((tokens, heads, latent + rope), dtype),
        jax.ShapeDtypeStruct((layers, 8, block, cache[0]), cache[1]),
        jax.ShapeDtypeStruct((tokens, keys), jnp.int32),
    )


def test_unsupported_calls_say_what_is_supported():
    for arguments, scale, rope_dim, message in [
        (shapes(dtype=jnp.float32), 0.1, 64, "queries of float32; it takes bfloat16"),
        (shapes(latent=256), 0.1, 64, r"queries \(2, 128, 320\).*512 latent and 64 rope"),
        (shapes(latent=256, fp8=True), 0.1, 64, r"records of 656 bytes"),
        (shapes(), 0.1, 32, "rope_dim 32"),
        (shapes(block=32), 0.1, 64, "blocks of 64"),
        (shapes(heads=129), 0.1, 64, "129 heads; it takes 1 to 128"),
        (shapes(keys=2049), 0.1, 64, "2049 keys a token; it takes 1 to 2048"),
        (shapes(keys=0), 0.1, 64, "0 keys a token; it takes 1 to 2048"),
        (shapes(layers=2**23), 0.1, 64, "less than 2\\^31"),
        (shapes(), 0.0, 64, "scale 0.0; it takes a positive number"),
    ]:
        with pytest.raises(BackendError, match=message):
            queries, kv, slots = arguments
            sparse_mla(queries, kv, 0, slots, scale=scale, rope_dim=rope_dim, backend="mosaic_gpu")
    assert mosaic_gpu.unsupported(*shapes(), 0.1, 64) is None
    assert mosaic_gpu.unsupported(*shapes(fp8=True, heads=1, keys=1), 0.1, 64) is None


# ---- the kernel ------------------------------------------------------------------------------------------------


def lower(arguments, lengths, **options):
    """Compiles for a GPU as far as that is possible without one; returns the text of the program."""
    queries, kv, slots = arguments
    lengths = jax.ShapeDtypeStruct(slots.shape[:1], jnp.int32) if lengths else None

    def op(queries, kv, layer, slots, lengths):
        return mosaic_gpu.sparse_mla(queries, kv, layer, slots, lengths, 0.1, **options)

    layer = jax.ShapeDtypeStruct((), jnp.int32)
    return jax.jit(op).trace(queries, kv, layer, slots, lengths).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config_lowers(config):
    fp8 = config.registers == FP8.registers
    text = lower(shapes(fp8=fp8), True, config=config)
    assert text.count("stablehlo.custom_call @mosaic_gpu") == (1 if config.splits == 1 else 2)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("heads", "keys", "lengths"), [(3, 130, False), (64, 1, False), (65, 2048, True)])
def test_other_shapes_lower(fp8, heads, keys, lengths):
    lower(shapes(3, heads, keys, fp8=fp8), lengths)


def test_the_cache_is_handed_over_whole():
    """Nothing touches the cache, or a layer of it, but the flat view of it and the kernel."""
    text = lower(shapes(layers=3), True, config=BF16)
    sizes = ("3x8x64x576xbf16", "1536x576xbf16", "8x64x576xbf16", "512x576xbf16")
    lines = [line for line in text.splitlines() if any(size in line for size in sizes)]
    operations = [re.search(r"func\.func|call @sparse_mla|stablehlo\.\w+", line) for line in lines]
    assert [found and found.group() for found in operations] == [
        "func.func",
        "call @sparse_mla",
        "func.func",
        "stablehlo.reshape",
        "stablehlo.custom_call",
    ]


def test_choice_of_splits():
    for fp8 in (False, True):
        for tokens in (1, 2, 3, 8, 17, 32, 64, 67, 100, 128, 500, 4096):
            for groups in (1, 2):
                for keys in (1, 128, 129, 500, 2048):
                    config = choose_config(tokens, groups, keys, fp8=fp8)
                    assert config in CONFIGS
                    assert config.splits <= -(-keys // 128)
                    assert config.splits == 1 or tokens * groups < 2 * SMS
    assert choose_config(1, 2, 2048, fp8=True).splits == 16
    assert choose_config(8, 2, 2048, fp8=True).splits == 8
    assert choose_config(128, 2, 2048, fp8=True).splits == 1


def test_configs_check_themselves():
    for wrong in (
        {"splits": 0},
        {"ctas": 0},
        {"slack": -1.0},
        {"registers": (216, 80)},
        {"registers": (212, 72)},
    ):
        with pytest.raises(ValueError, match=str(next(iter(wrong)))):
            dataclasses.replace(BF16, **wrong)


def test_no_tokens():
    queries, kv, slots = (jnp.zeros(x.shape, x.dtype) for x in shapes(tokens=0, keys=5))
    out, lse = sparse_mla(queries, kv, 1, slots, scale=0.1, rope_dim=64, backend="interpret")
    assert out.shape == (0, 128, 512) and out.dtype == jnp.bfloat16 and lse.shape == (0, 128)


@pytest.fixture
def interpreting(capfd):
    """Checks afterwards that the interpreter saw no race.

    A warpgroup that waits in the interpreter keeps a thread of XLA's pool, which has as many as NPROC says when JAX
    starts, or as there are processors: with fewer than warpgroups, nobody would be left to do what they wait for.
    """
    assert int(os.environ.get("NPROC", os.cpu_count())) >= 4, "set NPROC=8 before JAX starts: see tests/conftest.py"
    yield
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("case", "config"),
    [
        (
            cases.case("three items in one CTA", [130, 0, 70], heads=3, keys=130, blocks=3, prefix=True),
            dataclasses.replace(BF16, ctas=1),
        ),
        (
            cases.case("absent keys, two head groups", [100], heads=65, keys=200, blocks=4),
            dataclasses.replace(BF16, ctas=1, slack=0.0),
        ),
        (
            cases.case("splits, one without keys", [0, 200, 40], heads=3, keys=300, blocks=5, fp8=True),
            dataclasses.replace(FP8, ctas=2, splits=2),
        ),
        (
            cases.case("rising", [250], heads=3, keys=250, blocks=5, fp8=True, prefix=True, rising=True),
            dataclasses.replace(FP8, ctas=1),
        ),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_kernel_in_the_interpreter(case, config, interpreting):
    lengths = None if case.lengths is None else jnp.asarray(case.lengths)
    arrays = [jnp.asarray(x) for x in case.arguments]
    op = jax.jit(lambda *x: mosaic_gpu.sparse_mla(*x, cases.SCALE, config=config, interpret=interpreter()))
    cases.check(case, *op(*arrays, lengths))


class LateProducts(InterpretedProducts):
    """Leaves out the kernel's waits for all but the last product, after which it gives a slot of keys back."""

    def wait(self, pending):
        if pending != 1:
            super().wait(pending)

    def read(self, accumulator, pending=None):
        if pending is not None:
            super().wait(pending)
        return super().read(accumulator)


class EarlyGather(InterpretedGather):
    """Says that a part of the keys is there before it is."""

    def fill(self, kv, keys, stat, ready, *others, part, unit):
        bars, waits = ready
        if unit == self.units - 1:
            _, _, slot, _ = others
            plgpu.barrier_arrive(bars.at[2 * slot + part])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plgpu, "barrier_arrive", lambda bar: None)
            super().fill(kv, keys, stat, (bars, waits), *others, part=part, unit=unit)


@pytest.mark.interpret
@pytest.mark.parametrize("fault", [LateProducts, EarlyGather])
def test_the_interpreter_sees_faults_of_the_pipeline(fault, monkeypatch, capfd):
    """The kernel's own barriers and waits run there: without one of them there is a race."""
    monkeypatch.setattr(mosaic_gpu, fault.__base__.__name__, fault)
    case = cases.case("three pairs of blocks", [257], heads=2, keys=257, blocks=5, fp8=True, prefix=True)
    arrays = [jnp.asarray(x) for x in (*case.arguments, case.lengths)]
    untraced = mosaic_gpu.sparse_mla.__wrapped__  # the jitted one may have been traced without the fault
    config = dataclasses.replace(FP8, ctas=1)
    jax.block_until_ready(
        jax.jit(lambda *x: untraced(*x, cases.SCALE, config=config, interpret=interpreter()))(*arrays)
    )
    assert "RACE DETECTED" in capfd.readouterr().out


@pytest.mark.interpret
def test_gradient_of_the_kernel_is_that_of_the_reference(interpreting):
    case = cases.case("tiny", [5], heads=2, keys=6, blocks=1, prefix=True)
    kv = np.where(np.isnan(case.kv.astype(np.float32)), 0, case.kv.astype(np.float32)).astype(ml_dtypes.bfloat16)
    case = dataclasses.replace(case, kv=kv)
    weights = np.random.default_rng(0).standard_normal((1, 2, 512)).astype(np.float32)

    def loss(queries, kv, backend):
        arguments = dataclasses.replace(case, queries=queries, kv=kv)
        out, lse = run(arguments, backend=backend)
        return (out.astype(jnp.float32) * weights).sum() + lse.sum()

    arguments = jnp.asarray(case.queries), jnp.asarray(case.kv)
    got, wanted = (jax.grad(loss, (0, 1))(*arguments, backend) for backend in ("interpret", "reference"))
    for g, w in zip(got, wanted, strict=True):
        assert np.asarray(g, np.float32).any()
        np.testing.assert_array_equal(np.asarray(g, np.float32), np.asarray(w, np.float32))


@pytest.mark.interpret
def test_combine_is_exact_and_leaves_out_what_was_never_written(interpreting):
    rng = np.random.default_rng(0)
    parts = rng.standard_normal((2, 3, 2, 512)).astype(np.float32)
    lse = (30 * rng.standard_normal((2, 3, 2))).astype(np.float32)
    lse[0, 1], parts[0, 1] = -np.inf, np.nan
    lse[1, :, 1], parts[1, :, 1] = -np.inf, np.nan
    out, total = combine(jnp.asarray(parts), jnp.asarray(lse), jnp.float32, interpret=interpreter())
    with np.errstate(divide="ignore"):
        expected_total = np.log(np.exp(lse.astype(np.float64)).sum(1))
        weights = np.exp(lse.astype(np.float64) - np.where(np.isinf(expected_total), 0, expected_total)[:, None])
    expected = np.where(lse[..., None] > -np.inf, weights[..., None] * parts, 0).sum(1)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total, expected_total, rtol=1e-6)
    assert not np.asarray(out)[1, 1].any() and np.isneginf(np.asarray(total)[1, 1])
