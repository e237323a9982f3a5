"""What the products' shapes still say of the benchmark, whose own tables are in `experiments/bench/targets.py`."""

from __future__ import annotations

import dataclasses
from typing import Any

from pallas_kernels import named_shape
from pallas_kernels.named_shape import K

__all__ = ["K", "PeerRow", "Shape", "Target"]


@dataclasses.dataclass(frozen=True)
class PeerRow:
    """Nothing reads this."""

    peer: str
    op: str
    shape: str


@dataclasses.dataclass(frozen=True)
class Target:
    """Nothing reads this."""

    floor: float
    goal: float
    of: str = "peer"
    enough: float | None = None
    within: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape(named_shape.Shape):
    """A shape of a product; nothing reads `peers` and `target`."""

    peers: tuple[tuple[PeerRow, ...], ...] = ()
    target: Target | None = None

    def dims(self) -> dict[str, Any]:
        """Returns the sizes alone."""
        return {name: value for name, value in super().dims().items() if name not in {"peers", "target"}}
