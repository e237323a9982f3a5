"""Tile sizes of the kernels: one frozen config a kernel, and which one a shape gets.

The choice is a plain function of shapes, so a program compiles the same kernel on every machine and in every run. Each
config that a function here can return is listed in `CONFIGS`; a test lowers them all.
"""

from __future__ import annotations

from typing import Any

SMS = 132
"""Multiprocessors of an H100 SXM and of an H200."""

CONFIGS: dict[str, list[Any]] = {}
"""By op: every config that a choice below can return."""
