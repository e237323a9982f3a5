"""What one part of the model may expect of another, checked where it comes in.

Shapes and dtypes are checked always, while a step is traced. Values are checked with `Options(debug=True)`: only the
device knows them, so each layer of a step sends the host a few numbers, which costs more than a small step itself.
"""

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from dsv32_jax.errors import UserError

__all__ = ["check_selection", "shown_as_user_errors"]

SELECTION = {
    "is below -1, which stands for none": lambda chosen, positions: chosen < -1,
    "comes after the token's own position": lambda chosen, positions: chosen > positions[:, None],
    "comes behind a -1; those must be last": lambda chosen, positions: (chosen >= 0) & _behind_none(chosen),
    "stands there twice": lambda chosen, positions: (chosen >= 0) & _repeated(chosen),
}
"""What must hold of no chosen position: bool [T, K] of each."""


def check_selection(chosen: jax.Array, positions: jax.Array, layer: int, debug: bool) -> None:
    """Checks what `MLA.select` returns.

    Args:
      chosen: int32 [T, K], positions that each token attends to: none after its own, none twice, -1 for none, last.
      positions: int32 [T], of the tokens; of padding (-1) nothing is checked.
      layer: named in errors.
      debug: check values too, not only shape and dtype.

    Raises:
      UserError: another shape or dtype. Wrong values raise JAX's `JaxRuntimeError` where the results of the step are
        fetched, of which the calls of a `LanguageModel` make a `UserError`.
    """
    if chosen.ndim != 2 or len(chosen) != len(positions) or not chosen.shape[1] or chosen.dtype != jnp.int32:
        raise UserError(
            f"MLA.select, layer {layer}: {chosen.dtype} {list(chosen.shape)}; must be int32 [{len(positions)}, K]"
        )
    if not debug:
        return
    wrong = jnp.stack([rule(chosen, positions) for rule in SELECTION.values()]) & (positions >= 0)[:, None]
    first = jnp.argmax(wrong.reshape(len(SELECTION), -1), axis=-1)
    which = jnp.stack([first // chosen.shape[1], chosen.reshape(-1)[first]], axis=-1)
    io_callback(functools.partial(_refuse_selection, layer=layer), None, wrong.any((1, 2)), which, positions)


def _refuse_selection(wrong: np.ndarray, which: np.ndarray, positions: np.ndarray, layer: int) -> None:
    for rule, is_wrong, (token, chosen) in zip(SELECTION, np.asarray(wrong), np.asarray(which), strict=True):
        if is_wrong:
            at = np.asarray(positions)[token]
            raise UserError(f"MLA.select, layer {layer}: of the token at position {at}, the chosen {chosen} {rule}")


def _behind_none(chosen: jax.Array) -> jax.Array:
    """bool [T, K]: a -1 comes before."""
    return jnp.cumsum(chosen < 0, axis=-1) > 0


def _repeated(chosen: jax.Array) -> jax.Array:
    """bool [T, K]: the same position stands before it in the row."""
    order = jnp.argsort(chosen, axis=-1, stable=True)
    ordered = jnp.take_along_axis(chosen, order, axis=-1)
    again = jnp.pad(ordered[:, 1:] == ordered[:, :-1], ((0, 0), (1, 0)))
    return jnp.put_along_axis(jnp.zeros_like(again), order, again, axis=-1, inplace=False)


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
