"""The kernel of sparse_mla on a GPU, on real sizes: against float64, and the same bits in each run."""

import dataclasses
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sparse_mla import mosaic_gpu, sparse_mla
from pallas_kernels.sparse_mla.config import BF16, CONFIGS, FP8
from tests.kernels.cases import sparse_mla as cases

COUNTS = [2048, 0, 1, 2, 63, 64, 65, 127, 128, 129, 256, 300, 1000, 1023, 1920, 1921, 2047, 2048]
ROUNDED_SCALES = {"rms": 1e-2, "largest": 3e-2, "of_lse": 1e-2}
"""For FP8 scales that are no powers of two: they and the values are rounded to bf16."""


@pytest.fixture
def seed() -> int:
    """Another one each time; a failing test shows it."""
    number = secrets.randbits(32)
    print(f"seed {number}")
    return number


def on_device(case: cases.Case) -> tuple:
    lengths = None if case.lengths is None else jnp.asarray(case.lengths)
    return *(jnp.asarray(x) for x in case.arguments), lengths


def check(case: cases.Case, config=None, *, runs: int = 2, **bounds) -> None:
    """The results come first, before the reference could leave them in memory."""
    if config is None:

        def op(queries, kv, layer, slots, lengths):
            options = {**case.options, "lengths": lengths}
            return sparse_mla(queries, kv, layer, slots, **options, backend="mosaic_gpu")
    else:

        def op(*arrays):
            return mosaic_gpu.sparse_mla(*arrays, cases.SCALE, config=config)

    kernel, arguments = jax.jit(op), on_device(case)
    results = [[np.asarray(x) for x in kernel(*arguments)] for _ in range(runs)]
    for other in results[1:]:
        for first, again in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(first.view(np.uint8), again.view(np.uint8))
    cases.check(case, *results[0], **bounds)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("rising", [False, True])
def test_real_sizes(fp8, prefix, rising, seed):
    options = {"fp8": fp8, "prefix": prefix, "rising": rising, "seed": seed}
    check(cases.case("", COUNTS, heads=128, keys=2048, blocks=128, **options), runs=5)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("prefix", [False, True])
def test_every_config(config, prefix, seed):
    fp8 = config.registers == FP8.registers
    case = cases.case("", COUNTS, heads=128, keys=2048, blocks=128, fp8=fp8, prefix=prefix, seed=seed)
    check(case, config)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("changes", [{"slack": 0.0}, {"ctas": 1}, {"ctas": 5}, {"prefetch": True}])
def test_other_configs(fp8, changes, seed):
    config = dataclasses.replace(FP8 if fp8 else BF16, **changes)
    check(cases.case("", COUNTS, heads=65, keys=2048, blocks=64, fp8=fp8, prefix=True, seed=seed), config)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    ("heads", "keys", "prefix"),
    [
        (1, 1, True),
        (4, 100, False),
        (16, 128, True),
        (63, 130, False),
        (64, 700, True),
        (65, 128, False),
        (127, 1, True),
    ],
)
def test_heads_and_keys(fp8, heads, keys, prefix, seed):
    counts = [keys, 0, keys // 2, 1]
    check(cases.case("", counts, heads=heads, keys=keys, blocks=12, fp8=fp8, prefix=prefix, seed=seed))


@pytest.mark.parametrize(("tokens", "prefix"), [(1, True), (3, False), (8, True), (32, True), (67, False)])
@pytest.mark.parametrize("fp8", [False, True])
def test_few_tokens(fp8, tokens, prefix, seed):
    counts = np.random.default_rng(seed).integers(0, 2049, tokens).tolist()
    check(cases.case("", counts, heads=128, keys=2048, blocks=64, fp8=fp8, prefix=prefix, seed=seed))


@pytest.mark.parametrize("splits", [1, 4])
def test_scales_that_are_no_powers_of_two(splits, seed):
    case = cases.case("", COUNTS, heads=128, keys=2048, blocks=64, fp8=True, powers=False, prefix=True, seed=seed)
    check(case, dataclasses.replace(FP8, splits=splits), **ROUNDED_SCALES)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("splits", [1, 2])
def test_the_same_bits_in_every_run(fp8, splits, seed):
    """More items than fit at a time, so that CTAs meet in another way each time."""
    tokens, keys, blocks = 300, 2048, 256
    rng = np.random.default_rng(seed)
    case = cases.case("", [1], heads=128, keys=1, blocks=1, fp8=fp8, seed=seed)
    width = case.kv.shape[-1]
    if fp8:
        kv = rng.integers(0, 127, (2, blocks, 64, width), np.uint8)
        kv[..., 512:528] = np.full(4, 0.01, np.float32).view(np.uint8)
        kv[..., 529::2] &= 0x3F  # rope numbers below 2
        kv = jnp.asarray(kv)
    else:
        kv = jax.random.normal(jax.random.key(seed), (2, blocks, 64, width), jnp.bfloat16)
    queries = jax.random.normal(jax.random.key(seed + 1), (tokens, 128, 576), jnp.bfloat16)
    slots = jnp.asarray(rng.integers(0, blocks * 64, (tokens, keys), np.int32))
    lengths = jnp.asarray(rng.integers(0, keys + 1, tokens, np.int32))
    config = dataclasses.replace(FP8 if fp8 else BF16, splits=splits)
    kernel = jax.jit(lambda *x: mosaic_gpu.sparse_mla(*x, cases.SCALE, config=config))
    first = kernel(queries, kv, jnp.int32(1), slots, lengths)
    assert bool(jnp.isfinite(first[0].astype(jnp.float32)).all())
    for _ in range(20):
        again = kernel(queries, kv, jnp.int32(1), slots, lengths)
        for x, y in zip(first, again, strict=True):
            assert bool((x.view(jnp.uint8) == y.view(jnp.uint8)).all())


@pytest.mark.parametrize("fp8", [False, True])
def test_rows_beyond_4_gib(fp8, seed):
    """Addresses need more than 32 bits, and only the last layer holds numbers."""
    case = cases.case("", [300, 0, 128], heads=128, keys=300, blocks=8, fp8=fp8, prefix=True, seed=seed)
    layers, blocks, width = 5, 16384, case.kv.shape[-1]
    bytes_of_a_layer = blocks * 64 * width * case.kv.dtype.itemsize
    assert (layers - 1) * bytes_of_a_layer > 2**31
    kv = jnp.full((layers, blocks, 64, width), 0xFF if fp8 else jnp.nan, case.kv.dtype)
    kv = jax.jit(lambda kv, new: kv.at[layers - 1, -8:].set(new), donate_argnums=0)(kv, jnp.asarray(case.kv[1]))
    shift = (blocks - 8) * 64
    slots = jnp.where(jnp.asarray(case.slots) < 2**30, jnp.asarray(case.slots) + shift, -1)
    kernel = jax.jit(lambda *x: mosaic_gpu.sparse_mla(*x, cases.SCALE))
    results = kernel(jnp.asarray(case.queries), kv, jnp.int32(layers - 1), slots, jnp.asarray(case.lengths))
    cases.check(case, *(np.asarray(x) for x in results))


def test_layers_share_one_program(seed):
    case = cases.case("", [100, 30], heads=128, keys=128, blocks=8, seed=seed)
    traces = []

    @jax.jit
    def op(queries, kv, layer, slots):
        traces.append(layer)
        return sparse_mla(queries, kv, layer, slots, scale=cases.SCALE, rope_dim=cases.ROPE, backend="mosaic_gpu")

    queries, kv, layer, slots, _ = on_device(case)
    swapped = kv[::-1]
    results = [np.asarray(x) for x in op(queries, kv, layer, slots)]
    for x, y in zip(results, op(queries, swapped, 1 - layer, slots), strict=True):
        np.testing.assert_array_equal(x.view(np.uint8), np.asarray(y).view(np.uint8))
    assert len(traces) == 1
    cases.check(case, *results)
