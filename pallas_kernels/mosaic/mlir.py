"""Operations of MLIR whose Python has other arguments than the generated classes, which type checkers take them for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

_arith: Any = arith
_scf: Any = scf


def constant(kind: ir.Type, value: int | float) -> ir.Value:
    """Returns a constant of a scalar type."""
    return _arith.constant(kind, value)


def f32(value: float) -> ir.Value:
    """Returns a float32 constant."""
    return constant(ir.F32Type.get(), value)


def for_loop(start: ir.Value, stop: ir.Value, step: ir.Value, state: Sequence[ir.Value]) -> scf.ForOp:
    """Returns a loop with an empty body and a state of these first values."""
    return _scf.ForOp(start, stop, step, state)


def if_else(condition: ir.Value, results: Sequence[ir.Type]) -> scf.IfOp:
    """Returns a branch with two empty blocks that give results of these types."""
    return _scf.IfOp(condition, results, has_else=True)
