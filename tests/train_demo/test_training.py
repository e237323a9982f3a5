"""The stages train what they shall, resume exactly, and end in checkpoints that load."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax import convert
from dsv32_jax.common.files import locked
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.train_demo import stages, training
from dsv32_jax.experiments.train_demo.sizes import SIZES, Stage
from dsv32_jax.experiments.train_demo.stages import Training

TINY = SIZES["tiny"]
SHARED = {"pretrain": {"batch": 2, "length": 128}, "chat": {"bias_speed": 0.001}}
"""With these settings, those of the stages after and before them, the five stages have three different programs."""

initial_params = functools.cache(training.initial_params)


@functools.cache
def make_step(config, stage, compute_dtype):
    step = training.make_step(config, stage, compute_dtype)

    def copied(params, state, *batch):
        # Restored arrays, which are committed to a device, would compile the same program again. NumPy's are not.
        return step(*jax.tree.map(np.array, (params, state)), *batch)

    return copied


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Runs and stages share their programs: each run would compile the same ones again."""

    def shared(config, stage, compute_dtype):
        constants = {"mtp_weight": stage.mtp_weight, "bias_speed": stage.bias_speed}
        return make_step(config, Stage("", 0, 0, 0, stage.selection, stage.trains, 0.0, **constants), compute_dtype)

    stages_of_run = tuple(dataclasses.replace(stage, **SHARED.get(stage.name, {})) for stage in TINY.stages)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", dataclasses.replace(TINY, stages=stages_of_run))
        patch.setattr(stages, "make_step", shared)
        patch.setattr(stages, "initial_params", initial_params)
        yield


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of all tiny stages, uninterrupted: its folder and its parameters."""
    folder = tmp_path_factory.mktemp("run")
    return folder, Training("tiny", folder, data).train()


def rows_of(folder, stage):
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [row for row in rows if row["stage"] == stage]


def test_every_stage_logs_and_leaves_a_checkpoint(whole):
    folder, params = whole
    for stage in TINY.stages:
        assert rows_of(folder, stage.name)[-1]["step"] == stage.steps - 1
        model = convert.load_hf(folder / stage.name)
    stored = training.from_model(model)
    assert stored.keys() == params.keys()
    for path, value in params.items():
        np.testing.assert_allclose(stored[path], value, rtol=2**-8, atol=1e-30, err_msg=path)
    np.testing.assert_array_equal(model.embed, model.mtp.embed)


def test_loss_falls(whole):
    rows = rows_of(whole[0], "pretrain")
    assert rows[-1]["loss"] < rows[0]["loss"] - 3
    rows = rows_of(whole[0], "warmup")
    assert rows[-1]["index_kl"] < rows[0]["index_kl"]


def test_stages_change_what_they_train_and_nothing_else(whole):
    before = training.from_model(convert.load_hf(whole[0] / "long"))
    after = training.from_model(convert.load_hf(whole[0] / "warmup"))
    for path in before:
        changed = bool((before[path] != after[path]).any())
        # A bias of 0 that a small step leaves below bfloat16's smallest change would count as unchanged; none is.
        assert changed == (".indexer." in path), path


def test_interrupted_run_ends_in_the_same_numbers(whole, data, tmp_path, monkeypatch):
    run = Training("tiny", tmp_path, data)
    saves = 0

    def save_and_stop(*args):
        nonlocal saves
        Training.save(run, *args)
        saves += 1
        if saves == 7:
            run.checkpoints.wait_until_finished()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages, "SAVE_SECONDS", 0.0)
        patch.setattr(run, "save", save_and_stop)
        run.train(until="pretrain")
    again = Training("tiny", tmp_path, data)
    assert again.restore(again.checkpoints.latest_step())[:2] == (0, 7)
    again.train(until="pretrain")
    expected = training.from_model(convert.load_hf(whole[0] / "pretrain"))
    resumed = training.from_model(convert.load_hf(tmp_path / "pretrain"))
    chex.assert_trees_all_equal(resumed, expected)


def test_another_machine_starts_from_bfloat16_weights(whole, data, tmp_path):
    run = Training("tiny", tmp_path, data)
    params = run.train(until="warmup", weights=whole[0] / "long", first="warmup")
    before = training.from_model(convert.load_hf(whole[0] / "long"))
    np.testing.assert_array_equal(params["embed"], before["embed"])
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["stage"] == "warmup"


def test_two_runs_do_not_mix(whole, data):
    with pytest.raises(UserError, match="holds another run"):
        Training("tiny", whole[0], data, seed=5)
    with locked(whole[0]), pytest.raises(UserError, match="is writing it"):
        Training("tiny", whole[0], data).train()


def test_unknown_size_and_stage_are_refused(data, tmp_path):
    with pytest.raises(UserError, match="--size huge: unknown; it is one of demo, tiny"):
        Training("huge", tmp_path, data)
    with pytest.raises(UserError, match="stage end: unknown; it is one of pretrain"):
        Training("tiny", tmp_path, data).train(until="end")


def test_router_bias_moves_against_the_load():
    config = TINY.config.replace(num_nextn_predict_layers=0)
    path = "layers.1.ffn.router_bias"
    load = jnp.asarray([[0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05]])
    moved = training.moved_biases(config, {path: jnp.zeros(8)}, load, 0.001)[path]
    np.testing.assert_allclose(moved, [-0.001] + [0.001] * 7)


def test_learning_rate_rises_stays_and_falls():
    stage = Stage("x", 100, 1, 1, "dense", "main", 1.0, final=0.1, warmup=10, decay=0.5)
    rates = [training.learning_rate(stage, step) for step in range(100)]
    assert 0 < rates[0] < 0.1 and rates[10] == 1 and rates[50] == 1
    assert sorted(rates[:11]) == rates[:11] and sorted(rates[50:], reverse=True) == rates[50:]
    assert rates[99] == pytest.approx(0.1, abs=0.03)


def test_stack_and_back():
    params = initial_params(TINY.config.replace(quantization_config=None), 0)
    stacked = training.stack(params)
    assert stacked["attn.q_a"].shape == (3, 128, 128)
    assert stacked["ffn.experts.up"].shape == (2, 8, 128, 128)
    back = training.unstack(stacked, params)
    assert back.keys() == params.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(back[path], value)


def test_what_muon_takes():
    assert training.uses_muon("ffn.experts.up", (3, 16, 128, 256))
    assert training.uses_muon("attn.q_a", (7, 128, 256))
    for kind, shape in {
        "embed": (1, 512, 128), "head": (1, 512, 128), "attn_norm": (7, 128), "ffn.router": (3, 8, 128),
        "attn.indexer.q_b": (7, 256, 128),
    }.items():  # fmt: skip
        assert not training.uses_muon(kind, shape)
