"""Pages of measured numbers say what the results say."""

import shutil

import pytest

from dsv32_jax.errors import UserError
from dsv32_jax.experiments.pages import between
from dsv32_jax.experiments.studies import serving_report
from dsv32_jax.experiments.studies.quantization import report as quantization_report


def test_the_page_on_quantisation_is_made_from_its_results(tmp_path):
    page = shutil.copy(quantization_report.PAGE, tmp_path / "page.md")
    quantization_report.write(page)
    assert page.read_text() == quantization_report.PAGE.read_text()


def test_the_page_on_serving_is_made_from_its_results():
    page = serving_report.PAGE.read_text()
    assert between(page, "serving", serving_report.tables()) == page


def test_only_what_is_between_the_markers_changes():
    page = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n"
    assert between(page, "x", "new") == "a\n<!-- x -->\n\nnew\n\n<!-- /x -->\nb\n"
    with pytest.raises(UserError, match="no markers of 'y'"):
        between(page, "y", "new")
