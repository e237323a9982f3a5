"""The measurement of the engine under load, on a small model: what it counts."""

import argparse
import threading

import numpy as np
import pytest

from dsv32_jax.config import ModelConfig
from dsv32_jax.experiments.studies import serving
from dsv32_jax.experiments.workbench.random_model import random_model

SIZES = serving.Sizes((100, 128), (2, 6))


@pytest.fixture(scope="module")
def row():
    small = {"num_hidden_layers": 1, "num_nextn_predict_layers": 0, "quantization_config": None}
    lm = random_model(ModelConfig.tiny(**small, max_position_embeddings=256))
    arguments = argparse.Namespace(
        prompt=SIZES.prompt,
        new=SIZES.new,
        rounds=3,
        repeat=3,
        step_tokens=4,
        least_step_tokens=8,
        fill=[2],
        speculate=False,
        turns=None,
    )
    measured, saved = {"concurrency": 2}, []
    serving.measure(lm, serving.Prompts(lm), measured, arguments, saved.append)
    return measured | {"saved": saved}


def test_all_requests_are_served_in_both_ways(row):
    assert row["naive"]["requests"] == 2
    runs = {"engine": 1, "engine_shared": 1, "engine_filled": 2, "engine_filled_shared": 2, "engine_shared_fourfold": 4}
    for name, times in runs.items():
        assert row[name]["requests"] == 3 * times * 2 and row[name]["lost"] == 0
        assert sorted(row[name]["requests_per_second_of_all"])[1] == row[name]["requests_per_second"]
        assert row[name]["warmup"]["sequences"] == times * 2
        assert row[name]["ratio"] == row[name]["requests_per_second"] / row["naive"]["requests_per_second"]
        assert name in row["saved"]


def test_times_are_those_of_all_tokens(row):
    engine = row["engine"]
    between, mean = engine["between_tokens_seconds"], engine["per_output_token_seconds"]
    assert 0 < between["p50"] <= between["p90"] <= between["p99"] < engine["seconds"]
    assert 0 < mean["p50"] <= mean["p99"] <= between["p99"]  # a mean of some of them


def test_what_the_caches_hold(row):
    """Requests of up to 134 tokens have 2 or 3 blocks of 64; each row of the static batch has 4."""
    assert 0.5 < row["engine"]["utilisation"] <= 1
    tokens = sum(len(work.prompt) + work.new for work in workload(2, 2, shared=False))
    assert row["naive"]["utilisation"] == tokens / (2 * 4 * 64)


def test_of_several_runs_the_middle_one_is_told_and_what_any_lost():
    runs = [{"requests_per_second": speed, "lost": incomplete} for speed, incomplete in ((3.0, 0), (1.0, 2), (2.0, 1))]
    middle = {"requests_per_second": 2.0, "requests_per_second_of_all": [1.0, 2.0, 3.0], "lost": 3}
    assert serving.repeated(3, iter(runs).__next__) == middle


def workload(count, batch, *, shared):
    prompts = serving.Prompts(argparse.Namespace(config=ModelConfig.tiny(), tokenizer=None))
    return serving.workload(count, batch, SIZES, prompts, shared)


def test_a_batch_has_one_that_is_longest():
    work = workload(12, 4, shared=False)
    for i, one in enumerate(work):
        assert SIZES.prompt[0] <= len(one.prompt) <= SIZES.prompt[1] and SIZES.new[0] <= one.new <= SIZES.new[1]
        assert i % 4 or (len(one.prompt), one.new) == (SIZES.prompt[1], SIZES.new[1])
    assert {(len(one.prompt), one.new) for one in workload(3, 1, shared=False)} == {(114, 4)}


def test_prefixes_are_shared_within_a_group():
    work = workload(2 * serving.GROUP, 4, shared=True)
    shared_tokens = [int(serving.SHARED * len(request.prompt)) for request in work]
    for first in (0, serving.GROUP):
        longest = max(range(first, first + serving.GROUP), key=shared_tokens.__getitem__)
        for i in range(first, first + serving.GROUP):
            assert work[i].prompt[: shared_tokens[i]] == work[longest].prompt[: shared_tokens[i]]
    assert work[0].prompt[:6] != work[serving.GROUP].prompt[:6]
    alone = [request.prompt for request in workload(2 * serving.GROUP, 4, shared=False)]
    assert [len(prompt) for prompt in alone] == [len(request.prompt) for request in work]
    assert not np.array_equal(alone[1][:6], work[1].prompt[:6])


def test_whoever_measures_is_alone(tmp_path):
    """One is still compiling; the other one has to wait."""
    file, entered = tmp_path / "turns", threading.Event()

    def measures():
        with serving.turn(file, alone=True):
            entered.set()

    other = threading.Thread(target=measures)
    with serving.turn(file, alone=False), serving.turn(file, alone=False):
        other.start()
        assert not entered.wait(0.3)
    other.join(timeout=30)
    assert entered.is_set()
