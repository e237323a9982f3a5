"""Scores and selection as one op: the best visible positions, whatever the chunks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.backend import BackendError
from pallas_kernels.index_select import index_select, mosaic_gpu
from pallas_kernels.indexer_logits import mosaic_gpu as logits_kernel
from pallas_kernels.indexer_logits.config import choose_config
from tests import numpy_model
from tests.kernels.cases import indexer_logits as cases
from tests.kernels.test_indexer_logits import SMALL, TOKENS, case, shapes

CASES = {case.name: case for case in cases.tiny()}


@pytest.mark.parametrize("k", [4, 64, 200])
@pytest.mark.parametrize("chunk_bytes", [1, 2**26])
def test_selection_is_the_best_visible(k, chunk_bytes):
    arguments, expected = case("float32")
    chosen = np.asarray(index_select(*arguments, k=k, chunk_bytes=chunk_bytes))
    assert chosen.shape == (TOKENS, k)
    for t in range(TOKENS):
        want = set(numpy_model.top_positions(expected[t], k).tolist())
        assert {p for p in chosen[t].tolist() if p >= 0} == want
        assert (chosen[t] >= 0).sum() == len(want)


def check(chosen: np.ndarray, case: cases.Case, k: int) -> None:
    """Each token's k best of the scores that it sees, best by value, then by lowest position; then -1."""
    expected = cases.expected(case, np.float32)
    for t, row in enumerate(np.asarray(chosen)):
        want = numpy_model.top_positions(np.where(case.visible[t], expected[t], -np.inf), k)
        assert sorted(row[: len(want)].tolist()) == sorted(want.tolist())
        assert (row[len(want) :] == -1).all()


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["mixture with decode tokens and padding", "one token a sequence"])
@pytest.mark.parametrize("whole", [True, False])
def test_kernels_in_the_interpreter(name, whole, monkeypatch, capfd):
    monkeypatch.setattr(
        logits_kernel, "choose_config", lambda *shape: dataclasses.replace(choose_config(*shape), **SMALL)
    )
    case = CASES[name]
    width = -(-case.visible.shape[1] // 256) * 256
    tokens = len(case.positions) if whole else 2
    chosen = index_select(*map(jnp.asarray, case.arguments), k=70, chunk_bytes=4 * width * tokens, backend="interpret")
    check(chosen, case, 70)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize(("tokens", "sequences"), [(3, 3), (300, 2)])
def test_kernels_lower_with_and_without_chunks(tokens, sequences):
    for chunk_bytes in (1, 2**30):
        call = jax.jit(functools.partial(mosaic_gpu.index_select, k=100, chunk_bytes=chunk_bytes))
        text = call.trace(*shapes(tokens, sequences)).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("mosaic_gpu_v2") == 2


def test_what_the_kernels_do_not_take_is_named():
    arguments = [jnp.zeros(x.shape, x.dtype) for x in shapes(2, 1)]
    with pytest.raises(BackendError, match="the kernel of index_select does not take k=2049"):
        index_select(*arguments, k=2049, backend="mosaic_gpu")
    with pytest.raises(BackendError, match="the kernel of index_select does not take queries of dtype float32"):
        index_select(arguments[0].astype(jnp.float32), *arguments[1:], k=3, backend="interpret")
