"""Named shapes of `moe_dispatch`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pallas_kernels.named_shape import Shape

HIDDEN = 7168
"""Width of the model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEDispatch(Shape):
    """One step of moving `tokens` tokens: "plan" routing and the routing plan, "gather" to FP8 rows, or "combine"."""

    op: ClassVar[str] = "moe_dispatch"
    step: str
    tokens: int
    experts: int = 256
    groups: int = 8
    groups_kept: int = 4
    chosen: int = 8
    width: int = HIDDEN


SHAPES: tuple[MoEDispatch, ...] = (
    *(MoEDispatch(name=f"plan-{tokens}", step="plan", tokens=tokens) for tokens in (1, 32, 128, 1024, 4096)),
    *(
        MoEDispatch(name=f"{step}-{tokens}", step=step, tokens=tokens)
        for step in ("gather", "combine")
        for tokens in (128, 4096)
    ),
)
"""Those of DeepSeek-V3.2-Exp that are measured."""

TINY: tuple[MoEDispatch, ...] = tuple(
    MoEDispatch(name=f"tiny-{step}", step=step, tokens=5, experts=8, groups=4, groups_kept=2, chosen=2, width=128)
    for step in ("plan", "gather", "combine")
)
"""The same kinds of calls, small enough for the reference on a CPU."""

SMALL: tuple[MoEDispatch, ...] = tuple(
    MoEDispatch(name=f"small-{step}", step=step, tokens=70, width=640, experts=64)
    for step in ("plan", "gather", "combine")
)
"""What the kernel takes, as small as it gets: for tools that slow a GPU down a hundred times."""
