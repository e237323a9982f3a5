"""Runs `dsv32 serve` as a process."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from types import TracebackType

from dsv32_jax.errors import UserError

__all__ = ["SHOWN", "Process"]

SHOWN = 15
"""The last lines of its output that are shown."""


class Process:
    """A server on a free port of this machine.

    Args:
      flags: of `dsv32 serve`, without host and port.
      key: that it requires.

    Attributes:
      address: without a path, once it has started.
    """

    def __init__(self, flags: Sequence[str], key: str):
        self.address = ""
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        command = [sys.executable, "-m", "dsv32_jax.cli", "serve", "--host", "127.0.0.1", "--port", "0", *flags]
        environment = {**os.environ, "DSV32_API_KEY": key, "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT
        )

    def __enter__(self) -> "Process":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.alive:
            self._process.kill()
        self._process.wait()
        self._log.close()

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """The exit code, minus the signal where one ended it; None while it runs."""
        return self._process.poll()

    def listen(self, seconds: float) -> None:
        """Waits for the line that names its address; raises `UserError` with its output where none comes."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            alive = self.alive  # before the look at its output, which may be its last
            for line in self.output():
                if line.startswith("serving ") and " at http://" in line:
                    self.address = line.split()[-1].removesuffix("/v1")
                    return
            if not alive:
                raise UserError(
                    self.with_output(f"the server ended with exit code {self.exit_code} before it listened")
                )
            time.sleep(0.05)
        raise UserError(self.with_output(f"the server does not listen after {seconds:g} s"))

    def output(self) -> list[str]:
        """The lines of output so far."""
        # By its own offset: the process writes through the same open file.
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode("utf-8", "replace").splitlines()

    def with_output(self, message: str) -> str:
        """A message, and the last lines of output."""
        lines = self.output()[-SHOWN:]
        return f"{message}; its last output: " + (" | ".join(lines) if lines else "none")

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self._process.send_signal(signal.SIGTERM)

    def end(self, seconds: float) -> int | None:
        """Waits for the end, and returns the exit code; None if it has not ended in time."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
