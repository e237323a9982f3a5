"""Measures each scheme on the whole model."""

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dsv32_jax.common.reading import read_json
from dsv32_jax.experiments.results import RESULTS, environment, write_json
from dsv32_jax.experiments.studies.quantization.measure import Ruler, by_layer, dequantised, megabytes, score, trace
from dsv32_jax.experiments.studies.quantization.texts import LENGTH, LONGEST
from dsv32_jax.experiments.studies.quantization.variants import VARIANTS, Setting
from dsv32_jax.experiments.train_demo.evaluate import found_needles, needles
from dsv32_jax.fidelity import Trace
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.model.model import DeepseekV32
from dsv32_jax.model.sequence import Run

RESULT, PLAN = RESULTS / "quantization_table.json", RESULTS / "quantization_plan.json"
NEEDLES_EACH = 4
TRACED = 512
"""Tokens of the window whose layers are compared."""
STEP_WINDOWS = 2
"""Windows that the real step runs, to price the forms of its cache."""
ARITHMETIC = {
    "latents in FP8": Run(act_quant=True, index_quant=False),
    "index queries and keys in FP8": Run(index_quant=True),
    "both": Run(act_quant=True),
}
"""Runs with quantised activations and the base's weights."""
CACHES = ("bfloat16", "fp8")


def table(setting: Setting, out: Path = RESULT, plan: Path = PLAN, report: Callable[[str], None] = print) -> None:
    """Measures what the file does not contain yet: first the likelihoods of every row, then needles, then layers.

    Args:
      setting: of the measurement.
      out: JSON; results with the same settings in it are kept.
      plan: file of the mixed plan, whose rows are left out until it exists.
      report: takes a line at a time.
    """
    settings = setting.describe() | {"needles": {"each": NEEDLES_EACH, "contexts": [LENGTH, LONGEST]}, "traced": TRACED}
    result = read_json(out) if out.exists() else {}
    if result.get("settings") != settings:
        result = {"settings": settings, "date": environment()["date"], "rows": {}, "arithmetic": {}, "caches": {}}
    ruler = Ruler(setting.plain_base, setting.texts.evaluation)
    window = setting.texts.evaluation[0, :TRACED]
    assert setting.lm.tokenizer is not None
    hidden_needles = needles(setting.lm.tokenizer, setting.texts.long, (LENGTH, LONGEST), NEEDLES_EACH)
    variants = dict(VARIANTS)
    if plan.exists():
        schemes = read_json(plan)["schemes"]
        for name, act_quant in (("mixed", False), ("mixed, activations", True)):
            variants[name] = (lambda setting: setting.mixed(schemes), act_quant)
            if result["rows"].get(name, {}).get("schemes", schemes) != schemes:
                del result["rows"][name]  # of another plan
            result["rows"].setdefault(name, {"schemes": schemes})

    @cache
    def model(name: str) -> DeepseekV32:
        return variants[name][0](setting)

    def keep(part: str, name: str, figures: dict[str, Any]) -> None:
        result[part].setdefault(name, {}).update(figures)
        write_json(out, result)
        report(f"{part}, {name}: " + ", ".join(f"{key} {value}" for key, value in figures.items() if key != "fidelity"))

    def likelihoods(name: str, plain: DeepseekV32, run: Run) -> dict[str, Any]:
        return ruler.measure(plain, run) | {"megabytes": megabytes(model(name))}

    def needles_found(_: str, plain: DeepseekV32, run: Run) -> dict[str, Any]:
        is_found = found_needles(lambda ids: score(plain, run, ids), hidden_needles)
        shares = {
            str(n): float(is_found[[needle.context == n for needle in hidden_needles]].mean())
            for n in (LENGTH, LONGEST)
        }
        return {"needles": shares}

    def layers(_: str, plain: DeepseekV32, run: Run) -> dict[str, Any]:
        return {"fidelity": by_layer(reference(), trace(setting.lm, plain, run.act_quant, window))}

    @cache
    def reference() -> Trace:
        return trace(setting.lm, setting.plain_base, False, window)

    for key, of_row in {"kl": likelihoods, "needles": needles_found, "fidelity": layers}.items():
        for name, (_, act_quant) in variants.items():
            if key not in result["rows"].get(name, {}):
                plain = model(name) if act_quant else dequantised(model(name))
                keep("rows", name, of_row(name, plain, Run(act_quant=act_quant)))
        if key == "kl":
            for name, run in ARITHMETIC.items():
                if name not in result["arithmetic"]:
                    keep("arithmetic", name, ruler.measure(setting.plain_base, run))
    for form in CACHES:
        if form not in result["caches"]:
            keep("caches", form, of_cache(setting, ruler, form))
    result["rows"] = {name: result["rows"][name] for name in variants}
    write_json(out, result)


def of_cache(setting: Setting, ruler: Ruler, form: str) -> dict[str, Any]:
    """The base by the real step, with a form of the cache's latent rows; activations as they are."""
    options = dataclasses.replace(setting.lm.options, compute_dtype="float32", act_quant=False, cache_dtype=form)
    lm = LanguageModel(setting.base, setting.base.config, None, options)
    rows = []
    for number, ids in enumerate(setting.texts.evaluation[:STEP_WINDOWS]):
        rows.append(ruler.of_logits(lm.logits(ids)[0], number))
    return ruler.summary(*(np.stack(column) for column in zip(*rows, strict=True))) | {"windows": STEP_WINDOWS}
