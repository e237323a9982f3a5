"""Named shapes of `quantize`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pallas_kernels.named_shape import Shape

HIDDEN = 7168
"""Width of the model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize(Shape):
    """`tokens` rows of `width` to `form`: FP8 with "ue8m0" or "exact" scales, or "int8"."""

    op: ClassVar[str] = "quantize"
    form: str
    tokens: int
    width: int = HIDDEN


SHAPES: tuple[Quantize, ...] = (
    *(Quantize(name=f"{form}-4096", form=form, tokens=4096) for form in ("ue8m0", "exact", "int8")),
    Quantize(name="ue8m0-128", form="ue8m0", tokens=128),
)
"""Those of DeepSeek-V3.2-Exp that are measured."""

TINY: tuple[Quantize, ...] = tuple(
    Quantize(name=f"tiny-{form}", form=form, tokens=3, width=256) for form in ("ue8m0", "exact", "int8")
)
"""The same kinds of calls, small enough for the reference on a CPU."""

SMALL: tuple[Quantize, ...] = tuple(
    Quantize(name=f"small-{form}", form=form, tokens=3, width=640) for form in ("ue8m0", "exact", "int8")
)
"""What the kernel takes, as small as it gets: for tools that slow a GPU down a hundred times."""
