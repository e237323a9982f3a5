"""What is installed, also beside a user's folders of the same names, and which `.venv` `make setup` takes as it is."""

import fnmatch
import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {"dsv32_jax": ROOT / "dsv32_jax", "dsv32_jax.experiments": ROOT / "experiments"}
PYTHON = """#!/bin/sh
case "$*" in
  --version) echo Python {version} ;;
  "-m venv --clear .venv") rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo made by {version} ;;
  -m*) ;;
  *"import pip"*) exit {lacks_pip} ;;
  -c*) exit {old} ;;
esac
"""


def test_every_file_that_is_read_is_installed():
    patterns = SETTINGS["tool"]["setuptools"]["package-data"]
    for package, folder in FOLDERS.items():
        tracked = [file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
        names = [file.relative_to(folder).as_posix() for file in tracked if file.suffix not in (".py", ".png")]
        assert names
        assert [name for name in names if not any(fnmatch.fnmatch(name, p) for p in patterns[package])] == []


def test_an_older_python_is_refused_before_a_version_of_jax_is_looked_for():
    """pip collects what a project needs before it says that Python is too old."""
    project = SETTINGS["project"]
    pinned = [*project["dependencies"], *project["optional-dependencies"]["cuda"]]
    pinned = [line for line in pinned if line.startswith(("jax>", "jax[", "flax"))]
    assert len(pinned) == 3 and all(line.endswith("; python_version>='3.12'") for line in pinned)
    assert project["requires-python"] == ">=3.12"


def own_folders(folder: Path) -> Path:
    """A folder in which everything of ours has a namesake."""
    for name in ("experiments", "convert"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise RuntimeError('somebody else's')")
    (folder / "convert.py").write_text("raise RuntimeError('somebody else's')")
    return folder


def test_a_users_own_folders_are_never_in_the_way(tmp_path):
    code = """
import runpy, sys
import dsv32_jax.convert, dsv32_jax.generate.loading
from dsv32_jax.experiments.studies import held_out
assert held_out.documents()
assert not {"experiments", "convert"} & set(sys.modules)
sys.argv = ["program", "--help"]
runpy.run_module("dsv32_jax.experiments.train_demo", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=own_folders(tmp_path), capture_output=True, text=True)
    assert (done.returncode, "Commands:" in done.stdout) == (0, True), done.stderr


@pytest.mark.parametrize(
    ("present", "said"),
    [
        (None, ["made by 3.14.0"]),
        ("3.13.0", []),
        ("3.11.7", [".venv is half made or of a Python older than 3.12: it is made anew", "made by 3.14.0"]),
        ("half", [".venv is half made or of a Python older than 3.12: it is made anew", "made by 3.14.0"]),
    ],
)
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_setup_takes_the_newest_python_and_no_broken_environment(present, said, tmp_path):
    def interpreter(path, version):
        path.parent.mkdir(parents=True, exist_ok=True)
        old = int(version.startswith("3.11"))
        path.write_text(PYTHON.format(version=version, old=old, lacks_pip=old))
        path.chmod(0o755)

    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    interpreter(tmp_path / "bin" / "python3.14", "3.14.0")
    interpreter(tmp_path / "bin" / "python3.12", "3.12.0")
    if present == "half":
        (tmp_path / ".venv" / "bin").mkdir(parents=True)
    elif present:
        interpreter(tmp_path / ".venv" / "bin" / "python", present)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["make", "setup"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith((".venv is half", "made by"))] == said
    assert (tmp_path / ".venv" / ".setup-done").exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of the files that git knows. Needs the network, for setuptools, and git."""
    folder = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", "-w", folder]
    subprocess.run([*pip, folder / "source"], check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_two_packages_and_runs_beside_a_users_own(wheel, tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet"]
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
        assert {name for name in tops if not name.endswith(".dist-info")} == {"dsv32_jax", "pallas_kernels"}
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    (tmp_path / "user").mkdir()
    folder, environment = own_folders(tmp_path / "user"), os.environ | {"PYTHONPATH": str(site)}

    def run(*arguments):
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    where = run("-c", "import dsv32_jax, pallas_kernels; print(dsv32_jax.__file__, pallas_kernels.__file__)")
    assert where.stdout.count(str(site)) == 2, where
    for module in ("train_demo", "studies.quantization", "studies.serving"):
        assert run("-m", f"dsv32_jax.experiments.{module}", "--help").returncode == 0, module
    verb = "from dsv32_jax.cli import main; main()"
    assert "parameters" in run("-c", verb, "info", "--model", "demo").stdout
    refused = run("-m", "dsv32_jax.experiments.studies.serving_report")
    assert refused.returncode == 2 and "belongs to the installed package" in refused.stderr


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_of_its_own(wheel, tmp_path):
    """A new environment elsewhere; what the project depends on is seen from the environment that runs this test."""
    environment = tmp_path / "environment"
    venv.create(environment)
    (site,) = environment.glob("lib/python*/site-packages")
    # A line of a .pth file adds a folder, but does not obey the .pth files in it, by which a clone is installed.
    folders = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "dependencies.pth").write_text("\n".join(folders))
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", python, "install", "--no-deps"]
    subprocess.run([*pip, wheel], check=True)
    (tmp_path / "user").mkdir()
    folder = own_folders(tmp_path / "user")
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert str(site) in run(python, "-c", "import dsv32_jax; print(dsv32_jax.__file__)")
    prompt = ("--prompt", "To install a package on Debian, you", "--max-new-tokens", "4")
    dsv32 = environment / "bin" / "dsv32"
    result = json.loads(run(dsv32, "generate", *prompt, "--temperature", "0", "--json"))
    assert len(result["tokens"][0]) == 4
    assert run(python, "-m", "dsv32_jax", "--version") == run(dsv32, "--version")
    lines = run(python, "-m", "dsv32_jax.experiments.generate_jitted", *prompt, "--temperature", "0").splitlines()
    assert lines[0] == result["texts"][0] and lines[-1] == "tokens that differ: 0 of 4"
