"""Shared by the programs of this folder: help texts, errors of one line, checks for missing extras."""

import argparse
import importlib.util
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dsv32_jax.common import progress
from dsv32_jax.errors import UserError

CLONE = "experiments"
"""The name of this package in a clone; elsewhere it is `dsv32_jax.experiments`."""


def program() -> str:
    """The command that started this process, for instance `python -m experiments.studies.serving`."""
    name = getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", None) or ""
    return f"python -m {name.removesuffix('.__main__') if name.rpartition('.')[0] else CLONE}"


def as_called(text: str) -> str:
    """The text with `python -m experiments...` replaced by the name that the package has here."""
    installed = f"dsv32_jax.{CLONE}"
    return text.replace(f"-m {CLONE}.", f"-m {installed}.") if installed in program() else text


class Parser(argparse.ArgumentParser):
    """A parser that refuses to write an `--out` into the installed package, before anything is measured."""

    def parse_args(self, *words: Any, **named: Any) -> Any:
        arguments = super().parse_args(*words, **named)
        if getattr(arguments, "out", None) is not None:
            writable(arguments.out)
        return arguments


def parser(text: str | None) -> Parser:
    """A parser whose help begins with a module's docstring, line by line."""
    return Parser(
        prog=program(), description=as_called(text or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )


def unwrapped(text: str | None) -> str:
    """A docstring as the help of a typer application, whose paragraphs keep their lines."""
    return "\n\n".join(f"\b\n{paragraph}" for paragraph in as_called(text or "").strip().split("\n\n"))


def writable(path: Path) -> Path:
    """`path`; raises UserError for one in an installed package: results, pages and the demo model are a clone's."""
    root = Path(__file__).resolve().parents[1]
    if path.resolve().is_relative_to(root) and not (root / "pyproject.toml").exists():
        raise UserError(
            f"{path}: belongs to the installed package; give --out where there is one, or run this in a clone"
        )
    return path


def run(main: Callable[[], Any]) -> None:
    """Runs a program and shows its progress. Wrong input ends it with one line and exit code 2, and Ctrl-C with 130."""
    try:
        with progress.shown():
            code = main()
        sys.exit(code)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def require(
    user: str, *modules: str, extra: str, programs: Mapping[str, str] | None = None, paths: str | None = None
) -> None:
    """Raises UserError that names every module and program that is missing, and how to install them.

    Args:
      user: the name of what needs them.
      modules: of Python, all in one extra of this project.
      extra: its name.
      programs: the Debian package of each program.
      paths: where to look for programs; the environment's where None.
    """
    missing_modules = [name for name in modules if importlib.util.find_spec(name) is None]
    programs = programs or {}
    missing_programs = [name for name in programs if shutil.which(name, path=paths) is None]
    messages = []
    if missing_modules:
        command = f"pip install 'dsv32-jax[{extra}]', in a clone pip install -e '.[{extra}]'"
        messages.append(f"{', '.join(missing_modules)} ({command})")
    if missing_programs:
        packages = " ".join(dict.fromkeys(programs[name] for name in missing_programs))
        messages.append(f"the programs {', '.join(missing_programs)} (on Debian: apt install {packages})")
    if messages:
        raise UserError(f"{user}: missing are {' and '.join(messages)}")
