"""The notebooks run top to bottom and end in a conclusion that holds; each .ipynb is its .py with outputs."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from dsv32_jax.experiments.notebooks import FOLDER, NAMES
from dsv32_jax.experiments.notebooks.__main__ import notebook

jupytext = pytest.importorskip("jupytext")
matplotlib = pytest.importorskip("matplotlib")

REDUCED: dict[str, dict[str, Any]] = {
    "first_tokens": {"NEW_TOKENS": 8, "OPTIONS": {"dequantize": "float32"}},
    "what_the_indexer_looks_at": {"TOPK": 64, "WINDOW": 256, "NEEDLES": 2},
    "your_own_selection_and_kernel": {
        **{"TOPK": 64, "WINDOW": 256, "WINDOWS": 1, "NEEDLES": 0, "CONTEXT": 256, "ROUNDS": 2},
        "TIMED": ("indexer", "whole blocks"),
    },
    "what_quantisation_costs": {"LENGTH": 64, "WINDOWS": 4, "CALIBRATION": 0},
    "your_own_loss": {"STEPS": 1},
}
"""Other values for the cell of parameters: tiny windows, and plain weights, whose programs compile in half the time."""
LONGEST_CELL = 20
LARGEST_FILE = 250_000
OF_A_MACHINE = re.compile(r"/(home|root|tmp|Users|work|mnt|opt)/|site-packages|0x[0-9a-f]{6,}")


def check_first_tokens(c: dict[str, Any]) -> None:
    assert c["streamed_equals_generated"]
    assert 1 < c["perplexity"] < c["perplexity_shuffled"] / 10
    assert c["cache_saving"] > 50


def check_what_the_indexer_looks_at(c: dict[str, Any]) -> None:
    assert c["mass_recent"] < c["mass_indexer"] - 0.1 < c["mass_best"] - 0.1
    assert c["recall_recent"] < c["recall_indexer"] < 1
    assert c["overlap_by_chance"] < c["overlap_of_neighbours"] < 1
    assert c["needles_recent"] < c["needles_indexer"]


def check_your_own_selection_and_kernel(c: dict[str, Any]) -> None:
    assert c["kl"]["indexer"] == 0 < c["kl"]["whole blocks"] < c["kl"]["last k"] / 5
    assert c["attention_mass"]["last k"] < c["attention_mass"]["whole blocks"] < c["attention_mass"]["indexer"]
    assert c["recall"]["last k"] < c["recall"]["indexer"] == 1
    assert c["kernel_error"] < 1e-6 and 0 <= c["kl"]["my kernel"] < 1e-8
    assert all(milliseconds > 0 for milliseconds in c["milliseconds"].values())


def check_what_quantisation_costs(c: dict[str, Any]) -> None:
    sizes, kl = c["megabytes"], c["kl"]
    assert sizes["INT4"] < sizes["FP8"] < sizes["INT8"] < sizes["bfloat16"]
    assert kl["bfloat16"] == kl["FP8"] == 0 < kl["INT8"] < kl["FP8, activations too"] < kl["INT4"]
    assert kl.get("INT4, calibrated", 0) < kl["INT4"]
    assert c["perplexity"]["bfloat16"] < c["perplexity"]["INT4"]
    assert 0.5 < c["sum_of_layers"] / kl["INT4"] < 2


def check_your_own_loss(c: dict[str, Any]) -> None:
    assert c["loss_after"] <= c["loss_after_one_step"] < c["loss_before"]
    assert c["indexer_gradient_language"] == 0 < c["indexer_gradient_with_kl"]


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


def conclusion(name: str, **parameters: Any) -> dict[str, Any]:
    """Runs the cells of a notebook in this process, with other values after its cell of parameters."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    namespace: dict[str, Any] = {"__name__": "__main__"}
    with pyplot.rc_context():
        for number, cell in enumerate(notebook(FOLDER / f"{name}.py").cells):
            if cell.cell_type == "code":
                exec(compile(cell.source, f"{name}.py, cell {number}", "exec"), namespace)
            if "parameters" in cell.metadata.get("tags", ()):
                assert parameters.keys() <= namespace.keys()
                namespace.update(parameters)
    assert len(pyplot.get_fignums()) >= 2
    for number in pyplot.get_fignums():
        pyplot.figure(number).canvas.draw()
    pyplot.close("all")
    return namespace["conclusion"]


@pytest.mark.parametrize("size", ["reduced", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_and_its_conclusion_holds(name, size, capsys):
    CHECKS[name](conclusion(name, **REDUCED[name] if size == "reduced" else {}))


def committed(name: str) -> Any:
    return jupytext.read(FOLDER / f"{name}.ipynb")


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_conclusion_holds(name):
    (output,) = committed(name).cells[-1].outputs
    CHECKS[name](ast.literal_eval(output.text))


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_source_with_outputs(name):
    source, made = notebook(FOLDER / f"{name}.py"), committed(name)
    assert made.metadata == source.metadata
    assert len(made.cells) == len(source.cells)
    for cell, cell_of_source in zip(made.cells, source.cells, strict=True):
        for field in ("id", "cell_type", "source", "metadata"):
            assert cell[field] == cell_of_source[field], f"run `make notebooks`: {cell_of_source.source}"
    numbers = [cell.execution_count for cell in made.cells if cell.cell_type == "code"]
    assert numbers == list(range(1, len(numbers) + 1))
    outputs = [output for cell in made.cells for output in cell.get("outputs", ())]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert all(output.get("name") != "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_small_and_says_nothing_of_the_machine(name):
    file = FOLDER / f"{name}.ipynb"
    assert file.stat().st_size < LARGEST_FILE
    texts = [
        output.get("text", "") + output.get("data", {}).get("text/plain", "")
        for cell in committed(name).cells
        for output in cell.get("outputs", ())
    ]
    assert [text for text in texts if OF_A_MACHINE.search(text) or str(Path.home()) in text] == []


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_short(name):
    assert [c.source for c in notebook(FOLDER / f"{name}.py").cells if len(c.source.splitlines()) > LONGEST_CELL] == []


def test_every_notebook_is_listed_and_checked():
    assert sorted(NAMES) == sorted(file.stem for file in FOLDER.glob("[a-z]*.py"))
    assert list(CHECKS) == list(REDUCED) == list(NAMES)
