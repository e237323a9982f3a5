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
    "first_tokens": {"NEW_TOKENS": 8},
    "what_the_indexer_looks_at": {"TOPK": 64, "WINDOW": 256, "NEEDLES": 2},
}
"""Other values for the cell of parameters: tiny windows, so that a notebook runs in seconds."""
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


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


def conclusion(name: str, **parameters: Any) -> dict[str, Any]:
    """Runs the cells of a notebook in this process, with other values after its cell of parameters."""
    matplotlib.use("Agg")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(notebook(FOLDER / f"{name}.py").cells):
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{name}.py, cell {number}", "exec"), namespace)
        if "parameters" in cell.metadata.get("tags", ()):
            assert parameters.keys() <= namespace.keys()
            namespace.update(parameters)
    from matplotlib import pyplot

    assert pyplot.get_fignums()
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
