"""What mkdocs needs beside mkdocs.yml, since the pages are written for a code host, where a link leads to a file.

A file outside `docs/` that a page links to is copied to the site: Markdown as a page, code as a page with an anchor for
each line ("#L12" of a link is "#L-12" there), anything else as it is. Such copies lie under `repository/`. Where a page
has <!-- include FILE#ANCHOR -->, which a code host does not show, the site has the section with that anchor.
"""

import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

from markdown.extensions.toc import slugify
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS, COPIES = "docs/", "repository/"
INCLUDE = re.compile(r"<!-- include (\S+)#(\S+) -->")
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")
SOURCE_PAGE = """---
title: {path}
search:
  exclude: true
---

# `{path}`

{code}
"""
CODE = ROOT / "build" / "docs_code"
"""Copies of the packages, in which mkdocstrings finds each under the name that it is imported by."""


def source_of(place: str) -> str:
    """The file of the repository that a source of the site is made from."""
    return place.removeprefix(COPIES) if place.startswith(COPIES) else DOCS + place


def place_of(path: str) -> str:
    """Where a file of the repository lies among the sources of the site."""
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    return COPIES + path + (".md" if path.endswith(".py") else "")


def target_of(link: str, page: str) -> str | None:
    """The file of the repository that a link of a page leads to; None for an address, and for what does not exist."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    return path if "://" not in link and (ROOT / path).is_file() else None


def linked_files(pages: list[str]) -> list[str]:
    """Files outside `docs/` that these pages link to, and those that pages among them link to."""
    linked: dict[str, None] = {}
    queue = list(pages)
    while queue:
        page = queue.pop()
        links = LINK.findall((ROOT / page).read_text(encoding="utf-8"))
        targets = [target_of(link, page) for _, link, _, _ in links]
        new = [path for path in targets if path and not path.startswith(DOCS) and path not in linked]
        linked.update(dict.fromkeys(new))
        queue += [path for path in new if path.endswith(".md")]
    return list(linked)


def code_page(path: str) -> str:
    """A page with a file of Python, each line with an anchor."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    formatter = HtmlFormatter(lineanchors="L", anchorlinenos=True, linenos="inline", cssclass="highlight")
    code = highlight((ROOT / path).read_text(encoding="utf-8"), PythonLexer(), formatter)
    return SOURCE_PAGE.format(path=path, code=code)


def copy_code() -> None:
    """Makes `CODE` anew: `convert` is a part of `dsv32_jax` there, as where it is installed."""
    places = {"pallas_kernels": "pallas_kernels", "dsv32_jax": "dsv32_jax", "convert": "dsv32_jax/convert"}
    shutil.rmtree(CODE, ignore_errors=True)
    for folder, place in places.items():
        for file in (ROOT / folder).rglob("*.py"):
            target = CODE / place / file.relative_to(ROOT / folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def section(path: str, anchor: str) -> str:
    """What stands in a page below the heading with this anchor, up to the next heading of its level or a higher one."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    headings = {n: len(line) - len(line.lstrip("#")) for n, line in enumerate(lines) if re.match("#+ ", line)}
    for first, level in headings.items():
        if slugify(lines[first].lstrip("# "), "-") == anchor:
            last = next((n for n, other in headings.items() if n > first and other <= level), len(lines))
            return "\n".join(lines[first + 1 : last])
    raise PluginError(f"{path}: no heading has the anchor {anchor!r}")


def with_links(text: str, source: str, place: str) -> str:
    """The text of a file of the repository, with links that lead from a place of the site to places of the site."""

    def moved(match: re.Match[str]) -> str:
        before, link, anchor, after = match.groups()
        path = target_of(link, source)
        if path is None:
            return match[0]
        if path.endswith(".py") and anchor:
            anchor = anchor.replace("#L", "#L-")
        return f"{before}{posixpath.relpath(place_of(path), posixpath.dirname(place) or '.')}{anchor or ''}{after}"

    return LINK.sub(moved, text)


# ---- called by mkdocs ----------------------------------------------------------------------------------------------


def on_startup(command: str, dirty: bool) -> None:
    """Before mkdocstrings looks for the folder of the code."""
    copy_code()


def on_files(files: Files, config: Any) -> Files:
    """Adds the copies."""
    pages = [source_of(file.src_uri) for file in files.documentation_pages()]
    for path in linked_files(pages):
        content = code_page(path) if path.endswith(".py") else (ROOT / path).read_bytes()
        files.append(File.generated(config, place_of(path), content=content))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Includes sections, and turns links to files of the repository into links to sources of the site."""
    place = page.file.src_uri
    source = source_of(place)
    if source.endswith(".py.md"):
        return markdown

    def included(match: re.Match[str]) -> str:
        path = target_of(match[1], source)
        if path is None:
            raise PluginError(f"{source}: {match[0]}: there is no such file")
        return with_links(section(path, match[2]), path, place)

    return INCLUDE.sub(included, with_links(markdown, source, place))
