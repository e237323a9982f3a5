"""Ends a command: exit codes, and streams that are closed.

| code | |
|---|---|
| 0 | all went well |
| 1 | `bench`: a shape failed; `serve`: the engine's thread ended |
| 2 | wrong input, or a file that cannot be read or written: one line, `error: ...` |
| 130 | interrupted by Ctrl-C |
| 141 | the reader of the output has gone, as in `dsv32 generate | head -1` |
"""

import contextlib
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import NoReturn, TextIO

from dsv32_jax.cli.interruption import Interruption
from dsv32_jax.errors import CheckpointWarning, SurroundingsWarning, UserError

__all__ = ["code_of", "end_process", "prepare_process"]

WRONG, INTERRUPTED, PIPE_CLOSED = 2, 130, 141


def code_of(command: Callable[[], None]) -> int:
    """Runs a command, and prints its error; returns its exit code."""
    with Interruption() as interruption:
        return _code_of(lambda: interruption.run(command))


def _code_of(command: Callable[[], None]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names of files may hold any bytes, and a terminal may lack the characters of a text.
            stream.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            command()
        sys.stdout.flush()
        return 0
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
    except KeyboardInterrupt:
        with _interrupts_ignored():  # a second Ctrl-C must not break off the last line
            print_line("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        return PIPE_CLOSED
    except UserError as error:
        return report_error(str(error))
    except OSError as error:
        return report_error(f"{error.filename or 'output'}: {error.strerror or error}")
    except Exception as error:
        if (code := _code_of_typer(error)) is not None:
            return code
        raise
    finally:
        _flush()


def report_error(message: str) -> int:
    print_line("error: " + " ".join(message.split()))
    return WRONG


def print_line(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the stream is closed
        print(line, file=sys.stderr, flush=True)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Prints a warning as one line; those about files and surroundings have no place in the code."""
    about_surroundings = issubclass(category, CheckpointWarning | SurroundingsWarning)
    text = str(message) if about_surroundings else f"{filename}:{lineno}: {category.__name__}: {message}"
    print_line("warning: " + " ".join(text.split()))


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Within it, Ctrl-C is ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _code_of_typer(error: Exception) -> int | None:
    """The exit code of `typer.Exit`, or of an error of typer's, whose message is printed as one line; None for other
    errors.

    Attributes tell the types, since Ctrl-C must work before typer is imported.
    """
    if not hasattr(error, "exit_code"):
        return None
    if not hasattr(error, "format_message"):
        return error.exit_code
    message = error.format_message()
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        print_line(message)
        return error.exit_code
    hint = "" if context is None else f" (see `{context.command_path} --help`)"
    return report_error(message.rstrip(".") + hint)


def _flush() -> None:
    """Flushes the streams. Text that cannot be written is dropped, so that Python does not try again as it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# ---- a process of its own ----


def prepare_process() -> None:
    """Opens those of the three standard streams that are closed."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            # Otherwise the next file that is opened gets this number, and text for the screen goes into it.
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))


def end_process(code: int) -> NoReturn:
    """Ends the process: at once where programs are still being compiled, for which Python would wait, and after an
    interrupt, when threads that still run would print errors.
    """
    compiling = sys.modules.get("dsv32_jax.generate.compiling")  # no need to import it for `--help`
    compiles = compiling and any(thread.name.startswith(compiling.THREADS) for thread in threading.enumerate())
    if compiles or code == INTERRUPTED:
        os._exit(code)
    sys.exit(code)
