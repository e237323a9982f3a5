"""From a run's log to curves, figures and card; from weights to what ships."""

import json

import numpy as np
import pytest

from dsv32_jax import convert
from dsv32_jax.common.files import locked
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.train_demo import export, report, training
from dsv32_jax.experiments.train_demo.evaluate import MODES
from dsv32_jax.experiments.train_demo.sizes import SIZES
from dsv32_jax.model.params import named_parameters
from pallas_kernels.matmul import QTensor


@pytest.fixture(scope="module")
def weights(data, tmp_path_factory):
    """A bfloat16 checkpoint of random tiny weights."""
    folder = tmp_path_factory.mktemp("weights") / "stage"
    config = SIZES["tiny"].config.replace(quantization_config=None)
    model = training.to_model(config, training.initial_params(config, 0))
    convert.export_model(model, folder, tokenizer_files=data)
    return folder


def test_export_is_fp8_and_near_the_weights(weights, tmp_path):
    target = tmp_path / "demo"
    export.export(weights, SIZES["tiny"].config, target, card="# Card\n")
    plain, model = convert.load_hf(weights), convert.load_hf(target)
    before, after = named_parameters(plain), named_parameters(model)
    assert before.keys() == after.keys()
    quantised = 0
    for path, leaf in after.items():
        original = np.asarray(before[path], np.float32)
        if isinstance(leaf, QTensor):
            quantised += 1
            error = np.abs(np.asarray(leaf.dequantize()) - original)
            assert error.max() <= np.abs(original).max() / 16, path  # half a step of three mantissa bits
        else:
            np.testing.assert_array_equal(np.asarray(leaf, np.float32), original)
    assert quantised > 20
    assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == 1
    export.export(weights, SIZES["tiny"].config, target)
    assert (target / "README.md").read_text() == "# Card\n"
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    with locked(target), pytest.raises(UserError, match="demo: process"):
        export.export(weights, SIZES["tiny"].config, target)


def test_export_of_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        export.export(tmp_path, SIZES["tiny"].config, tmp_path / "out")


@pytest.fixture
def run(tmp_path):
    """The log of a stage that was interrupted after step 40 and resumed from step 20."""
    steps = [(0, 1.0, 5.0), (20, 2.0, 4.0), (40, 3.0, 3.0), (20, 4.0, 4.5), (40, 5.0, 3.5), (59, 6.0, 2.5)]
    rows = [
        {"stage": "long", "step": step, "chat": False, "tokens": 1, "learning_rate": 0.1, "seconds": s, "loss": loss}
        for (step, _, loss), s in zip(steps, (1.0, 2.0, 3.0, 1.5, 2.5, 3.5), strict=True)
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"steps": 60, "batch": 2, "length": 8, "trains": "main", "selection": "dense", "learning_rate": 0.1}
    summary = {"settings": settings, "tokens": 5, "seconds": 3.5, "recall_share_of_tokens": 0.1}
    (tmp_path / "long.json").write_text(json.dumps(summary))
    return tmp_path


def test_resumed_run_counts_its_time_twice_and_its_steps_once(run, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    report.collect(run)
    (stage,) = json.loads((tmp_path / "results" / "train_demo.json").read_text())["stages"]
    assert stage["curve"]["step"] == [0, 20, 40, 59]
    assert stage["curve"]["loss"] == [5.0, 4.5, 3.5, 2.5]
    assert (stage["seconds"], stage["processes"], stage["tokens"]) == (3.0 + 3.5, 2, 60 * 2 * 8)


def test_unfinished_run_is_refused(run, tmp_path):
    (run / "long.json").unlink()
    with pytest.raises(UserError, match="stage long is not finished"):
        report.collect(run)
    with pytest.raises(UserError, match=r"has no log\.jsonl"):
        report.collect(tmp_path / "none")


def test_shipped_card_and_figures_are_those_of_the_results(tmp_path):
    from dsv32_jax.generate.loading import DEMO

    shipped = (DEMO / "README.md").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_bytes((DEMO / "config.json").read_bytes())
    card = report.write_card(tmp_path).read_text(encoding="utf-8")

    def without_size(text):  # the size is that of the checkpoint's folder
        return [line for line in text.splitlines() if "FP8\nblocks" not in line and "of the paper:" not in line]

    assert without_size(card) == without_size(shipped)
    figures = report.draw(tmp_path)
    assert all(file.stat().st_size > 10_000 for file in figures) and len(figures) == 2


def test_verdict_says_when_the_indexer_falls_short():
    modes = {mode: {"perplexity": 10.0} for mode in MODES}
    stages = {"dense stage, dense": {"perplexity": 8.0}, "dense stage, warm indexer": {"perplexity": 8.4}}
    model = {
        "settings": {"index_topk": 4},
        "stages": stages,
        "perplexity": modes | {"indexer": {"perplexity": 10.05}},
    }
    assert "is within 1%" in report.verdict(model) and "+5.00%" in report.verdict(model)
    model["perplexity"]["indexer"] = {"perplexity": 10.2}
    assert "is NOT within 1%" in report.verdict(model)
