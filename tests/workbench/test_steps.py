"""Compiled steps on random caches, and models by name."""

import jax
import numpy as np
import pytest

from dsv32_jax.config import ModelConfig
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.workbench.models import model_named
from dsv32_jax.experiments.workbench.random_model import random_model
from dsv32_jax.experiments.workbench.steps import Step, StepShape, random_cache
from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.context import Options

CONFIG = ModelConfig.tiny(num_nextn_predict_layers=0)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize("act_quant", [False, True])
def test_a_random_cache_has_the_form_of_the_options(form, act_quant):
    options = Options(act_quant=act_quant, cache_dtype=form)
    cache = random_cache(CONFIG, 3, options)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), cache) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), KVCache.create(CONFIG, 3, options)
    )
    assert len({np.asarray(block).tobytes() for block in cache.index[0]}) == 3


@pytest.mark.parametrize(
    "shape",
    [
        StepShape(sequences=2, context=128),
        StepShape(phase="prefill", sequences=1, context=192, tokens=32, contiguous=True),
    ],
)
def test_a_batch_has_the_last_tokens_of_each_sequence_in_blocks_of_its_own(shape):
    batch = shape.batch(CONFIG)
    assert np.unique(batch.block_tables).size == shape.blocks
    assert (np.diff(batch.block_tables[0]) == 1).all() == shape.contiguous
    ends = batch.positions.reshape(shape.sequences, -1)
    np.testing.assert_array_equal(ends[:, -1], shape.context - 1)
    np.testing.assert_array_equal(batch.logit_rows, (np.arange(shape.sequences) + 1) * shape.tokens - 1)
    np.testing.assert_array_equal(batch.slots // 64, batch.block_tables[batch.sequence, batch.positions // 64])


def test_a_step_is_called_again_on_its_own_cache_and_counts_its_bytes():
    lm = random_model(CONFIG)
    step = Step(lm, StepShape(sequences=2, context=128))
    first, second = step(), step()
    np.testing.assert_array_equal(first, second)
    assert first.shape == (2,)
    assert step.memory["cache"] == 2 * 128 * KVCache.bytes_per_token(CONFIG, "float32", True)
    assert "sampling" in step.compiled.as_text()
    assert not step.kernels


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context": 100}, "context 100: must be a multiple of 64"),
        ({"context": 128, "phase": "both"}, "phase 'both' is unknown"),
        ({"context": 128, "sequences": 0}, "sequences 0"),
        ({"context": 128, "tokens": 2}, "a decode step has one token"),
        ({"context": 128, "phase": "prefill", "tokens": 129}, "tokens 129"),
    ],
)
def test_shapes_that_no_step_has_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        StepShape(**fields)


def test_a_context_longer_than_the_model_is_refused():
    with pytest.raises(UserError, match="at most max_position_embeddings = 1280"):
        Step(random_model(CONFIG), StepShape(context=1344))


def test_a_name_of_a_random_model_must_say_how_many_layers():
    with pytest.raises(UserError, match="full-width:N"):
        model_named("full-width")
