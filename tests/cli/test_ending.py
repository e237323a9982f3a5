"""The ends of commands: closed streams, interrupts, surroundings that lack something."""

import io
import json
import os
import pwd
import subprocess
import sys

import jax
import pytest

from dsv32_jax import convert
from dsv32_jax.cli import main
from dsv32_jax.common.files import home_directory
from dsv32_jax.generate import loading
from dsv32_jax.generate.language_model import LanguageModel, Piece

COMMAND = (sys.executable, "-m", "dsv32_jax.cli")


def shell(line, **options):
    """A command line of a shell in which `dsv32` is this package's; with its standard streams as bytes."""
    line = f'dsv32() {{ "{sys.executable}" -m dsv32_jax.cli "$@"; }}; {line}'
    return subprocess.run(["bash", "-c", line], capture_output=True, timeout=120, **options)


# ---- streams ----


def test_a_reader_that_leaves_ends_a_command_quietly():
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([*COMMAND, "--help"], stdout=write, stderr=subprocess.PIPE, timeout=120)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, b"")


def test_a_reader_that_leaves_ends_a_text(dsv32, tiny, monkeypatch):
    def closed(*_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("typer.echo", closed)
    assert dsv32("tokenize", "--model", tiny, "a") == (141, "", "")


@pytest.mark.parametrize("closed", [">&-", "<&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_streams(closed):
    result = shell(f"dsv32 --version {closed}")
    assert result.returncode == 0 and result.stderr == b""
    assert (result.stdout == b"") == (">&- " in closed + " " and "2>&-" != closed)
    result = shell(f"dsv32 generate --no-such-flag {closed}")
    assert (result.returncode, result.stdout) == (2, b"")


def test_a_full_disk(monkeypatch):
    result = shell("dsv32 --version > /dev/full")
    assert (result.returncode, result.stderr) == (2, b"error: output: No space left on device\n")


def test_an_output_without_the_characters(monkeypatch, tiny):
    def output_of(*options):
        out = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="latin-1"))
        with pytest.raises(SystemExit, match="0"):
            main(["tokenize", "--model", tiny, *options])
        return out.getvalue()

    text = json.loads(output_of("海é", "--json"))
    assert text["text"] == "海é"
    assert output_of("--decode", *map(str, text["ids"])) == b"\\u6d77\xe9\n"


def test_files_whose_names_are_no_text(dsv32, refused, tiny, tmp_path):
    name = os.fsdecode(bytes(tmp_path) + b"/caf\xe9.txt")
    assert r"--text-file" in refused("score", "--model", tiny, "--text-file", name)
    with open(name, "w") as file:
        file.write("The keeper")
    assert dsv32("tokenize", "--model", tiny, "--text-file", name)[0] == 0


# ---- arguments ----


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("generate", "--prompt", "caf\udce9"), "--prompt"),
        (("generate", "--prompt", "good", "--prompt", "\udcff"), "--prompt"),
        (("generate", "--prompt", "a", "--system", "\udcff"), "--system"),
        (("chat", "--system", "\udcff"), "--system"),
        (("generate", "--model", "\udcff", "--prompt", "a"), "--model"),
        (("tokenize", "\udcff"), "TEXT"),
        (("convert", "\udcff", "out"), "SRC"),
        (("convert", "demo", "\udcff"), "DST"),
        (("quantize", "--scheme", "int8", "--out", "\udcff"), "--out"),
        (("fidelity", "demo", "\udcff"), "B"),
        (("info", "--config", "\udcff"), "--config"),
        (("serve", "--name", "\udcff"), "--name"),
        (("serve", "--host", "\udcff"), "--host"),
        (("serve", "--api-key", "\udcff"), "--api-key"),
    ],
)
def test_bytes_that_are_no_utf8_are_refused_by_flag(refused, arguments, named):
    assert refused(*arguments).startswith(f"error: {named}: not UTF-8")


def test_a_key_that_is_no_text(refused, tiny, monkeypatch):
    monkeypatch.setenv("DSV32_API_KEY", "\udcff")
    assert "DSV32_API_KEY" in refused("serve", "--model", tiny)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("generate", "--no-such-flag"), "--no-such-flag (see `dsv32 generate --help`)"),
        (("generat",), "(see `dsv32 --help`)"),
        (("generate", "--seed", "x"), "'--seed'"),
        (("convert", "demo"), "DST"),
    ],
)
def test_a_wrong_command_line_takes_one_line(refused, arguments, named):
    assert named in refused(*arguments)


# ---- surroundings ----


def test_a_platform_that_jax_has_not(tmp_path):
    result = shell("JAX_PLATFORMS=cuda dsv32 convert demo out", cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.count(b"\n") == 1
    assert result.stderr.startswith(b"error: JAX_PLATFORMS=cuda: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", [AssertionError(), RuntimeError("Unable to initialize backend 'x': (set JAX_PLATFORMS='')")]
)
@pytest.mark.parametrize("name", ["JAX_PLATFORMS", "JAX_PLATFORM_NAME"])
def test_the_variable_that_asks_for_a_platform_is_named(refused, monkeypatch, error, name):
    def fails():
        raise error

    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv(name, "x")
    monkeypatch.setattr(jax, "devices", fails)
    assert f"{name}=x: " in refused("info")


@pytest.fixture
def cache_directory():
    """JAX's setting, unset as in a process of a user; it is restored afterwards."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield lambda: jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", before)


def no_user(monkeypatch):
    def unknown(id):
        raise KeyError(id)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_a_model_is_loaded_without_a_home(monkeypatch, tiny, cache_directory, refused):
    no_user(monkeypatch)
    with pytest.warns(UserWarning, match="no cache of compiled programs: ~: no home"):
        loading.load(tiny)
    assert cache_directory() is None
    assert "~/model: no such home directory" in refused("info", "--model", "~/model")


@pytest.mark.parametrize("home", ["", "relative", "absent", "file"])
def test_a_model_is_loaded_with_a_home_that_is_none(monkeypatch, tiny, tmp_path, cache_directory, home):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", home if home in ("", "relative") else str(tmp_path / home))
    with pytest.warns(UserWarning, match="JAX_COMPILATION_CACHE_DIR"):
        loading.load(tiny)
    assert cache_directory() is None
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_model_is_loaded_where_the_cache_cannot_be_written(monkeypatch, tiny, tmp_path, cache_directory):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".cache").touch()
    with pytest.warns(UserWarning, match=r"\.cache"):
        loading.load(tiny)
    assert cache_directory() is None


def test_programs_are_kept_in_the_home(monkeypatch, tiny, tmp_path, cache_directory):
    monkeypatch.setenv("HOME", str(tmp_path))
    loading.use_compilation_cache()
    assert cache_directory() == str(home_directory() / ".cache" / "dsv32-jax")


# ---- interrupts ----

VERBS = {
    "generate": ("--prompt", "a"),
    "chat": (),
    "score": ("--text-file", "text.txt"),
    "tokenize": ("a",),
    "info": (),
    "convert": ("demo", "out"),
    "quantize": ("--scheme", "int8", "--out", "out"),
    "fidelity": ("--text-file", "text.txt"),
    "serve": ("--port", "0"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_an_interrupt_ends_any_verb_with_one_line(dsv32, monkeypatch, tmp_path, verb):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a text")
    monkeypatch.setattr(loading, "find", interrupt)
    assert dsv32(verb, *VERBS[verb]) == (130, "", "interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_an_interrupted_run_leaves_no_half_written_file(dsv32, monkeypatch, tiny, tmp_path):
    def two_tokens(*_, **__):
        yield Piece(0, 5, "x")
        raise KeyboardInterrupt

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(LanguageModel, "warmup", lambda *_: 0)
    monkeypatch.setattr(LanguageModel, "stream", two_tokens)
    monkeypatch.setattr(LanguageModel, "score", interrupt)
    (tmp_path / "out.npy").write_text("old")
    run = ("generate", "--model", tiny, "--prompt", "a", "--save-tokens", tmp_path / "out.npy")
    assert dsv32(*run) == (130, "x", "interrupted\n")
    (tmp_path / "text.txt").write_text("a text")
    run = ("score", "--model", tiny, "--text-file", tmp_path / "text.txt", "--save-logits", tmp_path / "out.npy")
    assert dsv32(*run) == (130, "", "interrupted\n")
    assert (tmp_path / "out.npy").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npy", "text.txt"]


def test_an_interrupted_conversion_leaves_nothing_that_loads(dsv32, refused, monkeypatch, tiny, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert.conversion, "copy_files", interrupt)
        assert dsv32("convert", tiny, tmp_path / "out") == (130, "", "interrupted\n")
    assert not (tmp_path / "out").exists()
    assert dsv32("convert", tiny, tmp_path / "out")[0] == 0
