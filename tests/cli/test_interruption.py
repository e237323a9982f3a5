"""Ctrl-C ends a command, even where its exception is lost."""

import _imp
import contextlib
import gc
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from importlib.machinery import ExtensionFileLoader, ModuleSpec

import pytest
import typer

from dsv32_jax.cli import ending, main
from dsv32_jax.cli.interruption import PAUSE, Interruption
from dsv32_jax.errors import UserError
from dsv32_jax.generate import loading


def interrupt(*_):
    signal.raise_signal(signal.SIGINT)


class Destroyed:
    def __del__(self):
        interrupt()


def in_a_callback_of_the_garbage_collector():
    gc.callbacks.append(interrupt)
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(interrupt)


def in_a_callback_of_a_weak_reference():
    target = threading.Event()
    reference = weakref.ref(target, interrupt)
    del target
    assert reference() is None


def in_an_import():
    try:
        try:
            interrupt()
        except KeyboardInterrupt:
            raise ImportError("Encountered an error while initializing the extension") from None
    except ImportError:
        pass


def in_a_library():
    with contextlib.suppress(BaseException):
        interrupt()


LOST = (
    in_a_callback_of_the_garbage_collector,
    in_a_callback_of_a_weak_reference,
    lambda: Destroyed() and None,
    in_an_import,
    in_a_library,
)


@pytest.fixture
def hooks_of_python(monkeypatch):
    """Python's own hooks, which print, instead of pytest's."""
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)


@pytest.mark.parametrize("lose", LOST)
def test_a_lost_interrupt_ends_the_command(dsv32, monkeypatch, hooks_of_python, lose):
    def find(*_):
        lose()
        time.sleep(10)
        pytest.fail("ran on")

    monkeypatch.setattr(loading, "find", find)
    assert dsv32("info") == (130, "", "interrupted\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert (sys.unraisablehook, threading.excepthook) == (sys.__unraisablehook__, threading.__excepthook__)


def test_an_interrupt_is_repeated_until_it_is_heeded(capsys):
    def command():
        for _ in range(3):
            with contextlib.suppress(KeyboardInterrupt):
                interrupt() if not times else time.sleep(10)
            times.append(1)
        time.sleep(10)

    times = []
    assert ending.code_of(command) == 130
    assert len(times) == 3
    time.sleep(2 * PAUSE)  # nothing comes after the end


@pytest.mark.parametrize(("call", "method"), [("create_dynamic", "create_module"), ("exec_dynamic", "exec_module")])
def test_a_module_in_c_is_not_broken_off(monkeypatch, capsys, call, method):
    """Some of JAX's modules abort the process when they are interrupted."""

    def command():
        loader = ExtensionFileLoader("module", "module.so")
        with monkeypatch.context() as patch:
            patch.setattr(_imp, call, interrupt)
            getattr(loader, method)(ModuleSpec("module", loader, origin="module.so"))
        ended.append(1)
        time.sleep(10)
        ended.append(2)

    ended = []
    assert ending.code_of(command) == 130
    assert ended == [1]


@pytest.mark.parametrize(
    "error",
    [
        ImportError("Encountered an error while initializing the extension"),
        RuntimeError("cannot schedule new futures after shutdown"),
        UserError("demo: no such model"),
        OSError(5, "Input/output error"),
        BrokenPipeError(32, "Broken pipe"),
        typer.Exit(1),
        SystemExit(0),
        None,
    ],
)
def test_what_an_interrupt_became_is_reported_as_the_interrupt(capsys, error):
    def command():
        in_a_library()
        if error is not None:
            raise error

    assert ending.code_of(command) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_what_complains_after_an_interrupt_is_not_shown(capsys, hooks_of_python):
    class Complains:
        def __del__(self):
            raise RuntimeError("has lost its pool")

    def complain():
        Complains()
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()

    def command():
        try:
            interrupt()
        finally:
            complain()

    assert ending.code_of(command) == 130
    assert capsys.readouterr() == ("", "interrupted\n")
    assert ending.code_of(complain) == 0
    assert {"RuntimeError: has lost its pool", "ZeroDivisionError: division by zero"} <= set(
        capsys.readouterr().err.splitlines()
    )


def test_the_handler_of_another_program_stays():
    calls = []
    before = signal.signal(signal.SIGINT, lambda *_: calls.append(1))
    try:
        handler = signal.getsignal(signal.SIGINT)
        with Interruption() as interruption:
            interruption.run(interrupt)
        assert calls == [1] and signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_command_runs_in_a_thread_that_gets_no_signals(capsys):
    def run():
        with pytest.raises(SystemExit) as exit:
            main(["--version"])
        codes.append(exit.value.code or 0)

    codes = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert codes == [0]


def test_an_interrupted_process_waits_for_no_thread_and_shows_no_complaint():
    program = """
        import atexit, signal, threading, time
        from dsv32_jax import cli
        def run(argv):
            threading.Thread(target=time.sleep, args=(60,)).start()
            atexit.register(lambda: 1 / 0)
            signal.raise_signal(signal.SIGINT)
        cli._run = run
        cli.main()
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, timeout=30)
    assert (result.returncode, result.stdout, result.stderr) == (130, b"", b"interrupted\n")
