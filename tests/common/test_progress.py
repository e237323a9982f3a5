"""The progress that is shown while a task takes long."""

import contextlib
import os
import pty
import sys
import threading
import time

import pytest

from dsv32_jax import convert
from dsv32_jax.common import progress
from dsv32_jax.common.progress import progress_bar
from dsv32_jax.convert import calibration, conversion
from dsv32_jax.engine import engine
from dsv32_jax.generate import compiling, language_model, windows
from dsv32_jax.generate.compiling import all_at_once
from dsv32_jax.generate.loading import load
from tests.harness import read_until


@pytest.fixture
def at_once(monkeypatch):
    """Every task is shown, however short it is."""
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 0.01)
    with progress.shown():
        yield


def wait_for_a_line(capsys):
    """Returns the text on standard error as soon as there is any."""
    for _ in range(3000):
        if err := capsys.readouterr().err:
            return err
        time.sleep(0.01)
    pytest.fail("no line")


def test_nothing_is_shown_unless_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
    with progress_bar("loading", 2, "files") as advance:
        advance(1)
        assert not [thread for thread in threading.enumerate() if thread.name == "dsv32-progress"]
    assert capsys.readouterr().err == ""


def test_lines_where_there_is_no_terminal(at_once, capsys):
    with progress_bar("reading", 3, "files") as advance:
        advance(1)
        assert wait_for_a_line(capsys).startswith(("reading: 0 of 3 files, ", "reading: 1 of 3 files, "))
        advance(1)
    assert capsys.readouterr().err.splitlines()[-1].startswith("reading: 3 of 3 files, ")


def test_bytes_have_units(at_once, capsys):
    with progress_bar("loading x", 12_000_000) as advance:
        advance(3_000_000)
        wait_for_a_line(capsys)
    assert "loading x: 12.0 MB of 12.0 MB, " in capsys.readouterr().err


def test_what_is_short_is_not_shown(capsys):
    with progress.shown(), progress_bar("loading", 2, "files") as advance:
        advance(2)
    assert capsys.readouterr().err == ""


def test_a_task_that_fails_does_not_end_at_100_percent(at_once, capsys):
    with pytest.raises(KeyboardInterrupt), progress_bar("reading", 3, "files"):
        wait_for_a_line(capsys)
        raise KeyboardInterrupt
    assert "3 of 3" not in capsys.readouterr().err
    assert not [thread for thread in threading.enumerate() if thread.name == "dsv32-progress"]


def test_one_task_at_a_time_is_shown(at_once, capsys):
    with progress_bar("outer", 1, "steps"):
        with progress_bar("inner", 1, "steps") as advance:
            advance(1)
            wait_for_a_line(capsys)
    assert "inner" not in capsys.readouterr().err


def test_a_bar_on_a_terminal_reaches_100_percent_and_leaves_the_screen(at_once, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    leader, follower = pty.openpty()
    with open(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with progress_bar("loading demo", 20) as advance:
            advance(10)
            read_until(leader, b"50%")
        # The cursor is back, and the bar's line is erased.
        assert b"100%" in read_until(leader, b"\x1b[?25h\r\x1b[1A\x1b[2K")
    os.close(leader)


def test_programs_that_are_compiled_are_counted(at_once, capsys):
    lines = []
    assert all_at_once([lambda: lines.append(wait_for_a_line(capsys)), lambda: 2]) == [None, 2]
    assert lines[0].startswith("compiling: ") and " of 2 programs, " in lines[0]
    assert capsys.readouterr().err.splitlines()[-1].startswith("compiling: 2 of 2 programs, ")


def test_a_program_that_fails_ends_the_others_wait():
    allowed, ended = threading.Event(), threading.Event()

    def interrupted():
        raise KeyboardInterrupt

    def slow():
        allowed.wait(60)
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        all_at_once([interrupted, slow])
    assert not ended.is_set()
    allowed.set()


# ---- what takes long ----


@pytest.fixture
def bars(monkeypatch):
    """[title, total, unit, units done] of each task of these modules."""
    seen = []

    @contextlib.contextmanager
    def bar(title, total, unit="bytes"):
        entry = [title, total, unit, 0]
        seen.append(entry)

        def advance(count):
            entry[-1] += count

        yield advance

    for module in (conversion, calibration, compiling, engine, language_model, windows):
        monkeypatch.setattr(module, "progress_bar", bar)
    return seen


def test_loading_and_converting_are_shown_to_their_end(bars, tiny, tmp_path):
    convert.load_hf(tiny)
    convert.convert(tiny, tmp_path / "orbax")
    convert.load_orbax(tmp_path / "orbax")
    assert [entry[0] for entry in bars] == ["loading model", "converting model", "loading orbax"]
    assert all(unit == "bytes" and done == total > 100_000 for _, total, unit, done in bars)


def test_calibration_is_shown(bars, tiny, monkeypatch):
    monkeypatch.setattr(calibration, "_summed", lambda *_: {})
    calibration.calibrate(load(tiny), [[1, 2], [3, 4], [5, 6]])
    assert bars[1:] == [["calibrating", 3, "windows", 3]]


def test_the_programs_and_first_steps_of_an_engine_are_shown(bars, tiny, monkeypatch):
    warm = engine.Engine(load(tiny), cache_tokens=64)
    shapes = len(warm.shapes())
    monkeypatch.setattr(warm, "programs", lambda: [int] * shapes)
    monkeypatch.setattr(warm, "_start", lambda *_: None)
    assert warm.warmup() == shapes
    (_, *programs, _), (title, steps, _, done) = bars[1:]
    assert programs == [shapes, "programs"]
    assert (title, done) == ("warming up", steps) and steps > shapes


def test_the_programs_and_tokens_of_generate_are_shown(bars, tiny, monkeypatch):
    lm = load(tiny)
    monkeypatch.setattr(lm, "programs", lambda *_: [int, int])
    assert lm.warmup([3], 2) == 2
    monkeypatch.setattr(lm, "_decode", lambda *_: iter([[5], [6]]))
    lm.generate([1, 2], 2)
    assert bars[1][:3] == ["compiling", 2, "programs"]
    assert bars[2] == ["generating", 2, "tokens", 2]
