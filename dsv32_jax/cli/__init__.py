"""`dsv32 <verb>`. Wrong input gives one line on stderr and exit code 2.

Verbs import JAX when they run, so that --help answers at once.
"""

import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, TextIO

import typer

from dsv32_jax import __version__
from dsv32_jax.cli import checkpoints, measuring, serving, text
from dsv32_jax.errors import CheckpointWarning, UserError

app = typer.Typer(
    help="DeepSeek-V3.2-Exp in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for verb in (
    text.generate,
    text.chat,
    text.score,
    checkpoints.info,
    checkpoints.convert,
    checkpoints.quantize,
    measuring.fidelity,
    serving.serve,
    measuring.bench,
):
    app.command()(verb)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"dsv32-jax {__version__}")
        raise typer.Exit


def main(argv: Sequence[str] | None = None) -> None:
    """The console script. Always leaves through SystemExit."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            app(args=argv, prog_name="dsv32")
    except UserError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or 'file'}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit(130)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line; what a checkpoint's files say is not a matter of a place in the code."""
    text = str(message) if category is CheckpointWarning else f"{filename}:{lineno}: {category.__name__}: {message}"
    print("warning: " + " ".join(text.split()), file=sys.stderr)


def fail(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
