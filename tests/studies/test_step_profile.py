"""The profile of a step, on a small model: the host's part."""

import jax.numpy as jnp
import pytest

from dsv32_jax.config import ModelConfig
from dsv32_jax.engine.engine import Engine
from dsv32_jax.experiments.studies import step_profile
from dsv32_jax.experiments.workbench.random_model import random_model


@pytest.fixture(scope="module")
def lm():
    small = {"num_hidden_layers": 1, "num_nextn_predict_layers": 0, "quantization_config": None}
    return random_model(ModelConfig.tiny(**small, max_position_embeddings=512))


def test_the_host_alone_runs_no_model(lm, monkeypatch):
    monkeypatch.setattr(step_profile, "OF_HOST", 10)
    monkeypatch.setattr(lm.model, "head", jnp.full_like(lm.model.head, jnp.nan))  # whoever reads it fails
    engine = Engine(lm, cache_tokens=1024, max_tokens=12, max_sequences=2, programs=step_profile.without_model)
    requests = step_profile.add(engine, [list(range(2, 102)), [7] * 50], 80)
    assert step_profile.host_milliseconds(engine, requests) > 0
    assert {request.completions[0].finish_reason for request in requests} == {"cancelled"}
    assert all(len(request.completions[0].tokens) >= 10 for request in requests)  # all of them were continued
    assert engine.pool.statistics().in_use == 0


def test_a_row_without_a_gpu_is_the_host_alone(lm, monkeypatch):
    monkeypatch.setattr(step_profile, "OF_HOST", 10)
    monkeypatch.setattr(step_profile, "TIMED", 1)
    (row,) = step_profile.measure(lm, 2, 6, 60)
    assert row["concurrency"] == 2 and row["host_milliseconds"] > 0 and set(row) == {"concurrency", "host_milliseconds"}
