"""Manual pages in their several formats to plain text: HTML, man, pod, info, Mallard and DocBook XML, dictionaries.

Every function returns paragraphs (`list[str]`): a heading, a paragraph of prose on one line, a list item, or a block of
code with its line breaks and indentation. No markup is left in them.
"""

import bz2
import functools
import gzip
import lzma
import re
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv32_jax.errors import UserError

_HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6", "title", "subtitle", "bridgehead", "refname", "refpurpose"}
_CODE = {"pre", "screen", "programlisting", "synopsis", "literallayout"}
_ITEMS = {"li", "listitem", "item", "step", "varlistentry", "dd"}
_BLOCKS = {
    *(
        "p div section article main body blockquote ul ol dl dt table tr caption center fieldset details summary"
    ).split(),
    *("aside figure figcaption hr address para simpara formalpara itemizedlist orderedlist variablelist").split(),
    *(
        "term note warning tip caution important chapter sect1 sect2 sect3 sect4 procedure steps list terms page"
    ).split(),
    *("example informalexample mediaobject simplesect refsect1 refsect2 entry row td th comment links").split(),
}
_SKIPPED = {
    *(
        "script style nav header footer form button svg math head noscript iframe select input textarea img object"
    ).split(),
    *(
        "info bookinfo articleinfo sect1info remark indexterm toc credit license links audio video email template"
    ).split(),
}
_SKIPPED_CLASSES = re.compile(
    r"(?:^|\s)(?:headerlink|sphinxsidebar\w*|related|toc|navheader|navfooter|contents|toctree-wrapper|nav\w*|footer"
    r"|sidebar|breadcrumb\w*|clearer|mw-editsection|head-vol|head-ltitle|head-rtitle|foot\w*|manual-text-head"
    r"|titlepage-info|copyright|legalnotice|search\w*|list-of-\w+|index|indexdiv|viewcode-link|topictitle"
    r"|versionmodified|langs|translations|toplang|bottomlang|mobile-only|src-link|docnav|fancy[-_]toc\w*|head|nosearch"
    r"|NAVHEADER|NAVFOOTER|TOC|line-numbers|linenos|navlinks|revhistory|authorgroup|srclink|since|out-of-band)(?:\s|$)"
)
_SKIPPED_IDS = re.compile(
    r"^(?:toc|sidebar|nav\w*|footer|header|search\w*|menu-bar|menu|TOC|page-header|column2|apicontent_toc)$"
)
_MAIN = (
    *("//main", "//*[@role='main']", "//div[@class='body']", "//div[@id='docContent']", "//div[@id='page-content']"),
    *("//div[@id='apicontent']", "//div[@id='DisplayArea']", "//article"),
)
_SPACE = re.compile(r"\s+")
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("‘’‛′`´", "'"),
        **dict.fromkeys("“”„″", '"'),
        **dict.fromkeys("‐‑–—−", "-"),
        **dict.fromkeys("\u00a0\u2002\u2003\u2009\u202f\u2007\u200a", " "),
        **dict.fromkeys("\u00ad\u200b\u200c\u200d\u2060\ufeff¶\uf0c1", None),
        **{"…": "...", "\ufb01": "fi", "\ufb02": "fl", "\ufb00": "ff", "•": "-", "\r": None, "\x0c": "\n"},
    }
)
_CODE_CHARACTERS = {key: value for key, value in _CHARACTERS.items() if key != ord("`")}


def read(path: Path) -> str:
    """The file's text, decompressed by its name (.gz, .dz, .bz2, .xz); Latin-1 where it is not UTF-8."""
    data = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    elif path.suffix == ".bz2":
        data = bz2.decompress(data)
    elif path.suffix == ".xz":
        data = lzma.decompress(data)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def straighten(text: str, *, code: bool = False) -> str:
    """`text` with plain quotes, hyphens and spaces; in code a backtick stays."""
    return text.translate(_CODE_CHARACTERS if code else _CHARACTERS)


def html(text: str) -> list[str]:
    """Paragraphs of an HTML page's main part; none when most of its text is links (an index, a list of contents)."""
    lxml_html = _import("lxml.html")
    text = re.sub(r"^\s*<\?xml[^>]*\?>", "", text)  # lxml refuses a str that declares its encoding
    if not text.strip():
        return []
    try:
        root = lxml_html.document_fromstring(text)
    except Exception:  # an empty or broken page; lxml's errors have no common base but Exception
        return []
    main = next((elements[0] for query in _MAIN if (elements := root.xpath(query))), None)
    body = root.find("body") if main is None else main
    walker = _Walker()
    walker.walk(root if body is None else body)
    walker.flush()
    total = sum(map(len, walker.paragraphs))
    return [] if walker.linked > 0.45 * total else walker.paragraphs


def xml(text: str) -> list[str]:
    """Paragraphs of a Mallard or DocBook page."""
    etree = _import("lxml.etree")
    parser = etree.XMLParser(recover=True, resolve_entities=False, no_network=True, huge_tree=True)
    root = etree.fromstring(text.encode(), parser)
    if root is None:
        return []
    walker = _Walker()
    walker.walk(root)
    walker.flush()
    return walker.paragraphs


def man(text: str) -> list[str]:
    """Paragraphs of a manual page in man or mdoc. Needs the program `mandoc`; raises `UserError` without it."""
    if re.match(r"\s*\.so\s", text):  # only the name of another page
        return []
    command = [_program("mandoc", "mandoc"), "-T", "html", "-O", "fragment", "-K", "utf-8", "-W", "unsupp"]
    result = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    # In code a line ends with a break and a newline too.
    page = re.sub(r"\n<br ?/>\n", "\n", result.stdout.decode("utf-8", "replace"))
    return html(f"<html><body>{page}</body></html>")


def pod(text: str) -> list[str]:
    """Paragraphs of a Perl manual. Needs `pod2text` (part of Perl); raises `UserError` without it."""
    command = [_program("pod2text", "perl"), "--width=100000", "--indent=4", "--utf8"]
    result = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    paragraphs = []
    for block in _blank_separated(straighten(result.stdout.decode("utf-8", "replace"), code=True)):
        heading, _, rest = block.partition("\n") if not block.startswith("    ") else ("", "", block)
        body = "\n".join(line[4:] if line.startswith("    ") else line for line in rest.splitlines())
        paragraphs += [text for text in (heading.strip(), body) if text]
    return paragraphs


def info(text: str) -> list[str]:
    """Paragraphs of a GNU info file, lines joined; menus, node headers and indices are left out."""
    paragraphs: list[str] = []
    for node in re.split(r"\x1f\n?", text):
        node = re.sub(r"^File: .*\n", "", node.lstrip("\n"))
        node = re.sub(r"^\* Menu:.*\n(?:[ \t]*\n|\*.*(?:\n|\Z)|[ \t]{3,}.*(?:\n|\Z))*", "", node, flags=re.M)
        node = re.sub(r"\x00\x08\[[^\x00]*\x00\x08\]", "", node)
        if re.match(r"\s*(?:This is .*, produced by|Tag Table|End Tag Table|Indirect|Local Variables)", node):
            continue
        if re.search(r"^[^\n]*Index\n\*{3,}", node, flags=re.M) or len(re.findall(r"^\* .*::", node, flags=re.M)) > 3:
            continue
        node = re.sub(r"\*[Nn]ote ([^:]+)::", r"\1", node)
        node = re.sub(r"\*[Nn]ote\s+[^:]+:\s+(\([^)]*\)[^.,]*|[^.,]+)(?=[.,])", r"\1", node)
        node = re.sub(r"^([=*.-])\1{2,}$\n", "\n", node, flags=re.M)  # a heading's underline
        paragraphs += wrapped(node)
    return paragraphs


def wrapped(text: str) -> list[str]:
    """Paragraphs of plain text whose prose is broken into lines; prose is joined, code and tables stay."""
    return [_joined(block) for block in _blank_separated(straighten(text, code=True))]


def vim_help(text: str) -> list[str]:
    """Paragraphs of one of Vim's help files, without its tags and markers."""
    text = re.sub(r"^\*?\S+\.txt\*?\s+For Vim version.*$", "", text, flags=re.M)
    text = re.sub(r"^.*vim:\w+=.*$|^[=-]{20,}$|^\s*VIM REFERENCE MANUAL.*$", "", text, flags=re.M)
    text = re.sub(r"(?<!\S)\*\S+\*(?!\S)", "", text)
    text = re.sub(r"\|(\S+?)\|", r"\1", text)
    text = re.sub(r"^(.*\S)[ \t]+~$", r"\1", text, flags=re.M)
    text = re.sub(r"(?:^|\s)>$|^<(?=\s|$)", "", text, flags=re.M)
    return wrapped(text.expandtabs(8))


def dictionary(data: Path) -> Iterator[tuple[str, str]]:
    """(headword, raw entry) of a dictd dictionary, in its order. `data` is the `.dict.dz`; the `.index` lies beside."""
    text = gzip.decompress(data.read_bytes())
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def number(word: str) -> int:
        return functools.reduce(lambda value, digit: 64 * value + digits.index(digit), word, 0)

    starts = set()
    for line in (data.parent / (data.name.removesuffix(".dict.dz") + ".index")).read_text("utf-8").splitlines():
        word, start, length = line.split("\t")[:3]
        if word.startswith("00") or start in starts:
            continue
        starts.add(start)
        yield word, text[number(start) : number(start) + number(length)].decode("utf-8", "replace")


def entry(word: str, raw: str) -> str:
    """A dictionary's entry as one paragraph: the headword, a colon, the text. Empty for a mere reference."""
    body = straighten(raw, code=True).split("\n", 1)[1] if "\n" in raw.strip() else ""
    body = re.sub(r"^\s*/[^/\n]+/,?", "", body)  # pronunciation
    body = re.sub(r"^\s*(?:n|v|adj|adv|vt|vi|interj|prov|excl)\.(?:\s*,\s*\w+\.)*\s*(?=\n|$)", "", body.strip())
    body = re.sub(r"<[^<>\n]{1,60}(?:\n[^<>]{1,40})?>\s*", "", body)  # FOLDOC's subject
    body = re.sub(r"\((?:19|20)\d\d-\d\d-\d\d\)", "", body)
    paragraphs = [" ".join(block.split()) for block in re.split(r"\n\s*\n", body) if block.strip()]
    text = re.sub(r"\{\s*([^{}]*?)\s*\}", r"\1", "\n".join(paragraphs))
    return f"{raw.strip().splitlines()[0].strip()}: {text}" if len(text) > 40 else ""


def wordnet_entry(word: str, raw: str) -> str:
    """A WordNet entry: the word and its senses, each with its part of speech, without lists of synonyms."""
    body = re.sub(r"\[(?:syn|ant|also):[^\]]*\]", "", raw.split("\n", 1)[1] if "\n" in raw else "")
    body = straighten(re.sub(r"\s+", " ", body)).strip()
    if len(body) < 40 or not re.fullmatch(r"[A-Za-z][A-Za-z' -]*", word):
        return ""
    for short, long in (("n", "noun"), ("v", "verb"), ("adj", "adjective"), ("adv", "adverb")):
        body = re.sub(rf"(?:^|(?<=\s)){short}(?= 1: |: )", f"({long})", body)
    return re.sub(r"\s+([;,.])", r"\1", f"{word} {body}")


def gcide_entry(word: str, raw: str) -> str:
    """An entry of the Collaborative International Dictionary, without pronunciation, etymology and sources."""
    body = straighten(raw, code=True)
    if "\\" not in body or not re.fullmatch(r"[A-Za-z][A-Za-z' -]*", word):
        return ""
    body = re.sub(r"\\[^\\]*\\", "", body, count=1)
    body = re.sub(r"\n\s{8,}[^\n]*(?:\n\s{8,}[^\n]*)*", "\n", body)  # quotations
    body = re.sub(r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]", "", body)
    body = re.sub(r"--[A-Z][\w. ]+", "", re.sub(r"[{}]", "", body))
    text = re.sub(r"\s+([;,.])", r"\1", " ".join(body.split()))
    text = re.sub(r"\b(\d+\. )1 (?=[a-z])", r"\1", text)  # a definition from WordNet, which is numbered twice
    return text if len(text) > 60 and not re.search(r"[\[\]?~`]|\bSee\b.{0,30}$", text) else ""


class _Walker:
    """Turns an element tree into paragraphs: `paragraphs`, and how many characters of them were links (`linked`)."""

    def __init__(self) -> None:
        self.paragraphs: list[str] = []
        self.linked = 0
        self._words: list[str] = []
        self._indent = ""
        self._bullet = ""

    def flush(self) -> None:
        """Ends the paragraph that is being gathered."""
        text = straighten(_SPACE.sub(" ", "".join(self._words))).strip()
        text = re.sub(r"\\[()]", "", text)  # around a formula for MathJax
        self._words = []
        if text:
            self.paragraphs.append(self._indent + self._bullet + text)
            if self._bullet:
                self._bullet = " " * len(self._bullet)

    def walk(self, element: Any, depth: int = 0) -> None:
        """Adds `element` and what it contains."""
        tag = _name(element)
        if tag is None or tag in _SKIPPED or _hidden(element) or depth > 200:
            return
        if tag == "div" and "math" in element.get("class", "").split():  # LaTeX
            return
        if tag in _CODE and not (tag == "synopsis" and len(element)):
            self._code(element)
        elif tag == "code" and (element.get("mime") or _parent(element) in ("section", "page", "item")):
            self._code(element)
        elif tag == "table" and _is_data(element):
            self._table(element)
        elif tag in _HEADINGS or tag in _BLOCKS or tag in _ITEMS:
            self._block(element, tag, depth)
        elif tag == "br":
            self._words.append(" ")
        else:
            if tag == "a":
                self.linked += len("".join(element.itertext()))
            self._inside(element, depth)

    def _inside(self, element: Any, depth: int) -> None:
        self._words.append(element.text or "")
        for child in element:
            self.walk(child, depth + 1)
            self._words.append(child.tail or "")

    def _block(self, element: Any, tag: str, depth: int) -> None:
        self.flush()
        before = self._indent, self._bullet
        parent = _parent(element)
        if tag in ("li", "listitem", "item", "step") and parent not in ("varlistentry", "terms"):
            self._indent += " " * len(self._bullet)
            numbered = parent in ("ol", "orderedlist", "steps", "procedure")
            siblings = element.itersiblings(element.tag, preceding=True)
            self._bullet = f"{1 + sum(1 for _ in siblings)}. " if numbered else "- "
        elif tag == "dd" or (tag == "listitem" and parent == "varlistentry"):
            self._indent, self._bullet = self._indent + " " * len(self._bullet) + "    ", ""
        self._inside(element, depth)
        self.flush()
        if tag == "dd" or self._indent != before[0] or not before[1]:
            self._indent, self._bullet = before
        elif tag in ("li", "listitem", "item", "step"):
            self._bullet = before[1]

    def _code(self, element: Any) -> None:
        self.flush()
        text = straighten("".join(_code_text(element)), code=True).expandtabs(8)
        lines = [line.rstrip() for line in textwrap.dedent(text).splitlines()]
        block = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
        if block.strip():
            self.paragraphs.append(textwrap.indent(block, self._indent + "    "))

    def _table(self, table: Any) -> None:
        self.flush()
        rows = []
        for row in table.iter():
            if _name(row) in ("tr", "row"):
                cells = [
                    straighten(_SPACE.sub(" ", "".join(_visible_text(cell)))).strip()
                    for cell in row
                    if _name(cell) in ("td", "th", "entry")
                ]
                rows.append(self._indent + "  ".join(cell for cell in cells if cell))
        if any(row.strip() for row in rows):
            self.paragraphs.append("\n".join(row for row in rows if row.strip()))


def _is_data(table: Any) -> bool:
    """Whether a table is rows of short cells; one that only lays out a page is walked like any block."""
    cells = [cell for cell in table.iter() if _name(cell) in ("td", "th", "entry")]
    inner = ("table", "pre", "ul", "ol", "dl", "h1", "h2", "h3", "blockquote")
    return not any(_name(part) in inner for part in table.iterdescendants()) and len(cells) > 1


def _code_text(element: Any) -> Iterator[str]:
    """Text of code, with its line breaks."""
    yield element.text or ""
    for child in element:
        if _name(child) == "br":
            yield "\n"
        elif _name(child) is not None and not _hidden(child):
            yield from _code_text(child)
            if _name(child) in ("div", "p", "li"):
                yield "\n"
        yield child.tail or ""


def _visible_text(element: Any) -> Iterator[str]:
    yield element.text or ""
    for child in element:
        if _name(child) is not None and _name(child) not in _SKIPPED and not _hidden(child):
            yield from _visible_text(child)
            if _name(child) in _BLOCKS or _name(child) in _ITEMS or _name(child) == "br":
                yield " "
        yield child.tail or ""


def _name(element: Any) -> str | None:
    """The element's name without its namespace; None for a comment, an entity or a processing instruction."""
    return element.tag.rsplit("}", 1)[-1] if isinstance(element.tag, str) else None


def _parent(element: Any) -> str | None:
    parent = element.getparent()
    return None if parent is None else _name(parent)


def _hidden(element: Any) -> bool:
    classes, id = element.get("class"), element.get("id")
    if id == "header" and element.find(".//h2") is not None:  # AsciiDoc's manual pages have their names there
        return False
    return bool(classes and _SKIPPED_CLASSES.search(classes)) or bool(id and _SKIPPED_IDS.match(id))


def _blank_separated(text: str) -> list[str]:
    blocks = re.split(r"\n\s*\n", text)
    return [
        "\n".join(line.rstrip() for line in block.splitlines() if line.strip()) for block in blocks if block.strip()
    ]


def _joined(block: str) -> str:
    """A block on one line if it looks like wrapped prose: one indentation, lines that are long but for the last."""
    lines = block.splitlines()
    indents = [len(line) - len(line.lstrip()) for line in lines]
    bullet = re.match(r"\s*(?:[-*o•]|\d+[.)])\s+", lines[0])
    rest = indents[1:]
    if len(lines) < 2 or len(set(rest)) > 1:
        return block
    even = bullet is not None and rest[0] == bullet.end()
    long = all(len(line) > 45 for line in lines[:-1])
    spaced = any(re.search(r"\S {3,}\S", line) for line in lines)
    if not long or spaced or not (even or abs(indents[0] - rest[0]) <= 4):
        return block
    if max(indents) >= 5 and not even and not re.search(r"[a-z]{2,} [a-z]{2,} [a-z]{2,} [a-z]{2,}", block):
        return block
    first = lines[0].rstrip() if even else " " * rest[0] + lines[0].strip()
    return " ".join([first, *(line.strip() for line in lines[1:])])


def _program(name: str, package: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise UserError(f"{name}: the program is missing; install the Debian package {package} to read these manuals")
    return path


def _import(name: str) -> Any:
    try:
        return __import__(name, fromlist=["_"])
    except ImportError as error:
        raise UserError("lxml: not installed; HTML and XML manuals need it: pip install lxml") from error
