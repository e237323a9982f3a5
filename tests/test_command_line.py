"""What the programs of `experiments` share."""

import importlib
import sys
import time
from pathlib import Path

import pytest

from dsv32_jax.common import progress
from dsv32_jax.errors import UserError
from dsv32_jax.experiments import command_line, results

STUDIES = ("plan_reuse", "serving", "step_profile", "quantization_speed")
BENCH = ("layer_profile", "registers", "sweep", "time_peers")
PROGRAMS = (
    "dsv32_jax.experiments.generate_jitted",
    *(f"dsv32_jax.experiments.studies.{name}" for name in STUDIES),
    "tests.soak.__main__",
)


@pytest.mark.parametrize("name", [*PROGRAMS, *(f"dsv32_jax.experiments.bench.{name}" for name in BENCH)])
def test_help_is_the_docstring_as_it_is_written(name, capsys, monkeypatch):
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", ["program", "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    said = capsys.readouterr().out
    assert end.value.code == 0
    for line in module.__doc__.strip().splitlines():
        assert line in said


def test_help_of_several_commands_keeps_their_lines():
    doc = "First.\n\npython -m experiments.x a  # one\npython -m experiments.x b  # two"
    assert command_line.unwrapped(doc).split("\n\n")[1].startswith("\b\npython -m experiments.x a")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("experiments.studies.serving", "python -m experiments.studies.serving"),
        ("tests.soak.__main__", "python -m tests.soak"),
    ],
)
def test_a_program_is_called_as_it_was(name, shown, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", importlib.machinery.ModuleSpec(name, None), raising=False)
    assert command_line.program() == shown
    assert command_line.as_called("see python -m experiments.studies.serving").endswith(
        "dsv32_jax.experiments.studies.serving" if name.startswith("dsv32") else " experiments.studies.serving"
    )


def test_wrong_input_ends_with_one_line(capsys):
    def main():
        raise UserError("--out: wrong")

    with pytest.raises(SystemExit) as end:
        command_line.run(main)
    assert (end.value.code, capsys.readouterr().err) == (2, "error: --out: wrong\n")
    with pytest.raises(SystemExit) as end:
        command_line.run(lambda: 1)
    assert end.value.code == 1


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """The package as a wheel has it: no clone around it."""
    package = tmp_path / "site-packages" / "dsv32_jax" / "experiments"
    package.mkdir(parents=True)
    monkeypatch.setattr(command_line, "__file__", str(package / "command_line.py"))
    return package


def test_an_installed_package_is_not_written_into(installed, tmp_path):
    for path in (installed / "results" / "x.json", installed.parent / "demo", installed.parent / "docs" / "serving.md"):
        with pytest.raises(UserError, match=r"belongs to the installed package; give --out"):
            command_line.writable(path)
    with pytest.raises(UserError, match="installed package"):
        results.write_json(installed / "results" / "x.json", {})
    parser = command_line.parser("A program.")
    parser.add_argument("--out", type=Path, default=installed / "results" / "x.json")
    with pytest.raises(UserError, match="--out"):
        parser.parse_args([])
    assert parser.parse_args(["--out", str(tmp_path / "x.json")]).out == tmp_path / "x.json"
    assert not (installed / "results").exists()


def test_a_clone_is_written_into():
    assert command_line.writable(results.RESULTS / "x.json") == results.RESULTS / "x.json"


def test_a_program_shows_its_progress(monkeypatch, capsys):
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)

    def main():
        for _ in progress.tracked([1, 2], "reading", "files"):
            time.sleep(0.05)

    with pytest.raises(SystemExit):
        command_line.run(main)
    assert capsys.readouterr().err.splitlines()[-1].startswith("reading: 2 of 2 files, ")
    main()
    assert capsys.readouterr().err == ""
