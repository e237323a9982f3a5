"""What the model expects of a replaced part, checked where its result comes in.

Shapes and dtypes are checked always, while a step is traced. Values are checked with `Options(check=True)`: only the
device knows them, so each check of a step sends the host a few numbers, which costs more than a small step itself.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from dsv32_jax.errors import UserError
from pallas_kernels.moe_dispatch import RoutingPlan

__all__ = ["check_contract", "check_range", "check_result", "check_selection", "shown_as_user_errors"]

NUMBERS = ("indexer_logits", "sparse_mla", "dense_mla", "rms_norm", "rope", "index_rope", "matmul", "route", "combine")
"""Parts whose results must not be NaN; those of others have rows that nobody reads, and which may hold anything."""
ANY_WIDTH = ("index_select", "top_k")
"""Parts that may give any number of positions."""


def check_result(label: str, result: Any, default: Callable[[], Any], part: str) -> None:
    """Holds the result of a replaced part against that of the op.

    Args:
      label: names the part and its place in errors.
      result: what it gave.
      default: gives what the op would; only its shapes are computed.
      part: its name.

    Raises:
      UserError: another structure, shape or dtype.
    """
    expected = jax.eval_shape(default)
    if part == "make_plan":  # its tiles may have any size
        if not isinstance(result, RoutingPlan) or _described(result.token_row) != _described(expected.token_row):
            raise UserError(f"{label}: gave {_described(result)}; must be a RoutingPlan of {_described(expected)}")
        return
    if part in ANY_WIDTH:
        rows = len(expected)
        if not isinstance(result, jax.Array) or result.ndim != 2 or len(result) != rows or not result.shape[1]:
            raise UserError(f"{label}: gave {_described(result)}; must be int32 [{rows}, K]")
        expected = jax.ShapeDtypeStruct(result.shape, jnp.int32)
    if _described(result) != _described(expected):
        raise UserError(f"{label}: gave {_described(result)}; must be {_described(expected)}")


def _described(value: Any) -> str:
    """Arrays by dtype and shape, tuples of them alike, anything else by its type."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_described, value))})"
    if isinstance(value, RoutingPlan):
        return f"token_row {_described(value.token_row)}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__


def check_contract(label: str, part: str, result: Any, arrays: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
    """Checks the values that a replaced part gives, where there is a contract on them.

    Args:
      label: names the part and its place in errors.
      part: its name.
      result: what it gave.
      arrays, keywords: what its op gets.

    Raises:
      JaxRuntimeError where the results of the step are fetched, see `shown_as_user_errors`.
    """
    if part == "index_select":
        check_selection(label, result, arrays[6])
    elif part == "top_k":
        check_selection(label, result, keywords["lengths"] - 1)
    elif part == "route":
        check_range(label, "expert", result[0], 0, arrays[0].shape[1], distinct=True)
    elif part == "make_plan":
        check_range(label, "expert of a tile", result.tile_expert[:, None], 0, arrays[2])
        check_range(label, "row of a token", result.token_row, -1, len(result.row_token))
        check_range(label, "token of a row", result.row_token[:, None], -1, len(arrays[0]))
    if part in NUMBERS:
        for leaf in jax.tree.leaves(result):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                missing = jnp.isnan(leaf)
                io_callback(functools.partial(_refuse_nan, label=label), None, missing.any(), jnp.argmax(missing))


SELECTION = {
    "is below -1, which stands for none": lambda chosen, positions: chosen < -1,
    "comes after the token's own position": lambda chosen, positions: chosen > positions[:, None],
    "comes behind a -1; those must be last": lambda chosen, positions: (chosen >= 0) & _behind_none(chosen),
    "stands there twice": lambda chosen, positions: (chosen >= 0) & _repeated(chosen),
}
"""What must hold of no chosen position: bool [T, K] of each."""


def check_selection(label: str, chosen: jax.Array, positions: jax.Array) -> None:
    """Checks the positions that tokens attend to.

    Args:
      label: names the part and its place in errors.
      chosen: int32 [T, K]: none after the token's own position, none twice, -1 for none, last.
      positions: int32 [T], of the tokens; of padding (-1) nothing is checked.

    Raises:
      JaxRuntimeError where the results of the step are fetched, of which the calls of a `LanguageModel` make a
      `UserError`.
    """
    wrong = jnp.stack([rule(chosen, positions) for rule in SELECTION.values()]) & (positions >= 0)[:, None]
    first = jnp.argmax(wrong.reshape(len(SELECTION), -1), axis=-1)
    which = jnp.stack([first // chosen.shape[1], chosen.reshape(-1)[first]], axis=-1)
    io_callback(functools.partial(_refuse_selection, label=label), None, wrong.any((1, 2)), which, positions)


def _refuse_selection(wrong: np.ndarray, which: np.ndarray, positions: np.ndarray, label: str) -> None:
    for rule, is_wrong, (token, chosen) in zip(SELECTION, np.asarray(wrong), np.asarray(which), strict=True):
        if is_wrong:
            at = np.asarray(positions)[token]
            raise UserError(f"{label}: of the token at position {at}, the chosen {chosen} {rule}")


def check_range(label: str, name: str, indices: jax.Array, low: int, high: int, distinct: bool = False) -> None:
    """Checks that int32 [R, K] are from `low` to below `high`, and different within a row; raises as `check_selection`.

    Args:
      label: names the part and its place in errors.
      name: of what they count.
      indices: int32 [R, K].
      low, high: the range.
      distinct: none stands twice in a row.
    """
    outside = (indices < low) | (indices >= high)
    again = _repeated(indices) if distinct else jnp.zeros_like(outside)
    refuse = functools.partial(_refuse_index, label=label, name=name, rule=f"is not in {low}..{high - 1}")
    io_callback(refuse, None, outside, again, indices)


def _refuse_index(
    outside: np.ndarray, again: np.ndarray, indices: np.ndarray, label: str, name: str, rule: str
) -> None:
    for wrong, text in ((outside, rule), (again, "stands there twice")):
        if np.asarray(wrong).any():
            row, column = np.argwhere(np.asarray(wrong))[0]
            raise UserError(f"{label}: of row {row}, the {name} {np.asarray(indices)[row, column]} {text}")


def _refuse_nan(missing: np.ndarray, first: np.ndarray, label: str) -> None:
    if np.asarray(missing):
        raise UserError(f"{label}: gave NaN, first at {int(first)} of its flat values")


def _behind_none(chosen: jax.Array) -> jax.Array:
    """bool [T, K]: a -1 comes before."""
    return jnp.cumsum(chosen < 0, axis=-1) > 0


def _repeated(chosen: jax.Array) -> jax.Array:
    """bool [T, K]: the same position stands before it in the row."""
    order = jnp.argsort(chosen, axis=-1, stable=True)
    ordered = jnp.take_along_axis(chosen, order, axis=-1)
    again = jnp.pad(ordered[:, 1:] == ordered[:, :-1], ((0, 0), (1, 0)))
    return jnp.put_along_axis(jnp.zeros_like(again), order, again, axis=-1, inplace=False)


class _OfChecks(logging.Filter):
    """Drops what JAX logs of a check that failed: the error itself comes where the result is fetched."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record stays."""
        return not (record.exc_info and isinstance(record.exc_info[1], UserError))


logging.getLogger("jax._src.callback").addFilter(_OfChecks())


@contextlib.contextmanager
def shown_as_user_errors() -> Iterator[None]:
    """Raises what a check raised on the host, in the middle of a step, as the `UserError` that it was."""
    name = f"{UserError.__name__}: "
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        _, _, message = str(error).partition(name)
        if not message:
            raise
        raise UserError(message.splitlines()[0]) from error
