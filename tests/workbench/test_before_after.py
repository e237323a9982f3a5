"""The baseline end to end, and the comparison with it."""

import dataclasses

import jax
import numpy as np
import pytest

from dsv32_jax.config import ModelConfig
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.studies.serving import Sizes, Work
from dsv32_jax.experiments.workbench import before_after
from dsv32_jax.experiments.workbench.baseline import StaticBatches, baseline
from dsv32_jax.experiments.workbench.random_model import random_model
from dsv32_jax.generate.language_model import LanguageModel

CONFIG = ModelConfig.tiny(num_nextn_predict_layers=0, initializer_range=0.15, max_position_embeddings=256)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return random_model(CONFIG)


def test_the_baseline_has_none_of_the_optimisations_and_the_same_weights(lm):
    plain = baseline(lm)
    assert plain.options.attention == "dense" and not plain.options.act_quant
    assert plain.options.backend == "reference" and set(plain.options.parts.replaced) == {"dense_mla", "experts"}
    assert all(a is b for a, b in zip(jax.tree.leaves(plain.model), jax.tree.leaves(lm.model), strict=True))


def test_static_batches_generate_what_the_baseline_generates(lm):
    plain = baseline(lm)
    work = [Work([3, 5, 7] * 20, 4), Work([11, 13], 2)]
    batches = StaticBatches(plain, 3, 128, [len(item.prompt) for item in work])
    tokens = batches.run(work).tokens
    expected = plain.generate([item.prompt for item in work], 4, temperature=0, ignore_eos=True).tokens
    np.testing.assert_array_equal(tokens, expected)
    assert batches.cache_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(batches.new_cache()))


@pytest.mark.slow
def test_a_run_has_every_row_and_its_numbers_belong_together(lm, tmp_path):
    plan = before_after.Plan(
        loads={"conversation": Sizes((16, 40), (2, 3))},
        single=(20, 3),
        repeats=2,
        at_a_time=2,
        rounds=1,
        contexts=(64, 128),
        piece=64,
    )
    content = before_after.measure(lm, plan, tmp_path / "out.json", say=lambda line: None)
    rows = {row["name"]: row for row in content["comparison"]}
    assert rows["latency"]["times"] == pytest.approx(rows["latency"]["baseline"] / rows["latency"]["optimised"])
    assert rows["longest context"]["optimised"] == 128
    assert content["sides"]["optimised"]["loads"]["conversation"]["lost"] == 0
    first, last = content["contexts"]
    assert last["baseline"]["read_by_a_token"] == 2 * first["baseline"]["read_by_a_token"]
    assert last["optimised"]["read_by_a_token"] < 2 * first["optimised"]["read_by_a_token"]
    assert "latency" in before_after.table_of(content)


def side(latency: float, rate: float, bytes_: int) -> dict:
    times = {"p50": latency, "p99": 2 * latency}
    load = {"requests_per_second": rate, "memory_bytes": bytes_, "cache_bytes": bytes_, "cache_used": None}
    single = {"latency_seconds": times | {"relative_spread": 0.1}, "first_token_seconds": times}
    return {"single": single, "loads": {"code": load}}


def test_times_are_of_what_is_better_and_targets_are_held_against_them():
    contexts = [
        {
            "context": 64,
            "baseline": {"read_by_a_token": 10, "fits": True},
            "optimised": {"read_by_a_token": 10, "fits": 1},
        },
        {
            "context": 256,
            "baseline": {"read_by_a_token": 40, "fits": 0},
            "optimised": {"read_by_a_token": 20, "fits": 1},
        },
    ]
    content = {"sides": {"baseline": side(6.0, 2.0, 300), "optimised": side(2.0, 5.0, 200)}, "contexts": contexts}
    rows = {row["name"]: row for row in before_after.comparison(content)}
    assert [rows[name]["times"] for name in ("latency", "requests/s, code", "memory, code")] == [3.0, 2.5, 1.5]
    assert [rows[name]["reached"] for name in ("latency", "requests/s, code", "memory, code")] == [True, False, False]
    assert rows["longest context"]["times"] == 4.0 and rows["longest context"]["reached"]
    assert rows["growth of what a token reads, over the context's"]["optimised"] == 0.5
    assert "used share of the cache, code" not in rows
    text = before_after.table_of(content | {"comparison": list(rows.values())})
    assert "P99 of the latency is 2.00 of its median" in text and text.count("missed") == 3


def test_the_plan_fits_the_model(lm):
    plan = before_after.Plan.default(lm)
    assert plan.contexts == (256,)
    longer = LanguageModel(lm.model, lm.config.replace(max_position_embeddings=1024))
    assert before_after.Plan.default(longer).contexts == (512, 1024)
    assert dataclasses.asdict(plan)["loads"]["code"]["prompt"] == (64, 192)


def test_requests_longer_than_the_model_are_refused_before_anything_runs(lm):
    plan = dataclasses.replace(before_after.Plan.default(lm), single=(250, 8))
    with pytest.raises(UserError, match="258 tokens: the model takes at most 256"):
        before_after.measure(lm, plan, None)
