"""Tensor-core products of a warpgroup, and their twin for Pallas' interpreter, in which they can race."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm, scf, vector

from pallas_kernels import mosaic
from pallas_kernels.mosaic import i32

MATRIX = plgpu.Layout.WGMMA
ROW = MATRIX.reduce(1)
"""A number a row, in the threads that hold that row of a matrix."""
COLUMN = MATRIX.reduce(0)


def zeros(shape: tuple[int, ...], layout: Any) -> Any:
    """float32 zeros in a layout."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def rows(x: Any, shape: tuple[int, int]) -> Any:
    """Broadcasts a number a row to a matrix."""
    return lax.broadcast_in_dim(x, shape, [0])


class DeviceProducts:
    """Products in flight. In `run(f, *values)`, `f` gets a ref for each value and `run` returns what they hold then.

    A value from `accumulator` can be the target of `multiply`; all products are awaited at the end of `run`.
    """

    def run(self, f: Callable[..., Any], *values: Any) -> Any:
        return pl.run_state(lambda refs: f(*refs))(values)

    def accumulator(self, value: Any) -> Any:
        return plgpu.ACC.init(value)

    def multiply(self, accumulator: Any, a: Any, b: Any, *, transposed: bool = False) -> None:
        """Begins accumulator += a @ b, or a @ b.T.

        Args:
          accumulator: a ref that `run` gave.
          a: a bf16 matrix in registers, or a shared-memory ref.
          b: a shared-memory ref.
          transposed: multiply by b.T.
        """
        plgpu.wgmma(accumulator, a, b.transpose((1, 0)) if transposed else b)

    def wait(self, pending: int) -> None:
        """Waits until at most so many products are under way."""
        plgpu.wgmma_wait(pending)

    def read(self, accumulator: Any, pending: int | None = None) -> Any:
        """Returns the accumulator's value, after `wait(pending)` unless that was done."""
        return plgpu.wgmma_accumulator_load(accumulator, wait_n=pending)

    def rescale(self, matrix: Any, factors: Any) -> Any:
        """matrix * factors[:, None], but a warp whose factors are all 1 branches around the multiplications."""

        @plgpu.inline_mgpu(
            arg_types=(MATRIX, ROW), return_type=plgpu.ShapeDtypeStruct(matrix.shape, jnp.float32, layout=MATRIX)
        )
        def rescale(ctx, matrix, factors):
            one = mosaic.f32(1.0)
            numbers = [
                vector.extract(x, dynamic_position=[], static_position=[0]) if isinstance(x.type, ir.VectorType) else x
                for x in factors.registers.flat
            ]
            needed = functools.reduce(arith.ori, [arith.cmpf(arith.CmpFPredicate.UNE, x, one) for x in numbers])
            vote = nvvm.vote_sync(i32(-1), needed, "any")
            branch = mosaic.if_else(vote, [x.type for x in matrix.registers.flat])
            with ir.InsertionPoint(branch.then_block):
                scaled = matrix * factors.broadcast_in_dim(matrix.shape, (0,), matrix.layout)
                scf.yield_(list(scaled.registers.flat))
            with ir.InsertionPoint(branch.else_block):
                scf.yield_(list(matrix.registers.flat))
            registers = np.array(list(branch.results), dtype=object).reshape(matrix.registers.shape)
            return mgpu.FragmentedArray(_registers=registers, _layout=matrix.layout, _is_signed=None)

        return rescale(matrix, factors)

    def opaque_zero(self, step: Any) -> Any:
        return mosaic.opaque_zero(step)


class Cell:
    """A stand-in for a ref, which only exists while tracing."""

    def __init__(self, value: Any):
        self.value = value

    def __getitem__(self, _: Any) -> Any:
        return self.value

    def __setitem__(self, _: Any, value: Any) -> None:
        self.value = value


class Product(NamedTuple):
    """A product that has begun: accumulator += a @ b, or a @ b.T."""

    accumulator: Cell
    a: Any
    b: Any
    transposed: bool


class InterpretedProducts:
    """The twin of `DeviceProducts`: products that are under way until they are awaited.

    The interpreter does `plgpu.wgmma` at once and looks for no race in it. Here a product reads its operands by
    ordinary loads, in which races are detected, and it does so twice: when it begins, by when they must have arrived,
    and when it is awaited, until when nobody may write over them. Products end in the order in which they began.
    """

    def __init__(self) -> None:
        self.begun: list[Product] = []

    def run(self, f: Callable[..., Any], *values: Any) -> Any:
        cells = [Cell(value) for value in values]
        f(*cells)
        self.wait(0)
        return tuple(cell.value for cell in cells)

    def accumulator(self, value: Any) -> Any:
        return value

    def multiply(self, accumulator: Cell, a: Any, b: Any, *, transposed: bool = False) -> None:
        for operand in (a, b):
            _ = operand[...]
        self.begun.append(Product(accumulator, a, b, transposed))

    def wait(self, pending: int) -> None:
        ended = self.begun[: len(self.begun) - pending]
        del self.begun[: len(ended)]
        for accumulator, a, b, transposed in ended:
            contracted = (((1,), (1 if transposed else 0,)), ((), ()))
            added = lax.dot_general(a[...], b[...], contracted, preferred_element_type=jnp.float32)
            accumulator.value = accumulator.value + added

    def read(self, accumulator: Cell, pending: int | None = None) -> Any:
        if pending is not None:
            self.wait(pending)
        if any(product.accumulator is accumulator for product in self.begun):
            raise AssertionError("an accumulator is read before its products were awaited")
        return accumulator.value

    def rescale(self, matrix: Any, factors: Any) -> Any:
        return matrix * factors[:, None]

    def opaque_zero(self, step: Any) -> Any:
        return step * 0
