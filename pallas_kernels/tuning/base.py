"""What all choices share: the machine, and the list of configs that `CONFIGS` becomes."""

import itertools
from collections.abc import Iterable
from typing import Any

SMS = 132
"""Multiprocessors of an H100 SXM and of an H200."""

SHARED_BYTES = 232448
"""Shared memory that a CTA can have, barriers included."""

CONFIGS: dict[str, list[Any]] = {}
"""By op: every config that a choice can return; the modules of the ops fill it."""


def distinct(*groups: Iterable[Any]) -> list[Any]:
    """The configurations of all groups, each once."""
    return list(dict.fromkeys(itertools.chain(*groups)))
