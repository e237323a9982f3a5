"""Times of published kernels, as a peers' file carries them.

Such a file is JSON: `device`, `flush`, and `rows` of `peer`, `op`, `shape` and `seconds` (or `error`). It is written by
a script that times other libraries on the same machine just before; a ratio across devices, or with another way to
empty L2 (`timer.FLUSH`), would mean nothing, and is refused.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv32_jax.common.reading import decoded, parsed_json
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.bench.targets import PeerRow, peers_of
from dsv32_jax.experiments.bench.timer import FLUSH
from pallas_kernels.named_shape import Shape

EMPTY = PeerRow("torch", "empty call", "nothing")
"""What the peers' timer says of no work at all."""


class Peers:
    """Rows of one or more files, by library, call and shape; of equal rows the last counts."""

    def __init__(self, rows: dict[PeerRow, float | str] | None = None, files: Sequence[dict[str, Any]] = ()):
        self.rows = rows or {}
        self.files = list(files)

    @classmethod
    def read(cls, paths: Sequence[Path], device: str) -> "Peers":
        """The rows that were measured on this kind of device, and as `timer` does.

        Raises:
          UserError: a file cannot be read or is no peers' file.
        """
        rows: dict[PeerRow, float | str] = {}
        files = []
        for path in paths:
            try:
                content = parsed_json(decoded(path.read_bytes()))
                times = {
                    PeerRow(row["peer"], row["op"], row["shape"]): row.get("seconds", row.get("error", "no time"))
                    for row in content["rows"]
                    if "op" in row
                }
            except OSError as error:
                raise UserError(f"--peers {path}: cannot be read: {error.strerror}") from error
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"--peers {path}: not a file of a device and rows of peer, op, shape") from error
            conditions = {"device": content.get("device"), "flush": content.get("flush")}
            used = conditions == {"device": device, "flush": FLUSH}
            files.append({"name": path.name, **conditions, "used": used})
            if used:
                rows.update(times)
        return cls(rows, files)

    def seconds(self, row: PeerRow) -> float | None:
        """The time of one row, if it was measured."""
        time = self.rows.get(row)
        return time if isinstance(time, float) else None

    def ratio(self, peer: dict[str, Any], seconds: float, empty: float) -> dict[str, Any]:
        """How many times faster a call is than a peer's, each less what its own timer says of no work.

        Args:
          peer: from `join`.
          seconds: of the call.
          empty: of no work, by our timer.

        Returns:
          `ratio`, and `net` whether the peers' file has their timer's empty call; without it, the times as they are.
        """
        their_empty = self.seconds(EMPTY)
        if their_empty is None:
            return {"ratio": peer["seconds"] / seconds, "net": False}
        return {"ratio": (peer["seconds"] - len(peer["rows"]) * their_empty) / (seconds - empty), "net": True}

    def join(self, shape: Shape) -> dict[str, Any] | None:
        """The fastest alternative that was measured whole: its name, rows and seconds; None if there is none."""
        best: dict[str, Any] | None = None
        for rows in peers_of(shape):
            times = [time for row in rows if (time := self.seconds(row)) is not None]
            if len(times) < len(rows):
                continue
            total = sum(times)
            if best is None or total < best["seconds"]:
                names = list(dict.fromkeys(row.peer for row in rows))
                best = {
                    "name": " + ".join(names),
                    "rows": [f"{row.peer}: {row.op}, {row.shape}" for row in rows],
                    "seconds": total,
                }
        return best
