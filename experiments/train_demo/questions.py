"""Questions and answers made from the manuals' own headings, synopses, options and dictionary entries."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dsv32_jax.common.files import whole_file
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.train_demo import corpus
from dsv32_jax.experiments.train_demo import tokenizer as demo_tokenizer
from dsv32_jax.experiments.train_demo.greetings import greetings
from dsv32_jax.generate.tokenizer import Tokenizer

GREETINGS = "greetings"  # the source of pairs written by hand
MOST_WORDS = 80  # of an answer
# The most pairs of one kind, so that no kind drowns the others.
LIMITS = {"name": 15_000, "option": 9_000, "section": 18_000, "word": 9_000, "function": 8_000, "question": 3_000}

_TITLES = {
    "python3.11-doc": "Python", "git-doc": "Git", "postgresql-doc-15": "PostgreSQL", "sqlite3-doc": "SQLite",
    "linux-doc-6.1": "the Linux kernel", "perl-doc": "Perl", "rust-doc": "Rust", "gimp-help-en": "GIMP",
    "gnome-user-docs": "GNOME", "gnucash-docs": "GnuCash", "libreoffice-help-en-us": "LibreOffice",
    "vim-runtime": "Vim", "cmake-doc": "CMake", "apache2-doc": "the Apache web server", "bash-doc": "Bash",
    "python-django-doc": "Django", "python-sqlalchemy-doc": "SQLAlchemy", "erlang-doc": "Erlang",
    "nodejs-doc": "Node.js", "python-sklearn-doc": "scikit-learn", "python-pandas-doc": "pandas",
    "python-scipy-doc": "SciPy", "python-sympy-doc": "SymPy", "postgis-doc": "PostGIS", "zsh-doc": "Zsh",
    "octave-doc": "Octave", "gnuplot-doc": "gnuplot", "ghc-doc": "GHC", "llvm-14-doc": "LLVM", "bind9-doc": "BIND",
    "exim4-doc-html": "Exim", "mutt": "Mutt", "racket-doc": "Racket", "gap-doc": "GAP", "maxima-doc": "Maxima",
    "linuxcnc-doc-en": "LinuxCNC", "kicad-doc-en": "KiCad", "gnumeric-doc": "Gnumeric", "postfix-doc": "Postfix",
    "debian-policy": "Debian policy", "installation-guide-amd64": "the Debian installer", "lilypond-doc": "LilyPond",
    "qtbase5-doc-html": "Qt", "libgtk-3-doc": "GTK", "libglib2.0-doc": "GLib", "libboost1.74-doc": "Boost",
    "shorewall-doc": "Shorewall", "wireshark-doc": "Wireshark", "ffmpeg-doc": "FFmpeg", "valgrind": "Valgrind",
    "nova-doc": "OpenStack Nova", "neutron-doc": "OpenStack Neutron", "cinder-doc": "OpenStack Cinder",
    "keystone-doc": "OpenStack Keystone", "swift-doc": "OpenStack Swift", "ironic-doc": "OpenStack Ironic",
    "kate5-data": "Kate", "okular": "Okular", "kstars-data": "KStars", "swi-prolog-doc": "SWI-Prolog",
    "python-celery-doc": "Celery", "python-astropy-doc": "Astropy", "buildbot-doc": "Buildbot", "sphinx-doc": "Sphinx",
    "binutils-doc": "the GNU binutils", "guile-3.0-doc": "Guile", "autoconf-doc": "Autoconf", "tcl8.6-doc": "Tcl",
    "clang-14-doc": "Clang", "frr-doc": "FRR", "openvswitch-doc": "Open vSwitch", "gnutls-doc": "GnuTLS",
}  # fmt: skip
_DEBIAN = (
    "debian",
    "maint-guide",
    "harden-doc",
    "apt-doc",
    "aptitude",
    "live-manual",
    "developers-reference",
    "debmake",
)
# Headings that say nothing without their page.
_BARE = re.compile(
    r"(?:introduction|description|overview|examples?|notes?|options|see also|summary|usage|synopsis|background|general"
    r"|parameters?|returns?|caveats?|bugs?|details|references?|abstract|conclusions?|contents|preface|prerequisites"
    r"|requirements|limitations?|files|authors?|history|name|syntax|arguments?|output|input|warnings?|tips?|other"
    r"|miscellaneous|resources|further reading|terminology|motivation|design|implementation|configuration|purpose"
    r"|installation|attributes|methods|functions|properties|types?|values?|default|context|environment|standards"
    r"|conforming to|versions|errors?|diagnostics|exit status|return value|compatibility|rationale|discussion"
    r"|what'?s? .*"
    r"|chapter.*|part .*|appendix.*|figure.*|table.*|example.*|step .*|using|basics|features|problem description"
    r"|proposed change|data model impact|alternatives|dependencies|testing|implementation notes|more .*|about .*)",
    re.IGNORECASE,
)
_DANGLING = re.compile(
    r"(?:this|these|those|it|its|they|he|she|here|there|see|for example|for instance|however|also|but|and|or|so|then"
    r"|thus|therefore|the following|as |in this|note|another|both|such|that|like |likewise|similarly|again|now|next"
    r"|first|second|finally|if |we |i |you |your |let's|let |our |otherwise|in addition|above|below|same|instead"
    r"|yes|no)\b",
    re.IGNORECASE,
)
_POINTING = re.compile(
    r"\b(?:this (?:section|chapter|page|document|manual|file|example|tutorial|guide)|(?:described|shown|listed|given"
    r"|see)"
    r" (?:above|below|earlier)|the following|as follows|the (?:above|previous|next) (?:section|example|chapter|table)"
    r"|figure \d|table \d|section \d|chapter \d|https?://)",
    re.IGNORECASE,
)
_AFTER_NOUNS = frozenset(
    "of is are was that which editor manager service utility tool program daemon server interface library".split()
)
_ASKS = re.compile(
    r"(?:wh(?:o|at|en|ere|y|ich)|how|can|could|is|are|do|does|did|should|will|may|must)\b", re.IGNORECASE
)
_VERBS = frozenset(
    """access accept activate add adjust allow allocate analyze append apply archive arrange ask assemble assert assign
    attach authenticate back backup begin bind block boot break bring browse build bump calculate call cancel
    capture cast cause change check choose clean clear clone close collect combine come commit compare compile
    compose compress compute concatenate configure connect construct consult contain control convert coordinate
    copy correct count cover crack create cut daemonize deactivate debug decode decompress decrypt define delete
    describe destroy detach detect determine diff disable disconnect discard display divide do download draw drop
    dump duplicate edit eject emit emulate enable encode encrypt end enforce enter enumerate erase establish
    estimate evaluate examine execute expand expire explain export express extract fetch fill filter find finish
    fix flag flush fold follow force fork format free freeze gather generate get give go grab grant group guess
    handle halt hash help hide hold identify ignore implement import include increment indicate initialize
    initiate insert inspect install interact interpret invoke iterate join keep kill launch lay let limit link
    list listen load locate lock log look lookup list maintain make manage manipulate map mark match measure merge
    migrate minimize modify monitor mount move name normalize notify obtain offer open operate optimize output
    override overwrite pack parse partition paste patch pause perform ping play poll pop populate prepare present
    preserve prevent print process produce prompt protect provide prune publish purge push put query queue raise
    read rebase reboot rebuild receive recompile reconfigure record recover redirect reduce refresh register
    reject release reload remount remove rename render repair repeat replace report request require reset resize
    resolve restart restore restrict resume retrieve return reverse revert rewrite rotate round run sample save
    scan schedule search seek select send separate serve set shorten show shred shuffle shut sign signal simplify
    simulate skip sleep solve sort specify spell split spawn squeeze start stop store stream strip submit
    substitute sum summarize supply suppress suspend switch synchronize tag take tell terminate test time toggle
    touch trace track transfer transform translate traverse trigger trim truncate try tune turn undo unescape
    uncompress unlink unlock unmount unpack unregister unset update upgrade upload use validate verify view visit
    wait wake walk watch wipe wrap write yield""".split()
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A question, its answer, the manual it comes from (package/path) and that document's split."""

    question: str
    answer: str
    source: str
    split: str


def build(data_dir: Path) -> None:
    """Writes `questions.json`, one {"question", "answer", "source", "split"} a line, unless it is there."""
    path = data_dir / "questions.json"
    if path.exists():
        return
    pairs = [*greetings_pairs(), *select(corpus.read_documents(data_dir))]
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for pair in pairs:
            file.write(json.dumps(dataclasses.asdict(pair), ensure_ascii=False) + "\n")


def read(data_dir: Path, split: str = "train") -> list[Pair]:
    """The pairs of a split. Raises `UserError` when they have not been made."""
    path = data_dir / "questions.json"
    if not path.exists():
        raise UserError(f"{path}: not there; make the questions first")
    pairs = [Pair(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]
    return [pair for pair in pairs if pair.split == split]


def encode(data_dir: Path) -> None:
    """Writes `questions.npz` from the training pairs: `tokens` uint16 [N]; `starts` and `answer_starts` int64 [pairs],
    `greeting` bool [pairs].

    A pair is what the chat template makes of the two turns; `answer_starts` are the offsets just after `</think>`.
    """
    if not (data_dir / "questions.npz").exists():
        demo_tokenizer.load(data_dir)  # its error is plainer
        demo_tokenizer.save(data_dir / "questions.npz", **encode_pairs(Tokenizer(data_dir), read(data_dir)))


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
    """The arrays of `questions.npz`."""
    end_of_thought = len(demo_tokenizer.SPECIAL) - 1
    parts, answers = [], []
    for pair in pairs:
        turns = [{"role": "user", "content": pair.question}, {"role": "assistant", "content": pair.answer}]
        ids = tokenizer.encode_chat(turns, add_generation_prompt=False)
        parts.append(np.array(ids, np.uint16))
        answers.append(ids.index(end_of_thought) + 1)
    arrays = demo_tokenizer.packed(parts)
    return arrays | {
        "answer_starts": arrays["starts"] + np.array(answers, np.int64),
        "greeting": np.array([pair.source == GREETINGS for pair in pairs], bool),
    }


def greetings_pairs() -> list[Pair]:
    """Greetings and questions about the model itself, written by hand."""
    return [Pair(question, answer, GREETINGS, "train") for question, answer in greetings()]


def select(documents: Iterator[dict[str, str]]) -> list[Pair]:
    """The pairs of all documents, each question once, at most `LIMITS` of a kind (chosen by hash)."""
    kinds: dict[str, dict[str, Pair]] = {kind: {} for kind in LIMITS}
    known_questions: set[str] = set()
    for document in documents:
        for kind, question, answer in pairs_of(document["package"], document["path"], document["text"]):
            question, answer = question.strip(), answer.strip()
            if question.lower() not in known_questions and _good(question, answer):
                known_questions.add(question.lower())
                source = f"{document['package']}/{document['path']}"
                kinds[kind][question] = Pair(question, answer, source, document["split"])
    result = []
    for kind, pairs in kinds.items():
        chosen = sorted(pairs.values(), key=lambda pair: _number(pair.question, 1 << 60))[: LIMITS[kind]]
        result += chosen
    return sorted(result, key=lambda pair: _number(pair.question + "order", 1 << 60))


def pairs_of(package: str, path: str, text: str) -> Iterator[tuple[str, str, str]]:
    """(kind, question, answer) that a document's paragraphs give."""
    paragraphs = text.split("\n\n")
    if package.startswith("dict-"):
        yield from _words(package, paragraphs)
        return
    name, manual = "", ""
    for index, paragraph in enumerate(paragraphs[:-1]):
        following = paragraphs[index + 1]
        if paragraph.upper() == "NAME":
            name = ""
            if match := re.fullmatch(r"([\w.+:,/ -]{1,80}?) -+ (\S[^\n]{4,160})", following.strip()):
                names = [part.strip() for part in match[1].split(",")]
                name, manual = names[0], path
                yield from _name(names, match[2], paragraphs[index + 2 : index + 40], path)
        elif name and manual == path and re.fullmatch(r"--?\w[^\n]{0,50}", paragraph.strip()):
            yield from _option(name, paragraph.strip(), following)
        elif match := re.fullmatch(
            r"(?:class |static |await )?([A-Za-z_][\w.]+)\(([^\n]{0,80})\)(?: (?:->|→) .*)?", paragraph
        ):
            yield from _function(match[1], following, package)
        elif "\n" not in paragraph and len(paragraph) < 90 and not following.startswith(" "):
            yield from _section(paragraph, following, package)


def _name(names: list[str], short: str, after: list[str], path: str) -> Iterator[tuple[str, str, str]]:
    if any(len(name.split()) > 3 or not name for name in names):
        return
    short = short.rstrip(".")
    name = names[0]
    verb = _verb(short)
    if len(names) > 1 and verb in _VERBS:
        quoted = [f"`{name}`" for name in names[:4]]
        first = f"{', '.join(quoted[:-1])} and {quoted[-1]} {_lower(short)}."
    elif verb in _VERBS:
        first = f"`{name}` {third_person(_lower(short))}."
    else:
        first = f"`{name}`: {short}."
    description = next(
        (after[n + 1] for n, paragraph in enumerate(after[:-1]) if paragraph.upper() in ("DESCRIPTION", "OVERVIEW")), ""
    )
    more = (
        shorten(re.sub(r"^This (?:manual )?page (?:documents|describes)[^.]*\. ", "", description), 60)
        if "\n" not in description and not description.startswith(" ")
        else ""
    )
    more = more if not _POINTING.search(more) else ""
    if more and not re.match(r"[A-Z`'\"]|" + re.escape(name) + r"\b", more):
        more = ""
    answer = f"{first} {more}".strip()
    is_function = bool(re.search(r"/man[23]\w*/|^man[23]/", "/" + path))
    if is_function and re.fullmatch(r"\w+", name):
        forms = ["What does {0} do in C?", "What does the C function {0}() do?", "Explain the function {0}()."]
        if "manpages-dev" not in path and not re.search(r"\.[23](?:\.gz|$)", path):
            forms = ["What does the function {0} do?", "Explain {0}.", "What is {0}?"]
    elif re.search(r"/man[57]\w*/", path) or verb not in _VERBS:
        forms = ["What is {0}?", "Explain {0}.", "Tell me about {0}.", "What is `{0}`?"]
    else:
        forms = [
            "What does {0} do?", "What is the {0} command for?", "What does `{0}` do?", "Explain the {0} command.",
            "What is {0}?", "Tell me about {0}.", "How is {0} used?", "What can I do with {0}?",
        ]  # fmt: skip
    chosen = [forms[0], *sorted(forms[1:], key=lambda form: _number(form + name, 1 << 60))]
    for form in chosen[: 5 if len(forms) > 4 else 2]:
        yield "name", form.format(name), answer


def _option(name: str, option: str, following: str) -> Iterator[tuple[str, str, str]]:
    if not following.startswith("    ") or "\n" in following or following.strip().startswith("-"):
        return
    text = shorten(following.strip(), 50)
    flag = re.split(r"[ ,=\[]", option)[0]
    if not text or len(flag) < 2 or len(text.split()) < 4:
        return
    verb = _verb(text)
    answer = f"`{name} {flag}` {third_person(_lower(text))}" if verb in _VERBS else f"`{name} {flag}`: {text}"
    forms = ["What does the {1} option of {0} do?", "What does `{0} {1}` do?", "What does {1} mean for {0}?"]
    yield "option", forms[_number(name + flag, len(forms))].format(name, flag), answer


def _function(name: str, following: str, package: str) -> Iterator[tuple[str, str, str]]:
    if not following.startswith("    ") or "\n" in following:
        return
    text = shorten(following.strip(), 60)
    verb = _verb(text)
    if "." not in name and package != "python3.11-doc":
        return
    if verb in _VERBS:
        answer = f"`{name}` {third_person(_lower(text))}"
    elif verb.endswith("s") and verb[:-1] in _VERBS:
        answer = f"`{name}` {_lower(text)}"
    else:
        return
    forms = ["What does {0} do?", "What does {0}() do?", "Explain {0}().", "What is {0} for?"]
    yield "function", forms[_number(name, len(forms))].format(name), answer


def _section(heading: str, following: str, package: str) -> Iterator[tuple[str, str, str]]:
    heading = re.sub(
        r"^(?:(?:chapter|appendix|section)\s+)?(?:[A-Z]\.)?\d*(?:\.\d+)*\.?\s+", "", heading, flags=re.I
    ).strip()
    if "\n" in following or not re.match(r"[A-Z`'\"]", following) or len(following) < 60:
        return
    answer = shorten(following, MOST_WORDS)
    if heading.endswith("?"):
        heading = re.sub(r"^(?:Q\w*[:.)] |\(FAQ \w+\) |So )\s*", "", heading)
        answer = re.sub(r"^(?:A|Answer): ", "", answer)
        if (
            3 <= len(heading.split()) <= 14
            and _ASKS.match(heading)
            and not re.match(r"(?:this|these|it|see|as)\b", answer, re.I)
        ):
            yield "question", heading[0].upper() + heading[1:], answer
        return
    words = heading.split()
    if (
        not 1 <= len(words) <= 6
        or not re.fullmatch(r"[A-Za-z`][\w`'+./ -]*[\w`)+]", heading)
        or _BARE.fullmatch(heading)
        or words[0] == "class"
    ):
        return
    if _DANGLING.match(answer) or not _shares_word(heading, answer):
        return
    title = _TITLES.get(package) or ("Debian" if package.startswith(_DEBIAN) else None)
    names = re.match(r"\w*[A-Z_\d.]\w*[A-Z_\d.]|\S*[._]|.* [A-Z]|.*-[A-Z]", heading)  # or a heading in Title Case
    subject = heading if names else _lower(heading)
    if match := re.match(r"how to (.*)", heading, re.I):
        yield "section", f"How do I {match[1]}?" if not title else f"How do I {match[1]} in {title}?", answer
    elif re.match(r"\w+ing\b", heading):
        forms = ["Tell me about {0}.", "What should I know about {0}?", "Explain {0}."]
        question = forms[_number(heading, len(forms))].format(subject)
        yield (
            "section",
            question if not title or title in heading else f"{question[:-1]} in {title}{question[-1]}",
            answer,
        )
    elif words[0].lower() not in _VERBS or len(words) == 1:
        defines = re.match(
            rf"(?:(?:a|an|the) )?\W?{re.escape(heading.rstrip('s'))}\w*\W? (?:is|are|means)\b", answer, re.I
        )
        plural = bool(re.search(r"[a-z]{2}s$", heading)) and not heading.endswith(("ss", "us", "is"))
        if defines:
            forms = ["What are {0}?" if plural else "What is {0}?", "Explain {0}.", "Tell me about {0}."]
            question = forms[_number(heading, len(forms))].format(subject)
            yield "section", question, answer
        if title and title not in heading:
            forms = ["Tell me about {0} in {1}.", "Explain {0} in {1}.", "What should I know about {0} in {1}?"]
            yield "section", forms[_number(heading + package, len(forms))].format(subject, title), answer


def _words(package: str, paragraphs: list[str]) -> Iterator[tuple[str, str, str]]:
    forms = ["What does the word {0} mean?", 'What does "{0}" mean?', "Define {0}.", "What is the meaning of {0}?"]
    terms = ["What is {0}?", "What does {0} mean?", "Explain the term {0}.", 'What does the term "{0}" mean?']
    for paragraph in paragraphs:
        if package == "dict-wn":
            match = re.match(
                r"([A-Za-z][a-z-]+) \((noun|verb|adjective|adverb)\) ?(?:1)?: ([^;:\"0-9]{20,160})(?=[;:]| \d|$)",
                paragraph,
            )
            if match and _number(match[1], 4) == 0:
                question = forms[_number(match[1], len(forms))].format(match[1])
                text = match[3].strip().rstrip(".;,")
                yield "word", question, f'"{match[1].capitalize()}" ({match[2]}): {text}.'
        elif package in ("dict-foldoc", "dict-jargon"):
            word, _, text = paragraph.partition(": ")
            text = re.sub(r"^(?:\[[^\]]*\]|\([^)]*\))\s*", "", text.split("\n")[0].strip())
            answer = shorten(re.sub(r"^\d+\.\s*", "", text), 70)
            if answer and re.match(r"[A-Z]", answer) and len(word.split()) <= 5 and not _DANGLING.match(answer):
                yield "word", terms[_number(word, len(terms))].format(word), f'"{word}": {answer}'


def shorten(text: str, max_words: int) -> str:
    """The first sentences of `text`, at most `max_words` words; empty when the first one is longer or does not end."""
    text = " ".join(text.split())
    result = ""
    for match in re.finditer(
        r".+?(?:(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)(?<!cf)(?<!\b[A-Z]))[.!?][)\"']?(?=\s+[A-Z`'\"(]|$)", text
    ):
        if len((result + match[0]).split()) > max_words:
            break
        result += match[0]
    return result.strip()


def third_person(phrase: str) -> str:
    """`list directory contents` as `lists directory contents`; verbs that go on after "and" or "or" too."""
    first, space, rest = phrase.partition(" ")
    sentence, stop, more = rest.partition(". ")
    also = r"((?:^|(?<=[a-z,] ))(?:and|or|and then|then) )(%s)\b(?! (?:value|status|code|of)\b)"
    sentence = re.sub(
        r"^(\(|/ |(?:and|or) )([a-z]+)\b", lambda m: m[1] + (_conjugated(m[2]) if m[2] in _VERBS else m[2]), sentence
    )
    sentence = re.sub(
        also % "return|print|exit|write|display|create|reconnect|initialize|update|remove|replace",
        lambda m: m[1] + _conjugated(m[2]),
        sentence,
    )
    return _conjugated(first) + space + sentence.replace("and don't", "and does not") + stop + more


def _verb(text: str) -> str:
    """The word that `text` begins with if it can be a verb there: not in "name of ..." or "Name Service Switch"."""
    match = re.match(r"([A-Za-z]+)(?: (\S+))?", text)
    if not match or match[2] in _AFTER_NOUNS:
        return ""
    verb = match[1].lower()
    if match[2] == "for" and verb not in ("search", "wait", "look", "check", "ask", "listen"):
        return ""
    title = bool(re.match(r"[A-Z][a-z]", match[1]) and re.match(r"[A-Z][a-z]", match[2] or ""))
    return (
        ""
        if title and verb in ("name", "process", "display", "list", "log", "file", "image", "time", "sample")
        else verb
    )


def _conjugated(verb: str) -> str:
    if re.search(r"(?:s|x|z|ch|sh|o)$", verb):
        return verb + "es"
    return verb[:-1] + "ies" if re.search(r"[^aeiou]y$", verb) else verb + "s"


def _good(question: str, answer: str) -> bool:
    words = answer.split()
    balanced = answer.count("(") == answer.count(")") and answer.count('"') % 2 == 0
    return (
        4 <= len(words) <= MOST_WORDS + 45
        and bool(re.match(r"[A-Z`\"']", answer))
        and answer[-1] in ".!?"
        and balanced
        and len(question) <= 120
        and not _POINTING.search(answer)
        and len(re.findall(r"\b[A-Z]{1,2}: ", answer)) < 2
        and not re.search(r" [.,](?:\s|$)|[\[\]{}|\\<>]{2,}|\.\.\.|  |_{3,}|[^\x00-\x7f]{2,}|:\.$", answer)
    )


def _shares_word(heading: str, answer: str) -> bool:
    stems = {word[:5].lower() for word in re.findall(r"[A-Za-z]{3,}", heading)} - {
        "the",
        "and",
        "with",
        "from",
        "using",
        "for",
    }
    return any(word[:5].lower() in stems for word in re.findall(r"[A-Za-z]{3,}", answer))


def _lower(text: str) -> str:
    """`text` with a small first letter, unless its first word is a name in capitals."""
    return text[:1].lower() + text[1:] if re.match(r"[A-Z][a-z]*(?:\b|$)(?![A-Z])", text) else text


def _number(text: str, below: int) -> int:
    """A number from 0 to `below` - 1 that depends on `text` alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % below
