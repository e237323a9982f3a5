"""`index_topk_freq`: layers that attend to what an earlier layer chose."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from dsv32_jax.config import ModelConfig
from dsv32_jax.engine.engine import Engine
from dsv32_jax.engine.request import SamplingParams
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.workbench.steps import Step, StepShape
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.model.model import DeepseekV32
from dsv32_jax.model.sequence import Run
from pallas_kernels.index_select import index_select
from tests.harness import EXACT, one_shape

IDS = [(5 + i * i) % 97 + 2 for i in range(40)]
SHARED = dataclasses.replace(EXACT, index_topk_freq=2)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """Three layers, of which the first and the third choose; 8 of up to 40 keys."""
    config = ModelConfig.tiny(
        num_hidden_layers=3, initializer_range=0.15, quantization_config=None, num_nextn_predict_layers=0, index_topk=8
    )
    return LanguageModel(jax.jit(lambda: DeepseekV32(config, nnx.Rngs(0)))(), config, options=EXACT)


@pytest.fixture(scope="module")
def sharing(lm) -> LanguageModel:
    return LanguageModel(lm.model, lm.config, options=SHARED)


def remembering():
    """A selection that gives an odd layer what the layer before it got, in the order in which a step is traced."""
    last = []

    def select(*arrays, k, backend):
        if arrays[3] % 2 == 0:
            last[:] = [index_select(*arrays, k=k, backend=backend)]
        return last[0]

    return select


def test_a_sharing_step_is_one_whose_selection_remembers_the_last(lm, sharing):
    with one_shape(64, 1):
        shared, remembered, plain = (m.logits(IDS) for m in (sharing, lm.with_parts(index_select=remembering()), lm))
    np.testing.assert_array_equal(shared, remembered)
    assert np.abs(shared - plain).max() > 1e-3


def test_a_trace_shows_the_shared_set_and_the_scores_of_the_layer_that_did_not_choose(lm, sharing):
    trace, plain = sharing.trace(IDS), lm.trace(IDS)
    np.testing.assert_array_equal(trace.topk[1], trace.topk[0])
    assert (plain.topk[1] != plain.topk[0]).any()
    assert (trace.topk[2] != trace.topk[1]).any()
    assert trace.index_scores.shape == plain.index_scores.shape
    np.testing.assert_array_equal(trace.index_scores[0], plain.index_scores[0])
    assert np.isfinite(trace.index_scores[1][np.tril_indices(len(IDS))]).all()


def test_layers_that_share_compute_no_index_queries(sharing):
    program = Step(sharing, StepShape(context=128)).compiled.as_text()
    computing = [layer for layer in range(3) if f"layers.{layer}/attn/indexer/" in program]
    assert computing == [0, 2]


@pytest.mark.slow
def test_the_engine_generates_what_the_model_generates_alone(sharing):
    alone = sharing.generate([IDS, IDS[:9]], 6).tokens
    engine = Engine(sharing, cache_tokens=512, max_sequences=2)
    requests = [engine.add(ids, SamplingParams(6, temperature=0.0, ignore_eos=True)) for ids in (IDS, IDS[:9])]
    while engine.busy:
        engine.step()
    np.testing.assert_array_equal([request.completions[0].tokens for request in requests], alone)


def test_what_cannot_share_is_refused(sharing):
    with pytest.raises(UserError, match="index_topk_freq: attention is dense"):
        dataclasses.replace(SHARED, attention="dense")
    with pytest.raises(UserError, match="index_topk_freq: 0"):
        dataclasses.replace(SHARED, index_topk_freq=0)
    with pytest.raises(UserError, match="whole sequences"):
        Run.of(SHARED)
    with pytest.raises(UserError, match="layer 1: attends to what layer 0 chose"):
        sharing.run_layer(1, np.zeros((4, sharing.config.hidden_size), np.float32))
