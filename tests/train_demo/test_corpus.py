import importlib.util
import json
import lzma
import re
import shutil

import numpy as np
import pytest

from dsv32_jax.errors import UserError
from dsv32_jax.experiments.train_demo import corpus, extract, questions
from dsv32_jax.experiments.train_demo import tokenizer as demo_tokenizer
from dsv32_jax.experiments.train_demo.greetings import greetings
from dsv32_jax.experiments.train_demo.packages import PACKAGES, SKIP_LANGUAGES, Package
from dsv32_jax.generate.tokenizer import Tokenizer

needs_lxml = pytest.mark.skipif(importlib.util.find_spec("lxml") is None, reason="lxml is not installed")
needs_mandoc = pytest.mark.skipif(shutil.which("mandoc") is None, reason="mandoc is not installed")
needs_pod2text = pytest.mark.skipif(shutil.which("pod2text") is None, reason="pod2text is not installed")

HTML = """<html><head><title>t</title></head><body><div class="navheader">Prev Next</div><main>
<h1>Pipes<a class="headerlink">¶</a></h1><p>A “pipe” joins\n two <b>programs</b>.</p>
<ul><li>One</li><li><p>Two</p></li></ul><pre>if x:\n    y()\n</pre>
<dl><dt>-a</dt><dd>All of it.</dd></dl><table><tr><td>a</td><td>b</td></tr></table></main></body></html>"""
MAN = """.TH LS 1
.SH NAME
ls \\- list directory contents
.SH DESCRIPTION
List information about
the FILEs.
.TP
\\fB\\-a\\fR, \\fB\\-\\-all\\fR
do not ignore entries
.nf
ls \\-l
  x
.fi
"""
PAGE = """<page xmlns="http://projectmallard.org/1.0/"><info><desc>no</desc></info><title>Keys</title>
<p>Press <key>Enter</key> to start.</p>
<steps><item><p>Open it.</p></item><item><p>Close it.</p></item></steps></page>"""


@pytest.fixture(scope="module")
def documents() -> list[dict[str, str]]:
    pages = []
    for n in range(600):
        unique = " ".join(f"Sentence {n} of the manual says that program {n * k} can read the file." for k in range(12))
        shared = f"This paragraph stands in seven manuals and says the same in each of them, number {n % 90}."
        pages.append({"package": f"p{n % 10}", "path": f"doc/{n}.html", "text": f"Heading\n\n{unique}\n\n{shared}"})
    return pages


@pytest.fixture(scope="module")
def data(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("data")
    with lzma.open(folder / "documents.jsonl.xz", "wt") as file:
        file.writelines(json.dumps(document) + "\n" for document in corpus.select(documents))
    demo_tokenizer.train(folder, 320)
    return folder


@needs_lxml
def test_html_keeps_prose_code_and_items():
    expected = [
        "Pipes",
        'A "pipe" joins two programs.',
        "- One",
        "- Two",
        "    if x:\n        y()",
        "-a",
        "    All of it.",
    ]
    assert extract.html(HTML) == [*expected, "a  b"]


@needs_lxml
def test_a_page_of_links_gives_nothing():
    assert extract.html("<html><body><ul><li><a href=x>The first chapter</a></li></ul></body></html>") == []


@needs_lxml
def test_the_name_in_a_header_of_asciidoc_stays():
    page = "<html><body><div id=header><h1>a(1)</h1><h2>NAME</h2><p>a - adds up numbers</p></div></body></html>"
    assert extract.html(page) == ["a(1)", "NAME", "a - adds up numbers"]


@needs_lxml
def test_mallard_numbers_the_steps_and_drops_the_info():
    assert extract.xml(PAGE) == ["Keys", "Press Enter to start.", "1. Open it.", "2. Close it."]


@needs_lxml
@needs_mandoc
def test_man_page_is_unwrapped():
    paragraphs = extract.man(MAN)
    assert paragraphs[:4] == [
        "NAME",
        "ls - list directory contents",
        "DESCRIPTION",
        "List information about the FILEs.",
    ]
    assert "-a, --all" in paragraphs and any(paragraph.endswith("ls -l\n          x") for paragraph in paragraphs)


def test_man_without_mandoc_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="mandoc"):
        extract.man(MAN)


@needs_pod2text
def test_pod_headings_stand_alone():
    pod = "=head1 NAME\n\nx - y\n\n=head2 More\n\nSome B<bold>\nwords.\n\n  code\n"
    assert extract.pod(pod) == ["NAME", "x - y", "More", "Some bold words.", "  code"]


def test_info_joins_prose_and_leaves_code_and_menus():
    text = (
        "This is x.info, produced by makeinfo.\n\x1f\nFile: x.info,  Node: A,  Up: Top\n\n1 Pipes\n*******\n\n"
        "   A pipe joins two programs, and what the first one\nwrites is what the second one reads (*note Files::).\n\n"
        "     a | b\n     c | d\n\n* Menu:\n\n* B:: other\n\x1f\nTag Table:\nNode: A\x7f12\n"
    )
    prose = "A pipe joins two programs, and what the first one writes is what the second one reads (Files)."
    assert extract.info(text) == ["1 Pipes", prose, "     a | b\n     c | d"]


def test_dictionary_entries_lose_their_markup():
    assert extract.entry(
        "aup", "AUP\n\n   <tool> A {policy} that says what\n   the users may do.\n\n   (1995-10-06)\n"
    ) == ("AUP: A policy that says what the users may do.")
    raw = "agile\n    adj 1: moving quickly and lightly; [syn: {nimble}]\n    2: mentally quick"
    assert extract.wordnet_entry("agile", raw) == "agile (adjective) 1: moving quickly and lightly; 2: mentally quick"


def test_clean_drops_boilerplate_and_keeps_options():
    prose = ["-a", "    Show all.", "Copy text to the screen."]
    assert corpus.clean([*prose, "Next", "Copyright 2020 X", "1 2 3 4", "© Y"]) == prose


def test_only_english_prose_counts():
    assert corpus.is_prose(["The files in this folder are read by the program that is started with it. " * 3])
    assert not corpus.is_prose(
        ["Die Dateien werden vom Programm gelesen, das damit gestartet wird, und nicht anders. " * 3]
    )


def test_translated_paths_are_skipped():
    assert SKIP_LANGUAGES.search("/doc/manual/fr/index.html") and SKIP_LANGUAGES.search("/doc/a.pt-br.html")
    assert not SKIP_LANGUAGES.search("/doc/html/en-US/index.html") and not SKIP_LANGUAGES.search(
        "/usr/share/doc/x.html"
    )


def test_pages_are_joined_in_a_folder_and_long_ones_split():
    pages = [("a/1", ["x" * 3000]), ("a/2", ["y" * 3000]), ("a/3", ["z" * 100]), ("b/1", ["w" * 999] * 450)]
    documents = corpus.join(pages)
    assert [path for path, _ in documents] == ["a/1", "b/1#0", "b/1#1", "b/1#2"]
    assert sum(len(re.sub(r"\s", "", text)) for _, text in documents) == 6100 + 999 * 450


def test_split_depends_on_package_and_path_alone():
    names = [f"doc/{n}.html" for n in range(4000)]
    splits = [corpus.split_of("p", name) for name in names]
    assert splits == [corpus.split_of("p", name) for name in names]
    assert 0.005 < splits.count("held-out") / len(splits) < 0.03


def test_no_paragraph_stands_twice_or_in_both_splits(documents):
    selected = corpus.select(documents)
    assert {document["split"] for document in selected} == {"train", "held-out"}
    keys = [corpus.paragraph_key(paragraph) for document in selected for paragraph in document["text"].split("\n\n")]
    keys = [key for key in keys if key is not None]
    assert len(keys) == len(set(keys))


def test_held_out_documents_keep_what_training_ones_share(documents):
    held_out = [document for document in corpus.select(documents) if document["split"] == "held-out"]
    original = {document["path"]: document["text"] for document in documents}
    assert any(document["text"] == original[document["path"]] for document in held_out)


def test_a_copy_of_a_document_is_dropped(documents):
    copies = [{**document, "package": "copy"} for document in documents[:50]]
    paths = [(document["package"], document["path"]) for document in corpus.select([*documents[:50], *copies])]
    assert len(paths) == 50


def test_a_cap_limits_a_package(documents):
    selected = corpus.select(documents, [Package("p1", cap=0.01)])
    training = [document for document in selected if document["package"] == "p1" and document["split"] == "train"]
    assert 0 < sum(len(document["text"]) for document in training) <= 10_000


def test_each_package_is_named_once():
    names = [package.name for package in PACKAGES]
    assert len(names) == len(set(names))


def test_license_names_come_from_the_copyright_file():
    form = "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n"
    dep5 = form + "License: MIT\nLicense: GPL-2+\nLicense: MIT\n"
    assert corpus.licenses(dep5) == "MIT, GPL-2+"
    assert corpus.licenses("under the GNU General Public License") == "see copyright file (GPL)"


def test_special_tokens_have_their_ids_and_text_comes_back(data):
    tokenizer = Tokenizer(data)
    assert [tokenizer.encode(token) for token in demo_tokenizer.SPECIAL] == [[n] for n in range(7)]
    assert tokenizer.vocab_size == 320 and (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    text = "def f(x):\n    return x  # 1234 naïve\n\n\tEnd."
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_vocabulary_without_room_for_bytes_is_refused(tmp_path):
    with pytest.raises(UserError, match="vocab_size"):
        demo_tokenizer.write(tmp_path, ["a"], 200)


def test_encoded_documents_lie_between_ids_0_and_1(data):
    demo_tokenizer.encode_corpus(data)
    tokenizer = Tokenizer(data)
    for split, name in (("train", "train.npz"), ("held-out", "held_out.npz")):
        texts = {document["text"] for document in corpus.read_documents(data, split)}
        arrays = np.load(data / name)
        tokens, starts = arrays["tokens"], arrays["starts"]
        assert tokens.dtype == np.uint16 and starts.dtype == arrays["bytes"].dtype == np.int64
        ends = [*starts[1:], len(tokens)]
        for start, end, size in zip(starts, ends, arrays["bytes"], strict=True):
            assert tokens[start] == 0 and tokens[end - 1] == 1
            text = tokenizer.decode(tokens[start + 1 : end - 1])
            assert text in texts and len(text.encode()) == size
        assert len(starts) == len(texts)


def test_a_special_token_in_a_manual_stays_text(data):
    encoded = demo_tokenizer.encode(demo_tokenizer.load(data), ["a <think> b"])
    assert set(encoded["tokens"].tolist()) & {2, 3, 4, 5, 6} == set()


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="build the corpus"):
        next(corpus.read_documents(tmp_path))
    with pytest.raises(UserError, match="train the tokenizer"):
        demo_tokenizer.encode_corpus(tmp_path)
    with pytest.raises(UserError, match="make the questions"):
        questions.read(tmp_path)


def test_questions_come_from_names_options_and_headings():
    text = (
        "NAME\n\nls - list directory contents\n\nDESCRIPTION\n\nList information about the files. More of it here.\n\n"
        "-a, --all\n\n    Show all entries, and hide none of them.\n\n"
        "2.1. Soft links\n\nA soft link is a file that holds the name of another file, and opening it opens that one."
    )
    pairs = list(questions.pairs_of("coreutils", "usr/share/man/man1/ls.1.gz", text))
    answers = {question: answer for _, question, answer in pairs}
    name = "`ls` lists directory contents. List information about the files. More of it here."
    assert name in answers.values() and any("ls" in question for question in answers)
    assert "`ls -a` shows all entries, and hide none of them." in answers.values()
    assert any(kind == "section" and "soft links" in question for kind, question, _ in pairs)


def test_third_person():
    assert questions.third_person("copy and convert files") == "copies and converts files"
    assert questions.third_person("do it and return the bytes") == "does it and returns the bytes"


def test_shorten_ends_at_a_sentence():
    assert questions.shorten("One two, e.g. Three four. Five six seven.", 6) == "One two, e.g. Three four."
    assert questions.shorten("No sentence ends here", 9) == ""


def test_pairs_are_rendered_as_the_chat_template_does(data):
    pairs = [questions.Pair(question, answer, "s", "train") for question, answer in list(greetings())[:3]]
    tokenizer = Tokenizer(data)
    encoded = questions.encode_pairs(tokenizer, pairs)
    ends = [*encoded["starts"][1:], len(encoded["tokens"])]
    for pair, start, answer, end in zip(pairs, encoded["starts"], encoded["answer_starts"], ends, strict=True):
        question = {"role": "user", "content": pair.question}
        turns = [question, {"role": "assistant", "content": pair.answer}]
        rendered = tokenizer.render_chat(turns, add_generation_prompt=False)
        assert encoded["tokens"][start:end].tolist() == tokenizer.encode(rendered)
        assert encoded["tokens"][start:answer].tolist() == tokenizer.encode_chat([question])
        assert tokenizer.decode(encoded["tokens"][answer:end]) == pair.answer
