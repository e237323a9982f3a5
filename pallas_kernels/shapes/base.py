"""What every shape has, and what may be asked of one."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar


@dataclasses.dataclass(frozen=True)
class PeerRow:
    """One measurement in a peers' file: which library, which of its calls, at which shape."""

    peer: str
    op: str
    shape: str


@dataclasses.dataclass(frozen=True)
class Target:
    """What a shape must reach (`floor`) and shall reach (`goal`).

    Attributes:
      of: in what: "peer" is the peer's time over ours, "reference" the reference's, "roofline" the fraction of what the
        device could do.
      enough: fraction of what the device could do with which the goal counts as reached in any case.
      within: seconds that the goal asks for besides.
    """

    floor: float
    goal: float
    of: str = "peer"
    enough: float | None = None
    within: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What every shape has.

    Attributes:
      name: unique within the op.
      peers: alternatives, of which the fastest counts; each is a sequence of rows whose times add up.
      target: what is asked of it, if anything.
      kernel: whether the op has a kernel for it; else it is left to XLA.
    """

    op: ClassVar[str]
    name: str
    peers: tuple[tuple[PeerRow, ...], ...] = ()
    target: Target | None = None
    kernel: bool = True

    def dims(self) -> dict[str, Any]:
        """The sizes alone."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in {"name", "peers", "target", "kernel"}
        }


K = 1024
