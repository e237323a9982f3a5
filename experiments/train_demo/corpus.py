"""The demo corpus: free manuals from Debian packages as clean documents, split into training and held-out ones.

`build` fetches the packages of `packages.py` with `apt-get download` (nothing is installed), unpacks them inside
the data directory, and writes `documents.jsonl.xz`, one {"package", "path", "split", "text"} a line, and
`manifest.json`.
The split depends only on a document's package and path (`split_of`). No paragraph of a held-out document of more than
60 characters is in a training document.
"""

import collections
import concurrent.futures
import datetime
import functools
import glob
import hashlib
import itertools
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dsv32_jax.common.files import whole_file
from dsv32_jax.common.progress import progress_bar, tracked
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.command_line import require
from dsv32_jax.experiments.reading import json_lines
from dsv32_jax.experiments.results import write_json
from dsv32_jax.experiments.train_demo import extract
from dsv32_jax.experiments.train_demo.packages import PACKAGES, SKIP_LANGUAGES, SKIP_PATHS, Package

SEED = "dsv32-demo-1"
HELD_OUT = 0.015  # of the documents
SHARE = 0.15  # the most one package may have of the whole
VERSION = 4  # of the extracted texts; counted up when `extract` gives other text
SHORT, LONG = 4_000, 200_000  # characters: pages below are joined with the next, documents above are split
_UNKNOWN_PACKAGE = "(?i)unable to locate|candidate|find a source"
_UNIQUE = 60  # characters from which a paragraph may occur only once
_COMMON = re.compile(
    r"\b(?:the|of|to|a|an|is|in|and|for|that|this|are|be|with|it|if|or|as|on|by|you|can|not|from|will)\b"
)
# Headings that stand on many pages and belong there.
_HEADING = re.compile(
    r"(?:name|synopsis|description|options?|examples?|see also|notes?|authors?|parameters?|returns?|return values?"
    r"|errors?|syntax|arguments?|propert(?:y|ies)|overview|usage|introduction|methods?|functions?|details|warnings?"
    r"|tips?|important|summary|files|bugs|environment|default|attributes|compatibility|exit status|outputs?|inputs?"
    r"|history|raises):?",
    re.IGNORECASE,
)
_BOILERPLATE = re.compile(
    r"^(?:\W*(?:next|previous|prev|up|home|contents|index|top|table of contents|back to top|search|download|"
    r"submit feedback|report a bug|edit|copyright|►.*)\W*)$"
    r"|^(?:copyright|\(c\)|©|last (?:updated|modified|change)|created using|generated (?:by|on|from)"
    r"|this page (?:last|was)"
    r"|all rights reserved|permission is (?:hereby )?granted|this work is licensed|report bugs to|license gplv3)\b"
    r"|free software foundation, inc\.|this is free software: you are free to change|there is no warranty"
    r"|redistribution and use in source and binary|gnu free documentation license|gnu general public license for more"
    r"|^jump to|\[contents\]|javascript|^\[?\s*(?:prev|next|up)\b.{0,80}$",
    re.IGNORECASE,
)


def build(data_dir: Path) -> dict[str, Any]:
    """Fetches, reads, cleans and writes the corpus; returns the manifest. What is already there is not made again."""
    documents_file, manifest_file = data_dir / "documents.jsonl.xz", data_dir / "manifest.json"
    if documents_file.exists() and manifest_file.exists():
        return json.loads(manifest_file.read_text("utf-8"))
    require(
        "the corpus",
        "lxml",
        extra="train",
        programs={"apt-get": "apt", "apt-cache": "apt", "dpkg-deb": "dpkg", "mandoc": "mandoc", "pod2text": "perl"},
    )
    files, missing = collect(data_dir)
    books = _read_packages(files, data_dir)
    documents = select([document for package in PACKAGES for document in books.get(package.name, ())], PACKAGES)
    manifest = _manifest(documents, files, missing, data_dir)
    with whole_file(documents_file) as temporary:
        _write_documents(temporary, documents)
    write_json(manifest_file, manifest)
    return manifest


def read_documents(data_dir: Path, split: str | None = None) -> Iterator[dict[str, str]]:
    """The documents of one split (`train`, `held-out`) or of both. Raises `UserError` when there is no corpus."""
    path = data_dir / "documents.jsonl.xz"
    if not path.exists():
        raise UserError(f"{path}: not there; build the corpus first")
    for document in json_lines(path):
        if split in (None, document["split"]):
            yield document


def collect(data_dir: Path) -> tuple[dict[str, Path], list[str]]:
    """Package files by name, downloaded where missing, and the names of packages that the archive does not have."""
    folder = data_dir / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    files, missing = {}, []
    for package in tracked(PACKAGES, "downloading", "packages"):
        file = _downloaded(package.name, folder) or _download(package, folder)
        if file is None:
            missing.append(package.name)
            print(f"{package.name}: the archive has no such package; left out", file=sys.stderr)
        else:
            files[package.name] = file
    if not files:
        raise UserError("apt-get: none of the packages could be downloaded; check the sources and run `apt-get update`")
    return files, missing


def split_of(package: str, path: str) -> str:
    """`held-out` for 1.5 % of the documents by the hash of seed, package and path, else `train`."""
    return "held-out" if _hash(f"{package}/{path}") < HELD_OUT else "train"


def select(documents: Sequence[dict[str, str]], packages: Iterable[Package] = ()) -> list[dict[str, str]]:
    """`documents` ({"package", "path", "text"}) without repeated paragraphs and within the caps, each with its split.

    Held-out documents claim their paragraphs first. A document that loses more than half of its text is dropped. Which
    documents a cap removes depends on their hashes alone.
    """
    with_split = [{**document, "split": split_of(document["package"], document["path"])} for document in documents]
    with_split.sort(key=lambda document: document["split"] != "held-out")  # stable: books stay in order
    known_keys: set[bytes] = set()
    selected = []
    for document in with_split:
        paragraphs = document["text"].split("\n\n")
        unique = []
        for paragraph in paragraphs:
            key = paragraph_key(paragraph)
            unique.append(key is None or key not in known_keys)
            if key is not None:
                known_keys.add(key)
        text = "\n\n".join(_kept(paragraphs, unique))
        if len(text) >= 0.5 * len(document["text"]) and len(text) >= 300:
            selected.append({key: document[key] for key in ("package", "path", "split")} | {"text": text})
    caps = {package.name: package.cap * 1e6 for package in packages}
    selected = [
        document for _, group in _by_package(selected) for document in _capped(group, caps.get(group[0]["package"]))
    ]
    limit = SHARE * sum(len(document["text"].encode()) for document in selected)
    if len({document["package"] for document in selected}) > 1 / SHARE:
        selected = [document for _, group in _by_package(selected) for document in _capped(group, limit)]
    return selected


def paragraph_key(paragraph: str) -> bytes | None:
    """What two equal paragraphs have in common, spaces and case aside; None for one too short to count."""
    plain = " ".join(paragraph.lower().split())
    return hashlib.blake2b(plain.encode(), digest_size=10).digest() if len(plain) > _UNIQUE else None


def clean(paragraphs: Sequence[str]) -> list[str]:
    """`paragraphs` without boilerplate, number tables, other alphabets and repeated headings."""
    result: list[str] = []
    for paragraph in paragraphs:
        paragraph = re.sub(r"[ \t]+$", "", paragraph, flags=re.MULTILINE).strip("\n")
        words = paragraph.strip()
        if not words or _BOILERPLATE.search(words[:400]) or not re.search(r"[A-Za-z]{2}|[A-Za-z] |^-\S", words):
            continue
        letters = sum(map(str.isalpha, words)) / len(words)
        digits = sum(map(str.isdigit, words)) / len(words)
        foreign = sum(character > "\u024f" for character in words) / len(words)
        if foreign > 0.05 or (len(words) > 150 and (digits > 0.25 or letters < 0.4)):
            continue
        if len(words) > 1500 and words.count("\n") > 40 and not _COMMON.search(words):  # a long listing
            continue
        if not result or result[-1].strip() != words:
            result.append(paragraph)
    return result


def is_prose(paragraphs: Sequence[str], *, brief: bool = False) -> bool:
    """Whether a page reads as English: common words are frequent, and it is not a list of names.

    `brief` is for manual pages, whose lists of options are short and have few such words.
    """
    text = "\n".join(paragraphs)
    words = re.findall(r"[A-Za-z]+", text)
    common = len(_COMMON.findall(text.lower())) / max(1, len(words))
    lengths = sorted(len(paragraph) for paragraph in paragraphs)
    long = bool(lengths) and lengths[int(0.9 * (len(lengths) - 1))] >= 50
    return len(words) >= 25 and (common >= 0.09 if brief else long and common >= 0.16)


def join(pages: Sequence[tuple[str, list[str]]]) -> list[tuple[str, str]]:
    """(path, text) of documents made of (path, paragraphs) pages of one book in their order.

    Neighbours in one folder are joined until there are 4,000 characters; a longer text is split near 200,000.
    """
    documents: list[tuple[str, str]] = []
    for _, group in itertools.groupby(pages, key=lambda page: page[0].rpartition("/")[0]):
        name, parts, size = "", [], 0
        joined: list[tuple[str, list[str]]] = []
        for path, paragraphs in group:
            name = name or path
            parts += paragraphs
            size += sum(len(paragraph) + 2 for paragraph in paragraphs)
            if size >= SHORT:
                joined.append((name, parts))
                name, parts, size = "", [], 0
        if parts and joined and size < SHORT / 2:  # a short rest goes to the document before
            joined[-1][1].extend(parts)
        elif parts:
            joined.append((name, parts))
        documents += [piece for path, paragraphs in joined for piece in _pieces(path, paragraphs)]
    return documents


def _pieces(path: str, paragraphs: list[str]) -> Iterator[tuple[str, str]]:
    total = sum(len(paragraph) + 2 for paragraph in paragraphs)
    limit = total / -(-total // LONG) if total else LONG
    piece: list[str] = []
    size = number = 0
    for paragraph in paragraphs:
        piece.append(paragraph)
        size += len(paragraph) + 2
        if size >= limit:
            yield (f"{path}#{number}" if number or total > LONG else path), "\n\n".join(piece)
            piece, size, number = [], 0, number + 1
    if piece:
        yield (f"{path}#{number}" if number else path), "\n\n".join(piece)


def read_folder(package: Package, folder: Path) -> list[dict[str, str]]:
    """The documents of one unpacked package."""
    only, skip = (re.compile(pattern) if pattern else None for pattern in (package.only, package.skip))
    pages: list[tuple[str, list[str]]] = []
    read: set[bytes] = set()
    sources = sorted(_sources(folder), key=lambda source: _natural(source[0]))
    web = sum(reader is not _info and ".htm" in path for path, reader in sources) > 5
    for path, reader in sources:
        if reader is _info and web:  # the same manual once more
            continue
        if (only and not only.search("/" + path)) or (skip and skip.search("/" + path)):
            continue
        if SKIP_PATHS.search("/" + path) or SKIP_LANGUAGES.search("/" + path):
            continue
        for name, paragraphs in reader(folder / path):
            paragraphs = clean(paragraphs)
            key = hashlib.sha1("\n".join(paragraphs).encode()).digest()
            if paragraphs and key not in read and is_prose(paragraphs, brief="/man/" in path):
                read.add(key)
                pages.append((path + name, paragraphs))
    pages = _without_frames(pages)
    documents = [(path, text) for path, text in join(pages) if is_prose(text.split("\n\n"), brief="/man/" in path)]
    return [{"package": package.name, "path": path, "text": text} for path, text in documents]


Reader = Callable[[Path], Iterable[tuple[str, list[str]]]]


def _sources(folder: Path) -> Iterator[tuple[str, Reader]]:
    """(path inside the package, reader) of the files that can be read."""
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            if not path.is_symlink() and (reader := _reader(path.relative_to(folder).as_posix())):
                yield path.relative_to(folder).as_posix(), reader


def _reader(path: str) -> Reader | None:
    name = path.rpartition("/")[2]
    if re.search(r"share/man/man\d\w*/", path):
        return functools.partial(_page, extract.man)
    if re.search(r"\.info(?:\.gz)?$", name):
        return _info
    if re.search(r"\.html?$|^index\.cache\.bz2$", name):
        return functools.partial(_page, extract.html)
    if re.search(r"\.html?\.gz$", name):
        return functools.partial(_page, extract.html)
    if name.endswith(".pod"):
        return functools.partial(_page, extract.pod)
    if re.search(r"/help/C/.*\.(?:page|docbook|xml)$", path):
        return functools.partial(_page, extract.xml)
    if re.search(r"/vim\d+/doc/.*\.txt$", path):
        return functools.partial(_page, extract.vim_help)
    if name.endswith(".dict.dz"):
        return _dictionary
    if re.search(r"share/doc/doc-debian/.*\.txt(?:\.gz)?$", path):
        return functools.partial(_page, extract.wrapped)
    return None


def _page(function: Callable[[str], list[str]], path: Path) -> list[tuple[str, list[str]]]:
    return [("", function(extract.read(path)))] if path.stat().st_size < 8e6 else []


def _info(path: Path) -> list[tuple[str, list[str]]]:
    """An info file with its parts (`x.info-1.gz` ...) in their order."""
    stem = re.sub(r"\.gz$", "", path.name)
    parts = sorted(path.parent.glob(glob.escape(stem) + "-*"), key=lambda part: _natural(part.name)) or [path]
    return [("", extract.info("".join(extract.read(part) for part in parts)))]


def _dictionary(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Entries in groups of some 20,000 characters."""
    clean_entry = {"gcide": extract.gcide_entry, "wn": extract.wordnet_entry}.get(
        path.name.split(".")[0], extract.entry
    )
    group: list[str] = []
    size = number = 0
    for word, raw in extract.dictionary(path):
        text = clean_entry(word, raw)
        if text:
            group.append(text)
            size += len(text)
        if size > 20_000:
            yield f"#{number:04}", group
            group, size, number = [], 0, number + 1
    yield f"#{number:04}", group


def _without_frames(pages: list[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """Pages without what stands on a quarter of them or more: navigation, slogans, footers. Man pages' titles stay."""
    web = [page for page in pages if "/man/" not in page[0] and ".dict" not in page[0]]
    count = collections.Counter(p for _, paragraphs in web for p in {p.strip() for p in paragraphs} if len(p) < 400)
    frames = {p for p, number in count.items() if number > max(8, 0.25 * len(web))}
    frames = {p for p in frames if not _HEADING.fullmatch(p)}
    return [
        (path, paragraphs if "/man/" in path else [p for p in paragraphs if p.strip() not in frames])
        for path, paragraphs in pages
    ]


def _kept(paragraphs: list[str], unique: list[bool]) -> Iterator[str]:
    """The unique paragraphs, without the headings of sections of which nothing is left."""
    heading = [len(paragraph) < 40 and paragraph[:1].isalnum() and paragraph[-1:].isalnum() for paragraph in paragraphs]
    for index, paragraph in enumerate(paragraphs):
        if heading[index] and unique[index] and not all(unique[index + 1 : index + 2]):
            following = next((n for n in range(index + 1, len(paragraphs)) if unique[n]), None)
            if following is None or heading[following]:
                continue
        if unique[index]:
            yield paragraph


def _capped(documents: list[dict[str, str]], limit: float | None) -> list[dict[str, str]]:
    """As many as fit in `limit` bytes, by their hash; the order stays. Held-out documents count but always stay."""
    sizes = [len(document["text"].encode()) for document in documents]
    if limit is None or sum(sizes) <= limit:
        return documents
    order = sorted(range(len(documents)), key=lambda n: _hash("{package}/{path}".format(**documents[n]) + "?"))
    chosen, total = set(), 0
    for n in order:
        if documents[n]["split"] == "held-out" or total + sizes[n] <= limit:
            chosen.add(n)
            total += sizes[n]
    return [document for n, document in enumerate(documents) if n in chosen]


def _by_package(documents: list[dict[str, str]]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    groups: dict[str, list[dict[str, str]]] = {}
    for document in documents:
        groups.setdefault(document["package"], []).append(document)
    yield from groups.items()


def _hash(name: str) -> float:
    """A number from 0 to 1 that depends on `name` and the seed."""
    return int.from_bytes(hashlib.sha256(f"{SEED}/{name}".encode()).digest()[:8], "big") / 2**64


def _natural(path: str) -> list[Any]:
    """A key that sorts chapter 2 before chapter 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]


def _read_packages(files: dict[str, Path], data_dir: Path) -> dict[str, list[dict[str, str]]]:
    """Documents by package, read by several processes; what was read before comes from `texts/`."""
    (data_dir / "texts").mkdir(exist_ok=True)
    result = {}
    packages = [package for package in PACKAGES if package.name in files]
    reading = progress_bar("reading", len(packages), "packages")
    with concurrent.futures.ProcessPoolExecutor() as pool, reading as advance:
        futures = {pool.submit(_read_package, package, files[package.name], data_dir): package for package in packages}
        for future in concurrent.futures.as_completed(futures):
            result[futures[future].name] = future.result()
            advance(1)
    return result


def _read_package(package: Package, file: Path, data_dir: Path) -> list[dict[str, str]]:
    rules = hashlib.sha1(repr((package.only, package.skip, file.name, VERSION)).encode()).hexdigest()[:8]
    cache = data_dir / "texts" / f"{package.name}.{rules}.json.xz"
    if not cache.exists():
        documents = read_folder(package, unpack(file, data_dir / "unpacked"))
        data = lzma.compress(json.dumps(documents).encode(), preset=0)
        with whole_file(cache) as temporary:
            temporary.write_bytes(data)
    return json.loads(lzma.decompress(cache.read_bytes()))


def unpack(file: Path, folder: Path) -> Path:
    """The folder in `folder` with the package's files. Raises `UserError` when it is no package."""
    target = folder / file.name.split("_")[0]
    if not target.exists():
        temporary = folder / f".{target.name}.{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        result = subprocess.run(["dpkg-deb", "-x", str(file), str(temporary)], capture_output=True, check=False)
        if result.returncode:
            raise UserError(f"{file}: not a Debian package that dpkg-deb can unpack; delete it and run again")
        os.replace(temporary, target)
    return target


def _downloaded(name: str, folder: Path) -> Path | None:
    return max(folder.glob(f"{name}_*.deb"), default=None)


def _download(package: Package, folder: Path) -> Path | None:
    """Downloads a package, or what its metapackage now depends on."""
    for name in (package.name, *(_depends(package.meta) if package.meta else ())):
        result = subprocess.run(["apt-get", "download", name], cwd=folder, capture_output=True, text=True, check=False)
        if result.returncode == 0 and (file := _downloaded(name, folder)):
            return file
        if result.returncode and not re.search(_UNKNOWN_PACKAGE, result.stderr):
            error_lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
            raise UserError(f"apt-get download {name}: {error_lines[-1]}; run it again to go on")
    return None


def _depends(meta: str) -> list[str]:
    result = subprocess.run(["apt-cache", "depends", meta], capture_output=True, text=True, check=False)
    return [name for name in re.findall(r"Depends: (\S+)", result.stdout) if "-doc" in name]


def _manifest(
    documents: list[dict[str, str]], files: dict[str, Path], missing: list[str], data_dir: Path
) -> dict[str, Any]:
    packages = []
    for package in PACKAGES:
        package_documents = [document for document in documents if document["package"] == package.name]
        if not package_documents:
            continue
        file = files[package.name]
        fields = subprocess.run(
            ["dpkg-deb", "-f", str(file), "Section", "Version"], capture_output=True, text=True, check=False
        )
        folder = data_dir / "unpacked" / file.name.split("_")[0]
        copyright_file = next(folder.glob("usr/share/doc/*/copyright"), None)
        packages.append(
            {
                "name": file.name.split("_")[0],
                "version": urllib.parse.unquote(file.name.split("_")[1]),
                "section": next(iter(re.findall(r"Section: (\S+)", fields.stdout)), ""),
                "license": licenses(extract.read(copyright_file) if copyright_file else ""),
                "why": package.why,
                **_counts(package_documents),
            }
        )
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seed": SEED,
        "rule": f"held-out if the first 8 bytes of sha256(seed/package/path), as a fraction, are below {HELD_OUT}",
        "missing": missing,
        "totals": _counts(documents),
        "packages": packages,
    }


def licenses(text: str) -> str:
    """The short names in a machine-readable copyright file, the most used first; else a guess from its words."""
    if re.search(r"^Format: .*copyright-format", text, re.MULTILINE):
        names = re.findall(r"^License: *(\S.*)$", text, re.MULTILINE)
        return ", ".join(name for name, _ in collections.Counter(map(str.strip, names)).most_common(6))
    patterns = {
        "GFDL": r"Free Documentation License|GFDL|FDL",
        "GPL": r"General Public License|\bGPL",
        "LGPL": r"Lesser General|Library General|\bLGPL",
        "BSD": r"Redistribution and use in source and binary|\bBSD\b",
        "MIT": r"Permission is hereby granted, free of charge",
        "Apache-2.0": r"Apache License",
        "PSF": r"Python Software Foundation",
        "PostgreSQL": r"PostgreSQL",
        "CC-BY-SA": r"Attribution-ShareAlike|CC-BY-SA",
        "public domain": r"public domain",
        "Artistic": r"Artistic",
    }
    matching = [name for name, pattern in patterns.items() if re.search(pattern, text, re.IGNORECASE)]
    return "see copyright file" + (f" ({', '.join(matching)})" if matching else "")


def _counts(documents: list[dict[str, str]]) -> dict[str, int]:
    counts = collections.Counter({"documents": 0, "train_bytes": 0, "held_out_documents": 0, "held_out_bytes": 0})
    for document in documents:
        size = len(document["text"].encode())
        held_out = document["split"] == "held-out"
        counts["held_out_bytes" if held_out else "train_bytes"] += size
        counts["held_out_documents"] += held_out
        counts["documents"] += 1
    return dict(counts)


def _write_documents(path: Path, documents: list[dict[str, str]]) -> None:
    with lzma.open(path, "wt", preset=2, encoding="utf-8") as file:
        for document in tracked(documents, "writing", "documents"):
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
