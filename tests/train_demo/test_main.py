"""The command line: what it reads, where it writes, and what it says before anything begins."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dsv32_jax.errors import UserError
from dsv32_jax.experiments import command_line
from dsv32_jax.experiments.train_demo import corpus, stages
from tests.harness import TEXT

main = importlib.import_module("dsv32_jax.experiments.train_demo.__main__")
COMMANDS = ("data", "export", "evaluate", "report")


@pytest.fixture
def started_runs(monkeypatch, tmp_path):
    """Runs that were begun, in an empty folder, but that train nothing."""
    runs = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages.Training, "train", lambda self, *arguments: runs.append((self, arguments)))
    monkeypatch.setattr(stages.Training, "tell_end", lambda self, params: None)
    return runs


def run(*arguments):
    result = CliRunner().invoke(main.app, arguments)
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_tiny_begins_without_anything_prepared(started_runs):
    output = run("--size", "tiny")
    [(training, arguments)] = started_runs
    assert training.folder == Path(".train/tiny") and training.data == Path(".train/tiny/data")
    assert arguments == (None, None, None)
    assert [stage.name for stage in training.stages][-1] == "chat"
    assert "million parameters" in output and ".train/tiny" in output


def test_a_text_has_a_run_of_its_own(started_runs, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT * 8)
    (tmp_path / "b.txt").write_text(TEXT[::-1])
    run("--size", "tiny", "--text", "a.txt", "--text", "b.txt", "--tokenizer", "own")
    assert started_runs[0][0].folder == Path(".train/tiny-text")
    with pytest.raises(UserError, match="holds a run on another text"):
        run("--size", "tiny", "--text", "a.txt")
    with pytest.raises(UserError, match=r"holds another run .*seed 0.*asked for is .*seed 1"):
        run("--size", "tiny", "--text", "a.txt", "--text", "b.txt", "--tokenizer", "own", "--seed", "1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "huge"], "--size huge: unknown; it is one of demo, tiny"),
        (["--size", "tiny", "--until", "end"], "stage end: unknown; it is one of pretrain"),
        (["--size", "tiny", "--from", "x"], "--from and --first"),
        (["--size", "tiny", "--text", "a", "--data", "b"], "--text and --data"),
        (["--size", "tiny", "--tokenizer", "own"], "--tokenizer: is for --text"),
        ([], r"\.data/train\.npz does not exist; .* data` makes it.*--text FILE"),
        (["--size", "tiny", "--data", "elsewhere"], r"elsewhere/train\.npz does not exist"),
        (["export", "--size", "tiny"], "--out: must be given"),
        (["export", "--stage", "end"], "stage end: unknown"),
    ],
)
def test_a_refusal_leaves_nothing_behind(arguments, message, started_runs, tmp_path):
    with pytest.raises(UserError, match=message):
        run(*arguments)
    assert not started_runs and list(tmp_path.iterdir()) == []


def test_missing_programs_and_packages_are_all_named_before_anything_begins(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(command_line.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        run("data", "--data", str(tmp_path / "new"))
    for name in ("apt-get", "dpkg-deb", "mandoc", "pod2text", "lxml", "pip install 'dsv32-jax[train]'", "apt install"):
        assert name in str(caught.value)
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match=r"training: missing are optax \(pip install 'dsv32-jax\[train\]'"):
        run("--size", "tiny", "--run", str(tmp_path / "new"))


def test_a_download_that_fails_is_not_a_package_that_does_not_exist(monkeypatch, tmp_path):
    def failing(error):
        done = subprocess.CompletedProcess([], 100, "", error)
        monkeypatch.setattr(corpus.subprocess, "run", lambda *_, **__: done)
        return corpus._download(corpus.Package("grep"), tmp_path)

    assert failing("E: Unable to locate package grep\n") is None
    with pytest.raises(UserError, match="apt-get download grep: E: Failed to fetch http://x"):
        failing("W: slow\nE: Failed to fetch http://x\n")


def test_help_lists_the_commands_line_by_line():
    lines = run("--help").splitlines()
    for command in COMMANDS:
        assert sum(f" {command} " in f"{line} " and "python -m" in line for line in lines) == 1
    assert any(
        line.strip().startswith("python -m") and "--size tiny" in line and "--text" not in line for line in lines
    )


@pytest.mark.slow
def test_tiny_trains_in_a_clean_clone(tmp_path):
    root = Path(__file__).parents[2]
    shutil.copytree(root / "experiments", tmp_path / "experiments", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "experiments.train_demo", "--size", "tiny", "--until", "pretrain"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / ".train/tiny/pretrain/model.safetensors").exists()
    assert "held-out text:" in done.stdout
