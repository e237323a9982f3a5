"""The docs site builds without a warning, and its links to the code lead to what they name."""

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dsv32_jax.errors import UserError
from dsv32_jax.experiments import page_facts
from dsv32_jax.experiments.page_facts import line_of, up_to_date, with_lines

docs_site = pytest.importorskip("dsv32_jax.experiments.docs_site", reason="needs the extra docs")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; `--strict` fails for a page that is not in the nav, a link or an anchor that leads nowhere."""
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_lines_of_the_code_have_anchors_on_the_site(site):
    page = (site / "model" / "index.html").read_text(encoding="utf-8")
    links = re.findall(r'href="(\.\./repository/[^"#]+)#(L-\d+)"><code>([\w.]+)</code>', page)
    assert len(links) > 30
    for target, anchor, symbol in links:
        code = (site / "model" / target / "index.html").resolve().read_text(encoding="utf-8")
        line = re.search(rf'id="{anchor}".*', code)
        name = symbol.rpartition(".")[2]
        assert re.search(rf"\b{name}\b", html.unescape(re.sub("<[^>]+>", "", line[0]))), (target, anchor, symbol)


@pytest.mark.slow
def test_the_site_has_the_reading_order_the_api_and_the_results(site):
    reading = (site / "reading" / "index.html").read_text(encoding="utf-8")
    assert "<td>the model</td>" in reading and "include" not in re.sub("<[^>]+>", "", reading)
    api = (site / "api" / "convert" / "index.html").read_text(encoding="utf-8")
    assert 'id="dsv32_jax.convert.quantization.quantize_model"' in api
    assert (site / "repository/experiments/results/quantization_plan.json").exists()
    assert "What was tried" in (site / "LOG" / "index.html").read_text(encoding="utf-8")


def test_a_link_to_a_line_names_the_symbol_there():
    for page in page_facts.pages():
        text = page.read_text(encoding="utf-8")
        assert up_to_date(text, page.parent) == text, f"{page}: run `python -m experiments.page_facts`"


def test_a_stale_line_is_rewritten_and_a_lost_symbol_refused(tmp_path):
    (tmp_path / "code.py").write_text(
        "A = 1\n\n\n@cached\nclass B:\n    def c(self):\n        pass\n\n    d: int = 1\n"
    )
    assert with_lines("[`B.c`](code.py#L1), [`A`](code.py#L9)", tmp_path) == "[`B.c`](code.py#L6), [`A`](code.py#L1)"
    assert line_of(tmp_path / "code.py", "B") == 5 and line_of(tmp_path / "code.py", "B.d") == 9
    with pytest.raises(UserError, match=r"defines no 'B\.e'"):
        with_lines("[`B.e`](code.py#L1)", tmp_path)
    with pytest.raises(UserError, match="must be the name of a symbol"):
        with_lines("[here](code.py#L1)", tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        with_lines("[`a`](gone.py#L1)", tmp_path)


def test_the_nav_names_every_page_once():
    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    settings = re.search(r"^nav:\n(?:  .*\n)+", (ROOT / "mkdocs.yml").read_text("utf-8"), re.M)[0]
    listed = pages(yaml.safe_load(settings)["nav"])
    assert sorted(listed) == sorted(p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md"))


def test_links_out_of_docs_become_links_within_the_site():
    def moved(text):
        return docs_site.with_links(text, "docs/kernels/top_k.md", "kernels/top_k.md")

    assert moved("[a](../../Makefile)") == "[a](../repository/Makefile)"
    assert moved("[a](../../convert/names.py#L3)") == "[a](../repository/convert/names.py.md#L-3)"
    assert moved("[a](../parts.md#replace-a-part)") == "[a](../parts.md#replace-a-part)"
    assert moved("[a](https://x.org/y.py#L3), [b](gone.md)") == "[a](https://x.org/y.py#L3), [b](gone.md)"
    with pytest.raises(Exception, match="no heading has the anchor 'nowhere'"):
        docs_site.section("CONTRIBUTING.md", "nowhere")
