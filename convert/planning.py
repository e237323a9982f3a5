"""Chooses a scheme for each linear: the least loss within a budget of bytes, or the fewest bytes within one of loss.

The losses of single units, measured one at a time, are assumed to add up. That is a knapsack with several choices an
item. Item after item, it keeps all plans that no other plan beats in both bytes and loss (Nemhauser and Ullmann,
Management Science 15, 1969): the result is exact, and every budget is read from the same front.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from dsv32_jax.errors import UserError

Unit = tuple[str, ...]
"""Paths of parameters that get one scheme together."""


@dataclasses.dataclass(frozen=True)
class Front:
    """Plans that no other beats, by growing bytes and falling loss.

    Attributes:
      size: int64 [P], bytes of all units.
      loss: float64 [P], the sum of their losses.
      units, choices: the units, and the schemes that each may have.
      parents: for each unit, int [P'] the scheme of a plan, and int [P'] the plan of the units before that it extends.
    """

    size: np.ndarray
    loss: np.ndarray
    units: tuple[Unit, ...]
    choices: tuple[tuple[str, ...], ...]
    parents: tuple[tuple[np.ndarray, np.ndarray], ...]

    def schemes(self, point: int) -> dict[str, str]:
        """The scheme of every path in one plan."""
        schemes: dict[str, str] = {}
        for unit, options, (scheme, before) in reversed(list(zip(self.units, self.choices, self.parents, strict=True))):
            schemes |= dict.fromkeys(unit, options[scheme[point]])
            point = before[point]
        return dict(reversed(schemes.items()))


def front(
    sensitivity: Mapping[Unit, Mapping[str, float]], sizes: Mapping[str, Mapping[str, int]], grain: int = 1
) -> Front:
    """Computes all plans that no other plan beats.

    Args:
      sensitivity: for each unit the loss of each scheme that it may have, at least 0.
      sizes: for each path its bytes in each of them.
      grain: unit of bytes to which sizes are rounded up: with 1 the front is exact, with more it is shorter.

    Raises:
      UserError: a unit without schemes, a loss below 0 or not finite, a size that is missing, or a path in two units.
    """
    paths = [path for unit in sensitivity for path in unit]
    if len(paths) != len(set(paths)):
        raise UserError("sensitivity: a path is in two units; it can have one scheme")
    size, loss = np.zeros(1, np.int64), np.zeros(1)
    parents, choices = [], []
    for unit, losses in sensitivity.items():
        name = ", ".join(unit)
        if not losses:
            raise UserError(f"sensitivity of {name}: no scheme; give at least one")
        for scheme, value in losses.items():
            if not (np.isfinite(value) and value >= 0):
                raise UserError(f"sensitivity of {name}: {scheme} loses {value}; must be finite and at least 0")
            if missing := [path for path in unit if scheme not in sizes.get(path, {})]:
                raise UserError(f"sizes of {missing[0]}: no {scheme}; give its bytes in each scheme it may have")
        unit_size = np.array([sum(sizes[path][scheme] for path in unit) for scheme in losses], np.int64)
        unit_size = -(-unit_size // grain) * grain
        sums = (size + unit_size[:, None]).ravel(), (loss + np.array(list(losses.values()))[:, None]).ravel()
        order = np.lexsort((sums[1], sums[0]))
        best = np.minimum.accumulate(sums[1][order])
        undominated = order[np.concatenate([[True], best[1:] < best[:-1]])]
        parents.append((undominated // len(size), undominated % len(size)))
        choices.append(tuple(losses))
        size, loss = sums[0][undominated], sums[1][undominated]
    return Front(size, loss, tuple(sensitivity), tuple(choices), tuple(parents))


def plan(
    sensitivity: Mapping[Unit, Mapping[str, float]],
    sizes: Mapping[str, Mapping[str, int]],
    budget_bytes: float | None = None,
    budget_loss: float | None = None,
    grain: int = 1,
) -> dict[str, str]:
    """Chooses the scheme of each path within a budget.

    Args:
      sensitivity: losses.
      sizes: bytes.
      budget_bytes: the most bytes; alone, it gives the plan with the least loss.
      budget_loss: the largest loss; it gives the plan with the fewest bytes. Without a budget the loss is the least.
      grain: see `front`.

    Raises:
      UserError: nothing is within the budget.
    """
    plans = front(sensitivity, sizes, grain)
    within = np.flatnonzero(
        (plans.size <= (np.inf if budget_bytes is None else budget_bytes))
        & (plans.loss <= (np.inf if budget_loss is None else budget_loss))
    )
    if not len(within):
        raise UserError(
            f"budget: no plan has at most {budget_bytes} bytes and {budget_loss} loss; the smallest has "
            f"{plans.size[0]} and loses {plans.loss[0]:g}, the best has {plans.size[-1]} and loses {plans.loss[-1]:g}"
        )
    return plans.schemes(int(within[-1 if budget_loss is None else 0]))
