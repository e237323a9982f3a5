"""`dsv32 <verb>`. Wrong input gives one line on stderr and exit code 2; `ending` has the other exit codes.

Verbs import JAX only when they run, so that --help answers at once.
"""

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """The console script. Always raises SystemExit.

    Args:
      argv: arguments of a command that runs inside another program; None for those of the process, which ends then.
    """
    try:
        from dsv32_jax.cli import ending

        if argv is None:
            ending.prepare_process()
        code = ending.code_of(lambda: _run(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:  # while Python still imports the modules above
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    if argv is None:
        ending.end_process(code)
    sys.exit(code)


def _run(argv: Sequence[str]) -> None:
    from dsv32_jax.cli.verbs import run

    run(argv)
