"""`make demo`: the model that ships with the package continues a text, answers questions and scores a paragraph.

Every line is a command of `dsv32` that can be typed as it is shown.
"""

import io
import sys
import tempfile
from pathlib import Path
from unittest import mock

from dsv32_jax.experiments import command_line

PROMPT = "To install a package on Debian, you"
QUESTIONS = ("What does tar do?", "Who are you?")
PARAGRAPH = """\
A package manager keeps track of what is installed on a computer. It reads a list of packages, finds those that a new
package depends on, downloads them and unpacks their files. When a package is removed, its files are removed as well,
but the configuration files may stay in place until they are purged.
"""


def dsv32(*arguments: str, typed: str | None = None) -> None:
    """Shows a command and runs it in this process, as the console script would; `typed` is its standard input."""
    from dsv32_jax import cli

    shown = " ".join(f'"{word}"' if " " in word else word for word in arguments)
    pipe = "" if typed is None else "printf '" + typed.replace("\n", "\\n") + "' | "
    print(f"\n$ {pipe}dsv32 {shown}", flush=True)
    with mock.patch.object(sys, "stdin", io.StringIO(typed or "")):
        try:
            cli.main(arguments)
        except SystemExit as end:
            if end.code:
                raise


def main() -> None:
    """The demo; writes nothing but a temporary file."""
    print("A small DeepSeek-V3.2, trained on free manuals: every part of the real model, 16 million parameters.")
    dsv32("info", "--model", "demo")
    dsv32("generate", "--model", "demo", "--prompt", PROMPT, "--max-new-tokens", "64", "--seed", "1")
    dsv32("chat", "--model", "demo", "--max-new-tokens", "64", "--temperature", "0", typed="\n".join(QUESTIONS) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "paragraph.txt"
        text.write_text(PARAGRAPH, encoding="utf-8")
        dsv32("score", "--model", "demo", "--text-file", str(text))


if __name__ == "__main__":
    command_line.run(main)
