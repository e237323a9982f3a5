"""What the named shapes of all ops have in common."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

K = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """How large a call of an op is.

    Attributes:
      name: unique within the op.
      kernel: whether the op has a kernel for it; else it is left to XLA.
    """

    op: ClassVar[str]
    name: str
    kernel: bool = True

    def dims(self) -> dict[str, Any]:
        """Returns the sizes alone."""
        common = {field.name for field in dataclasses.fields(Shape)}
        sizes = [field.name for field in dataclasses.fields(self) if field.name not in common]
        return {name: getattr(self, name) for name in sizes}
