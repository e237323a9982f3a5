"""The kernel of top_k on a GPU, on real sizes: the exact set, and the same bits in each run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.experiments.studies import held_out
from dsv32_jax.generate.loading import load
from pallas_kernels.top_k import mosaic_gpu, top_k
from pallas_kernels.top_k.config import CONFIGS, FEW_ROWS, MANY_ROWS
from tests.kernels.cases import top_k as cases

RUNS = 3
MISLED = dataclasses.replace(MANY_ROWS, aim=0, margin=1)
"""The first threshold is the greatest score of the sample, so that nearly every long row is read again."""


def check(case: cases.Case, k: int, config=None, *, with_lengths: bool = True) -> None:
    if config is None:
        kernel = jax.jit(lambda x, *n: top_k(x, k, lengths=n[0] if n else None, backend="mosaic_gpu"))
    else:
        kernel = jax.jit(lambda x, *n: mosaic_gpu.top_k(x, k, lengths=n[0] if n else None, config=config))
    arguments = (jnp.asarray(case.scores), *([jnp.asarray(case.lengths)] if with_lengths else []))
    chosen = np.asarray(kernel(*arguments))
    assert cases.wrong_rows(case, k, chosen) == []
    for _ in range(RUNS - 1):
        np.testing.assert_array_equal(np.asarray(kernel(*arguments)), chosen)


@pytest.mark.parametrize("length", [1, 64, 300, 4096, 8448, 65536, 163840])
@pytest.mark.parametrize("k", [1, 64, 256, 2047, 2048])
def test_hard_rows(length, k):
    for case in cases.adversarial(length, k):
        check(case, k)


@pytest.mark.parametrize("length", [32768, 100096])
@pytest.mark.parametrize(
    "config",
    [*CONFIGS, MISLED],
    ids=lambda config: f"{config.warpgroups} warpgroups, cluster {config.cluster}, aim {config.aim}",
)
def test_hard_rows_in_every_config(config, length):
    for case in cases.adversarial(length, 2048, config.chunk):
        check(case, 2048, config)


@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
def test_rows_that_are_read_again_by_a_cluster(cluster):
    config = dataclasses.replace(FEW_ROWS, aim=0, margin=1, cluster=cluster)
    for case in cases.adversarial(65536, 500):
        check(case, 500, config)


@pytest.mark.parametrize("rows", [1, 5, 17, 40, 66, 67, 132, 133, 264, 265, 300, 1000])
def test_rows_of_random_lengths(rows):
    """Every number of rows a CTA, and CTAs with one row less than others."""
    check(cases.random_lengths(rows, 20480, seed=rows), 2048)


@pytest.mark.parametrize("rows", [3, 200])
def test_whole_rows(rows):
    scores = np.random.default_rng(rows).standard_normal((rows, 70001), dtype=np.float32)
    check(cases.Case("", scores, np.full(rows, 70001, np.int32)), 2048, with_lengths=False)


def test_no_rows():
    assert top_k(jnp.zeros((0, 512)), 4, backend="mosaic_gpu").shape == (0, 4)


def test_scores_of_the_demo_model():
    """An indexer's scores have what random ones lack: trends, outliers, and neighbours that are alike."""
    demo = load("demo", backend="reference")
    trace = demo.trace(held_out.windows(demo.tokenizer, 2048, 1)[0])
    for scores in trace.index_scores:
        case = cases.Case("", np.asarray(scores, np.float32), np.arange(1, len(scores) + 1, dtype=np.int32))
        check(case, demo.config.index_topk)
        check(case, 100, with_lengths=False)
        chosen, expected = (
            np.asarray(top_k(jnp.asarray(scores), 256, backend=backend)) for backend in ("mosaic_gpu", "reference")
        )
        np.testing.assert_array_equal(np.sort(chosen), np.sort(expected))
