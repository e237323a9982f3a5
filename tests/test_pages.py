"""Pages of measured numbers say what the results say; tours and links lead to what exists."""

import re
import shutil
from pathlib import Path

import pytest

from dsv32_jax.errors import UserError
from dsv32_jax.experiments.pages import between
from dsv32_jax.experiments.studies import serving_report
from dsv32_jax.experiments.studies.quantization import report as quantization_report
from dsv32_jax.experiments.workbench import report as workbench_report
from dsv32_jax.model.parts import NAMES
from dsv32_jax.model.variants import VARIANTS


def test_the_page_on_quantisation_is_made_from_its_results(tmp_path):
    page = shutil.copy(quantization_report.PAGE, tmp_path / "page.md")
    quantization_report.write(page)
    assert page.read_text() == quantization_report.PAGE.read_text()


def test_the_page_on_serving_is_made_from_its_results():
    page = serving_report.PAGE.read_text()
    assert between(page, "serving", serving_report.tables()) == page


def test_the_tables_of_the_workbench_are_made_from_its_results():
    for path, text in workbench_report.pages().items():
        assert path.read_text(encoding="utf-8") == text


def test_only_what_is_between_the_markers_changes():
    page = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n"
    assert between(page, "x", "new") == "a\n<!-- x -->\n\nnew\n\n<!-- /x -->\nb\n"
    with pytest.raises(UserError, match="no markers of 'y'"):
        between(page, "y", "new")


ROOT = Path(__file__).parent.parent


def listed_files(text: str) -> list[tuple[Path, int]]:
    """(file, lines) of the reading order of CONTRIBUTING.md; a name without a folder lies beside the one before it."""
    folder, listed = ROOT, []
    for name, lines in re.findall(r"`([\w/.]+\.py)`(?: \((\d+)\))?", text):
        path = ROOT / name if "/" in name and (ROOT / name).exists() else folder / name
        path = path if path.exists() else folder.parent / name
        folder = path.parent
        listed.append((path, int(lines or 0)))
    return listed


def test_the_tour_names_files_that_exist_and_their_size():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    listed = listed_files(text[text.index("### Where to begin") : text.index("Pairs of names")])
    assert len(listed) > 20
    for path, lines in listed:
        assert path.exists(), path
        if lines:
            assert len(path.read_text().splitlines()) == pytest.approx(lines, rel=0.1, abs=10), path


def test_links_of_the_pages_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "dsv32_jax" / "demo" / "README.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_page_on_parts_names_them_all():
    text = (ROOT / "docs" / "parts.md").read_text()
    assert [name for name in (*NAMES, *(v for by in VARIANTS.values() for v in by)) if f"`{name}`" not in text] == []
