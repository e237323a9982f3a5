"""What the choices of the products share."""

import itertools
from collections.abc import Iterable
from typing import Any

from pallas_kernels.hopper import SHARED_BYTES, SMS

__all__ = ["CONFIGS", "SHARED_BYTES", "SMS", "distinct"]

CONFIGS: dict[str, list[Any]] = {}
"""By kernel: every config that a choice can return; the modules of the products fill it."""


def distinct(*groups: Iterable[Any]) -> list[Any]:
    """The configurations of all groups, each once."""
    return list(dict.fromkeys(itertools.chain(*groups)))
