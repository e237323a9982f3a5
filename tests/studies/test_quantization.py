"""The price of quantisation: the ruler, what is measured, plans and pages, on a small model."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from dsv32_jax.convert.quantization import quantize_model, uniform
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.studies.quantization import measure, planner, report, sensitivity
from dsv32_jax.experiments.studies.quantization.texts import Texts
from dsv32_jax.experiments.studies.quantization.variants import Setting
from dsv32_jax.experiments.train_demo.evaluate import scorer, summarise
from dsv32_jax.fidelity import Trace
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.model.params import is_linear, named_parameters
from dsv32_jax.model.sequence import Run
from tests.harness import EXACT, load_golden


class Small(Setting):
    """A golden model over random ids; four bits are the nearest."""

    @functools.cached_property
    def calibrated_int4(self):
        return quantize_model(self.base, uniform(self.base, "int4"))

    def describe(self):
        return {"model": self.name}


@pytest.fixture(scope="module")
def setting():
    model = load_golden("tiny128_fp8")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (4, 24)).astype(np.int32)
    return Small("tiny128_fp8", LanguageModel(model, model.config, options=EXACT), Texts(ids, ids, ids, ids))


@pytest.fixture(scope="module")
def ruler(setting):
    return measure.Ruler(setting.plain_base, setting.texts.planning, keep=True)


def test_the_base_is_itself_and_its_perplexity_the_scorers(setting, ruler):
    measured, ids = ruler.measure(setting.plain_base), setting.texts.planning
    assert measured["kl"] == pytest.approx(0, abs=1e-9) and measured["top1_agreement"] == 1
    likelihood, right = scorer(setting.plain_base, "indexer", None, "float32", False)(ids)
    bytes_of = np.ones(setting.lm.config.vocab_size, np.int64)
    assert measured["perplexity"] == pytest.approx(summarise(likelihood, ids, bytes_of)["perplexity"], rel=1e-5)
    np.testing.assert_array_equal(measure.score(setting.plain_base, Run(), ids[:3])[1], right[:3])


def test_a_model_that_differs_from_a_layer_on_is_measured_from_there(setting, ruler):
    last = len(setting.base.layers) - 1
    changed = measure.dequantised(quantize_model(setting.base, {f"layers.{last}.attn.o": "int4"}))
    whole, part = ruler.measure(changed), ruler.measure(changed, first=last)
    assert whole["kl"] > 1e-7
    assert part == pytest.approx(whole, rel=1e-3, abs=1e-6)


def test_logits_of_another_program_are_held_against_the_base(setting, ruler):
    logits = [
        LanguageModel(setting.base, setting.base.config, options=EXACT).logits(ids)[0] for ids in ruler.batches[0][:2]
    ]
    columns = zip(*(ruler.of_logits(window_logits, n) for n, window_logits in enumerate(logits)), strict=True)
    summary = ruler.summary(*map(np.stack, columns))
    assert summary["kl"] == pytest.approx(0, abs=1e-6) and summary["relative_loss"] == pytest.approx(0, abs=1e-4)


def test_attention_is_compared_layer_by_layer():
    def run(attention):
        nothing, choice = np.zeros((0, 2, 0), np.int32), np.array([[[0, -1], [0, 1]]])
        return Trace(np.ones((2, 2, 3)), choice, nothing, np.array([attention]), nothing, nothing, np.zeros((2, 4)))

    reference, other = run([[1.0, 0.0], [0.5, 0.5]]), run([[1.0, 0.0], [0.25, 0.75]])
    (row,) = measure.by_layer(reference, other)["layers"]
    assert row["attention_kl"] == pytest.approx((0.5 * np.log(2) + 0.5 * np.log(2 / 3)) / 2)
    assert measure.by_layer(other, other)["layers"][0]["attention_kl"] == 0


def test_every_parameter_is_measured_once(setting):
    parameters = {path for path in named_parameters(setting.base) if not path.startswith("mtp")}
    linears = [path for unit in sensitivity.units(setting.base, sensitivity.FAMILIES) for path in unit.paths]
    others = [path for unit in sensitivity.units(setting.base, sensitivity.UNTAKEN) for path in unit.paths]
    assert set(linears) == {path for path in parameters if is_linear(path)}
    assert sorted(linears + others + list(sensitivity.WHOLE.values())) == sorted(parameters)


def test_bytes_are_those_of_the_quantised_model(setting):
    sizes = planner.bytes_in(setting.base, ("int4", "int8"))
    assert set(sizes) == {path for path in named_parameters(setting.base) if is_linear(path)}
    schemes = {"layers.1.ffn.experts.down": "int4", "layers.0.attn.o": "int8"}
    parameters = named_parameters(quantize_model(setting.base, schemes))
    for path, scheme in schemes.items():
        assert sizes[path][scheme] == sum(part.nbytes for part in jax.tree.leaves(parameters[path]))


def test_latents_are_quantised_without_the_indexer(setting, ruler):
    """Weights are plain, so that nothing else could be; all positions are chosen, whatever the indexer says."""
    run = Run(index_topk=setting.texts.planning.shape[1], act_quant=True)
    latents = ruler.measure(setting.plain_base, dataclasses.replace(run, index_quant=False))
    assert latents["kl"] > 1e-7


def test_sensitivities_go_on_and_become_a_plan(setting, tmp_path, monkeypatch):
    families = {name: sensitivity.FAMILIES[name] for name in ("o",)}
    for name, value in {"FAMILIES": families, "UNTAKEN": {}, "WHOLE": {"head": "head"}}.items():
        monkeypatch.setattr(sensitivity, name, value)
    monkeypatch.setattr(sensitivity, "RESULT", tmp_path / "sensitivity.json")
    monkeypatch.setattr(planner, "POINTS", 0)
    out, lines = tmp_path / "plan.json", []
    with pytest.raises(UserError, match="run `sensitivity` first"):
        planner.make_plan(setting, out)
    sensitivity.sensitivity(setting, sensitivity.RESULT, lines.append)
    sensitivities = json.loads(sensitivity.RESULT.read_text())
    sensitivity.sensitivity(setting, sensitivity.RESULT, lines.append)
    assert len(lines) == len(sensitivities["rows"]) + len(sensitivities["kept"])  # the second call measured nothing
    assert all(row["kl"] >= 0 for row in sensitivities["rows"])
    planner.make_plan(setting, out, lines.append)
    plan = json.loads(out.read_text())
    assert set(plan["schemes"]) == {path for path in named_parameters(setting.base) if is_linear(path)}
    ends = {row["name"]: row for row in plan["curve"]}
    assert ends["budget 0"]["megabytes"]["total"] < ends["budget 1"]["megabytes"]["total"]
    assert ends["budget 0"]["predicted_kl"] > ends["budget 1"]["predicted_kl"]


def test_a_page_is_changed_between_its_markers_alone():
    page = "above\n<!-- table -->\nold\n<!-- /table -->\nbelow\n"
    assert report.between(page, "table", "new") == "above\n<!-- table -->\n\nnew\n\n<!-- /table -->\nbelow\n"
    with pytest.raises(UserError, match="no markers of 'figure'"):
        report.between(page, "figure", "new")
