"""`dsv32 serve`: wrong flags end with one line before a model is loaded."""

import sys

import pytest

from dsv32_jax.cli import main
from dsv32_jax.errors import UserError
from dsv32_jax.generate import loading


@pytest.fixture
def refused(capsys, monkeypatch):
    """Runs a command that must fail before it loads a model; returns its one line."""
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("loaded"))

    def run(*arguments):
        with pytest.raises(SystemExit) as exit:
            main(["serve", *map(str, arguments)])
        captured = capsys.readouterr()
        assert (exit.value.code, captured.out) == (2, "") and captured.err.count("\n") == 1, captured.err
        return captured.err

    return run


def test_wrong_flags(refused, tmp_path, monkeypatch):
    assert "temperature: -1.0" in refused("--temperature", -1)
    assert "max_queue: 0; must be at least 1" in refused("--max-queue", 0)
    assert "deadline: nan" in refused("--deadline", "nan")
    assert "api_key: must be printable ASCII, and not empty" in refused("--api-key", "")
    assert f"--metrics-log {tmp_path}: cannot be written" in refused("--metrics-log", tmp_path)
    assert "--host no host, --port 8000: cannot be bound" in refused("--host", "no host")
    monkeypatch.setenv("DSV32_API_KEY", "")
    assert "api_key: must be" in refused()


def test_a_host_that_others_reach(capsys, monkeypatch):
    def load(*_, **__):
        raise UserError("enough")

    monkeypatch.setattr(loading, "load", load)
    for flags, warned in (("--host 0.0.0.0", True), ("--host 0.0.0.0 --api-key x", False), ("--host 127.0.0.1", False)):
        with pytest.raises(SystemExit):
            main(["serve", "--port", "0", *flags.split()])
        assert ("warning: --host 0.0.0.0" in capsys.readouterr().err) == warned


@pytest.mark.parametrize("missing", ["starlette", "uvicorn", "prometheus_client"])
def test_what_is_not_installed(refused, monkeypatch, missing):
    for name in [name for name in sys.modules if name.startswith("dsv32_jax.server")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, name, None)
    assert "is not installed; pip install 'dsv32-jax[serve]'" in refused()


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    assert "Example: dsv32 serve" in capsys.readouterr().out
