"""The Python on the pages runs: the blocks of a page in their order, in one namespace, as a reader would type them.

In the quick suite `load("demo")` gives a tiny checkpoint, which is compiled sooner; `make test-slow` takes the demo
model. A block that cannot run on a CPU begins with ```python no-run, and the sentence before it says why.
"""

import re
from pathlib import Path

import pytest

import dsv32_jax

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = {
    page.relative_to(ROOT).as_posix(): blocks
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if (blocks := BLOCK.findall(page.read_text(encoding="utf-8")))
}
"""The blocks of each page that has some."""
LONG = {"README.md", "docs/checkpoints.md", "docs/extend.md", "docs/index.md", "docs/kernels_elsewhere.md"}
"""Pages whose code runs in the slow suite alone: it takes long, needs a trained model, or repeats another page."""


def run(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    namespace = {"__name__": "page"}
    for number, block in enumerate(PAGES[page], 1):
        exec(compile(block, f"{page}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", sorted(PAGES.keys() - LONG))
def test_the_code_of_a_page_runs(page, tiny, tmp_path, monkeypatch):
    load = dsv32_jax.load
    monkeypatch.setattr(dsv32_jax, "load", lambda name: load(tiny if name == "demo" else name), raising=False)
    run(page, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(PAGES))
def test_the_code_of_a_page_runs_on_the_demo_model(page, tmp_path, monkeypatch):
    run(page, tmp_path, monkeypatch)


def test_pages_with_code_are_found():
    assert {"README.md", "docs/parts.md", "docs/kernels_elsewhere.md", "docs/extend.md"} <= PAGES.keys()
