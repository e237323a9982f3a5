"""Plans of schemes, against all that there are."""

import itertools

import numpy as np
import pytest

from dsv32_jax.convert.planning import front, plan
from dsv32_jax.errors import UserError

SCHEMES = ("bf16", "int8", "int4")


def case(seed: int, units: int = 5):
    """Random losses and sizes; every other unit has two paths, and one lacks a scheme."""
    rng = np.random.default_rng(seed)
    names = [(f"{n}.a", f"{n}.b")[: 1 + n % 2] for n in range(units)]
    losses = [dict(zip(SCHEMES, np.sort(rng.exponential(size=3)).tolist(), strict=True)) for _ in names]
    del losses[1]["bf16"]
    parts = rng.integers(1, 40, 2 * units).tolist()
    paths = [path for unit in names for path in unit]
    sizes = {path: {"bf16": 4 * n, "int8": 2 * n + 1, "int4": n} for path, n in zip(paths, parts, strict=False)}
    return dict(zip(names, losses, strict=True)), sizes


def every_plan(sensitivity, sizes):
    """(bytes, loss, schemes by unit) of all there are."""
    for schemes in itertools.product(*sensitivity.values()):
        chosen = dict(zip(sensitivity, schemes, strict=True))
        size = sum(sizes[path][scheme] for unit, scheme in chosen.items() for path in unit)
        yield size, sum(sensitivity[unit][scheme] for unit, scheme in chosen.items()), chosen


def worth(schemes, sensitivity, sizes):
    """Bytes and loss of a plan by path, whose units must agree."""
    assert all(len({schemes[path] for path in unit}) == 1 for unit in sensitivity)
    size = sum(sizes[path][scheme] for path, scheme in schemes.items())
    return size, sum(losses[schemes[unit[0]]] for unit, losses in sensitivity.items())


@pytest.mark.parametrize("seed", range(6))
def test_no_plan_is_better(seed):
    sensitivity, sizes = case(seed)
    plans = list(every_plan(sensitivity, sizes))
    for share in (0.0, 0.3, 0.6, 1.0):
        smallest, largest = min(p[0] for p in plans), max(p[0] for p in plans)
        budget = smallest + share * (largest - smallest)
        size, loss = worth(plan(sensitivity, sizes, budget_bytes=budget), sensitivity, sizes)
        assert size <= budget and loss == pytest.approx(min(p[1] for p in plans if p[0] <= budget))
        budget = min(p[1] for p in plans) + share * max(p[1] for p in plans) + 1e-9
        size, loss = worth(plan(sensitivity, sizes, budget_loss=budget), sensitivity, sizes)
        assert loss <= budget and size == min(p[0] for p in plans if p[1] <= budget)


def test_the_front_is_what_no_plan_beats():
    sensitivity, sizes = case(7)
    plans = list(every_plan(sensitivity, sizes))
    unbeaten = {
        (size, round(loss, 9))
        for size, loss, _ in plans
        if not any(a <= size and b <= loss and (a, b) != (size, loss) for a, b, _ in plans)
    }
    plan_front = front(sensitivity, sizes)
    assert {(int(a), round(float(b), 9)) for a, b in zip(plan_front.size, plan_front.loss, strict=True)} == unbeaten
    for point in range(len(plan_front.size)):
        size, loss = worth(plan_front.schemes(point), sensitivity, sizes)
        assert size == plan_front.size[point] and loss == pytest.approx(plan_front.loss[point])


def test_without_a_budget_the_least_loss_and_then_the_fewest_bytes():
    sizes = {"a": {"int8": 8, "fp8_block": 9, "int4": 4}}
    assert plan({("a",): {"fp8_block": 0.0, "int8": 0.0, "int4": 1.0}}, sizes) == {"a": "int8"}


def test_a_coarse_front_is_shorter_and_its_plans_stay_within_the_budget():
    sensitivity, sizes = case(3, units=8)
    exact, coarse = front(sensitivity, sizes), front(sensitivity, sizes, grain=30)
    assert len(coarse.size) < len(exact.size)
    budget = float(exact.size.mean())
    size, loss = worth(plan(sensitivity, sizes, budget_bytes=budget, grain=30), sensitivity, sizes)
    assert size <= budget
    assert loss >= worth(plan(sensitivity, sizes, budget_bytes=budget), sensitivity, sizes)[1]


def test_a_large_model_is_planned():
    """Twenty layers of eleven families, three schemes each; rounding up to the grain leaves some of the budget."""
    rng = np.random.default_rng(0)
    units = [(f"{layer}.{family}",) for layer in range(20) for family in range(11)]
    sizes = {
        path: {"bf16": 2 * n, "int8": n, "int4": n // 2} for (path,) in units for n in (2 ** (int(path[-1]) + 20),)
    }
    sensitivity = {unit: {"bf16": 0.0, "int8": rng.uniform(), "int4": rng.uniform(1, 9)} for unit in units}
    total = sum(sizes[path]["int8"] for (path,) in units)
    size, _ = worth(plan(sensitivity, sizes, budget_bytes=total, grain=total // 2048), sensitivity, sizes)
    assert 0.9 * total < size <= total


@pytest.mark.parametrize(
    "sensitivity, sizes, budget, says",
    [
        ({("a",): {"int8": 1.0}}, {"a": {"int8": 8}}, {"budget_bytes": 7}, "at most 7 bytes.* smallest has 8"),
        ({("a",): {"int8": 1.0}}, {"a": {"int8": 8}}, {"budget_loss": 0.5}, "0.5 loss"),
        ({("a",): {"int8": 1.0}}, {"a": {"int4": 8}}, {}, "sizes of a: no int8"),
        ({("a",): {"int8": -1.0}}, {"a": {"int8": 8}}, {}, "int8 loses -1.0"),
        ({("a",): {}}, {"a": {"int8": 8}}, {}, "no scheme"),
        ({("a", "b"): {"int8": 1.0}, ("b",): {"int8": 1.0}}, {}, {}, "in two units"),
    ],
)
def test_refused(sensitivity, sizes, budget, says):
    with pytest.raises(UserError, match=says):
        plan(sensitivity, sizes, **budget)
