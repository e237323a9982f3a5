"""Which linear gets which scheme: the least loss within some bytes, or the fewest bytes within some loss.

Losses are taken to add up, as measured one at a time. That is a knapsack with several choices an item. Item after item,
all plans that no other plan beats in both bytes and loss are kept (Nemhauser and Ullmann, Management Science 15, 1969):
the result is exact, and every budget is read from the same front.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from dsv32_jax.errors import UserError

Unit = tuple[str, ...]
"""Paths of parameters that are decided together."""


@dataclasses.dataclass(frozen=True)
class Front:
    """Plans that no other beats, by growing bytes and falling loss.

    Attributes:
      size: int64 [P], bytes of all units.
      loss: float64 [P], the sum of their losses.
      units, choices: what was decided, and each unit's schemes.
      taken: for each unit, int [P'] which scheme, and int [P'] which plan of the units before it.
    """

    size: np.ndarray
    loss: np.ndarray
    units: tuple[Unit, ...]
    choices: tuple[tuple[str, ...], ...]
    taken: tuple[tuple[np.ndarray, np.ndarray], ...]

    def schemes(self, point: int) -> dict[str, str]:
        """The plan of one point: the scheme of every path."""
        found: dict[str, str] = {}
        for unit, names, (scheme, before) in reversed(list(zip(self.units, self.choices, self.taken, strict=True))):
            found |= dict.fromkeys(unit, names[scheme[point]])
            point = before[point]
        return dict(reversed(found.items()))


def front(
    sensitivity: Mapping[Unit, Mapping[str, float]], sizes: Mapping[str, Mapping[str, int]], grain: int = 1
) -> Front:
    """All plans worth having.

    Args:
      sensitivity: for each unit the loss of each scheme that it may have, at least 0.
      sizes: for each path its bytes in each of them.
      grain: bytes that count as one. A unit is rounded up to them: with 1 the front is exact, with more it is shorter.

    Raises:
      UserError: a unit without schemes, a loss below 0 or not finite, a size that is missing, or a path in two units.
    """
    paths = [path for unit in sensitivity for path in unit]
    if len(paths) != len(set(paths)):
        raise UserError("sensitivity: a path is in two units; it can have one scheme")
    size, loss = np.zeros(1, np.int64), np.zeros(1)
    taken, choices = [], []
    for unit, losses in sensitivity.items():
        name = ", ".join(unit)
        if not losses:
            raise UserError(f"sensitivity of {name}: no scheme; give at least one")
        for scheme, value in losses.items():
            if not (np.isfinite(value) and value >= 0):
                raise UserError(f"sensitivity of {name}: {scheme} loses {value}; must be finite and at least 0")
            if missing := [path for path in unit if scheme not in sizes.get(path, {})]:
                raise UserError(f"sizes of {missing[0]}: no {scheme}; give its bytes in each scheme it may have")
        own = np.array([sum(sizes[path][scheme] for path in unit) for scheme in losses], np.int64)
        own = -(-own // grain) * grain
        sums = (size + own[:, None]).ravel(), (loss + np.array(list(losses.values()))[:, None]).ravel()
        order = np.lexsort((sums[1], sums[0]))
        best = np.minimum.accumulate(sums[1][order])
        kept = order[np.concatenate([[True], best[1:] < best[:-1]])]
        taken.append((kept // len(size), kept % len(size)))
        choices.append(tuple(losses))
        size, loss = sums[0][kept], sums[1][kept]
    return Front(size, loss, tuple(sensitivity), tuple(choices), tuple(taken))


def plan(
    sensitivity: Mapping[Unit, Mapping[str, float]],
    sizes: Mapping[str, Mapping[str, int]],
    budget_bytes: float | None = None,
    budget_loss: float | None = None,
    grain: int = 1,
) -> dict[str, str]:
    """The scheme of each path; arguments as of `front`.

    Args:
      sensitivity: losses.
      sizes: bytes.
      budget_bytes: the least loss within them.
      budget_loss: the fewest bytes within it. With both, the fewest bytes, or nothing; with neither, the least loss.
      grain: see `front`.

    Raises:
      UserError: nothing is within the budget.
    """
    found = front(sensitivity, sizes, grain)
    within = np.flatnonzero(
        (found.size <= (np.inf if budget_bytes is None else budget_bytes))
        & (found.loss <= (np.inf if budget_loss is None else budget_loss))
    )
    if not len(within):
        raise UserError(
            f"budget: no plan has at most {budget_bytes} bytes and {budget_loss} loss; the smallest has "
            f"{found.size[0]} and loses {found.loss[0]:g}, the best has {found.size[-1]} and loses {found.loss[-1]:g}"
        )
    return found.schemes(int(within[-1 if budget_loss is None else 0]))
