"""The list of verbs, and the checks that all of them share."""

import os
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand
from typer.main import get_command

from dsv32_jax import __version__
from dsv32_jax.cli import (
    before_after,
    chat,
    checkpoints,
    diagnosing,
    measuring,
    scoring,
    serving,
    text,
    tokens,
    workbench,
)
from dsv32_jax.common import progress
from dsv32_jax.errors import UserError

__all__ = ["run"]

CHECKPOINTS = ("source", "target")
"""Paths of checkpoint directories. The libraries that read and write tensors take only names that are UTF-8; files
that Python itself opens may have any name."""


COMPLETION = "_DSV32_COMPLETE"
"""The variable by which shells ask for completions; Click makes its name of the command's."""


class Verb(TyperCommand):
    """A verb. Before it runs, its arguments, which may be any bytes, must be text, and JAX must be able to start."""

    def invoke(self, ctx: Any) -> Any:
        for parameter in self.params:
            value = ctx.params.get(parameter.name or "")
            for argument in value if isinstance(value, list | tuple) else [value]:
                if isinstance(argument, str) or (argument is not None and parameter.name in CHECKPOINTS):
                    refuse_other_bytes(str(argument), flag_of(parameter))
        check_platform()
        return super().invoke(ctx)


def flag_of(parameter: Any) -> str:
    """The name of a parameter as a user writes it: `--prompt`, `SRC`."""
    if parameter.param_type_name == "option":
        return max(parameter.opts, key=len)
    return (parameter.metavar or parameter.name).strip("[].")


def refuse_other_bytes(value: str, name: str) -> None:
    """Raises UserError where the value has surrogates, which Python puts for bytes that are not UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name}: not UTF-8 text (character {error.start})") from error


def check_platform() -> None:
    """Raises UserError where JAX cannot start as the environment asks: before anything is written."""
    for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME"):
        platform = os.environ.get(name)
        if not platform or platform == "cpu":
            continue
        try:
            import jax

            jax.devices()
        except Exception as error:  # JAX has many types for this, one of them an empty AssertionError
            reason = str(error).partition(" (set JAX_PLATFORMS")[0] or "JAX has no such device"
            raise UserError(f"{name}={platform}: {reason}; unset it, or set {name}=cpu") from error


app = typer.Typer(
    help="DeepSeek-V3.2-Exp in JAX.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for verb in (
    text.generate,
    chat.chat,
    scoring.score,
    tokens.tokenize,
    checkpoints.info,
    checkpoints.convert,
    checkpoints.quantize,
    measuring.fidelity,
    diagnosing.diagnose,
    serving.serve,
    measuring.bench,
    workbench.compare,
    workbench.ablate,
    before_after.before_after,
):
    app.command(cls=Verb)(verb)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"dsv32-jax {__version__}")
        raise typer.Exit


def run(argv: Sequence[str]) -> None:
    """Runs a command; passes on all exceptions unchanged."""
    command = get_command(app)
    if COMPLETION in os.environ:  # a shell asks what could come next
        command.main(list(argv), prog_name="dsv32", complete_var=COMPLETION)
    # Not by typer's own `app()`, which turns interrupts and closed pipes into exit codes of its own.
    with progress.shown(), command.make_context("dsv32", list(argv)) as context:
        command.invoke(context)
