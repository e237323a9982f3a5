"""Calls of the ops of `moe_dispatch`: routings whose choice does not hang on a last bit, plans, and rows to move."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.moe_dispatch import RoutingPlan, combine, gather_rows, gather_rows_fp8, make_plan, route

FACTOR = 2.5
LEAST_GAP = 1e-6
"""Between biased scores that are not equal; float32 sigmoids of one backend and another differ by some 1e-7."""


# ---- routing -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Routing:
    """Arguments of `route`."""

    name: str
    logits: np.ndarray
    bias: np.ndarray
    groups: int
    kept: int
    chosen: int
    normalize: bool = True

    def run(self, backend: str, logits: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """The op."""
        return route(
            jnp.asarray(self.logits) if logits is None else logits,
            jnp.asarray(self.bias),
            num_groups=self.groups,
            groups_kept=self.kept,
            experts_per_token=self.chosen,
            normalize=self.normalize,
            scaling_factor=FACTOR,
            backend=backend,
        )

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """Experts and weights, in float64."""
        scores, biased, sums = scores_of(self.logits, self.bias, self.groups)
        kept = np.argsort(-sums, axis=-1, kind="stable")[:, : self.kept]
        allowed = np.zeros(sums.shape, bool)
        np.put_along_axis(allowed, kept, True, axis=-1)
        allowed = np.repeat(allowed, self.logits.shape[1] // self.groups, axis=-1)
        experts = np.argsort(np.where(allowed, -biased, np.inf), axis=-1, kind="stable")[:, : self.chosen]
        weights = np.take_along_axis(scores, experts, -1)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdims=True)
        return experts.astype(np.int32), weights * FACTOR


def scores_of(logits: np.ndarray, bias: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores and biased scores [T, E], and the sums of the groups' two best [T, groups]; float64."""
    scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
    biased = scores + bias
    return scores, biased, np.sort(biased.reshape(len(logits), groups, -1), -1)[..., -2:].sum(-1)


def unclear(logits: np.ndarray, bias: np.ndarray, groups: int) -> np.ndarray:
    """Tokens with two scores, or sums of groups, that are nearly but not quite equal."""
    _, biased, sums = scores_of(logits, bias, groups)

    def near(x: np.ndarray) -> np.ndarray:
        gaps = np.diff(np.sort(x, -1), axis=-1)
        return ((gaps > 0) & (gaps < LEAST_GAP)).any(-1)

    return near(biased) | near(sums)


def routing(
    tokens: int,
    experts: int,
    groups: int,
    kept: int,
    chosen: int,
    *,
    levels: int = 0,
    normalize: bool = True,
    shift: float = 0.0,
    seed: int = 0,
) -> Routing:
    """Random logits; of `levels` different values only, with many ties, where that is not 0; `shift` moves the bias."""
    rng = np.random.default_rng(seed)
    if levels:
        bias = shift + 0.25 * rng.integers(0, 2, experts)
    else:
        bias = shift + 0.2 * rng.standard_normal(experts)
    bias = bias.astype(np.float32)
    logits = np.zeros((tokens, experts), np.float32)
    again = np.ones(tokens, bool)
    while again.any():
        shape = (again.sum(), experts)
        logits[again] = rng.integers(0, levels, shape) if levels else 1.5 * rng.standard_normal(shape)
        again = unclear(logits, bias, groups)
    name = f"{tokens} tokens, {chosen} of {experts} experts, {kept} of {groups} groups, {levels} levels, shift {shift}"
    return Routing(name, logits, bias, groups, kept, chosen, normalize)


def tiny_routings() -> list[Routing]:
    """For the interpreter."""
    return [routing(5, 16, 4, 2, 3), routing(3, 8, 2, 1, 2, levels=2, normalize=False)]


def real_routings() -> list[Routing]:
    """What a GPU is asked for."""
    model = (256, 8, 4, 8)
    return [
        *(routing(tokens, *model, seed=tokens) for tokens in (1, 7, 128, 4096)),
        *(routing(257, *model, levels=levels, seed=levels) for levels in (1, 2, 3)),
        routing(130, *model, shift=-3.0),
        routing(130, *model, normalize=False),
        *(routing(37, experts, 4, 2, 3, levels=levels) for experts in (8, 16, 32, 64, 128) for levels in (0, 2)),
        routing(37, 64, 32, 5, 8),
        routing(37, 256, 1, 1, 8),
        routing(37, 8, 4, 1, 4, levels=2),  # more than the kept groups have
    ]


def check_routing(case: Routing, experts: jax.Array, weights: jax.Array) -> None:
    """Exactly those experts, and their weights."""
    expected, expected_weights = case.expected()
    if case.kept * (case.logits.shape[1] // case.groups) >= case.chosen:
        np.testing.assert_array_equal(np.asarray(experts), expected)
        np.testing.assert_allclose(np.asarray(weights), expected_weights, rtol=2e-6)
    else:
        expected, expected_weights = map(np.asarray, case.run("reference"))
        np.testing.assert_array_equal(np.asarray(experts), expected)
        np.testing.assert_allclose(np.asarray(weights), expected_weights, rtol=2e-6)


# ---- plans -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """Arguments of `make_plan`."""

    name: str
    experts: np.ndarray
    valid: np.ndarray
    num_experts: int
    tile: int | None

    def run(self, backend: str) -> RoutingPlan:
        """The op."""
        return make_plan(
            jnp.asarray(self.experts), jnp.asarray(self.valid), self.num_experts, self.tile, backend=backend
        )


def plan(
    tokens: int,
    chosen: int,
    experts: int,
    *,
    tile: int | None = None,
    used: int | None = None,
    valid: float = 0.9,
    others: int = 0,
) -> Plan:
    """Random choices among the last `used` experts; a token is valid with the probability `valid`. The first `others`
    experts are on other devices: the rest count from 0, and a choice of another is the number of the rest."""
    rng = np.random.default_rng(tokens)
    used = used or experts
    choices = np.argsort(rng.random((tokens, used)), axis=-1)[:, :chosen] + (experts - used)
    name = f"{tokens} tokens, {chosen} of {used} of {experts} experts, {others} elsewhere, tile {tile}, valid {valid}"
    choices = np.where(choices < others, experts - others, choices - others)
    return Plan(name, choices.astype(np.int32), rng.random(tokens) < valid, experts - others, tile)


def tiny_plans() -> list[Plan]:
    """For the interpreter."""
    return [plan(6, 3, 10, tile=3), plan(70, 2, 8, used=2), plan(9, 2, 8, tile=2, others=6)]


def real_plans() -> list[Plan]:
    """What a GPU is asked for."""
    return [
        *(plan(tokens, 8, 256) for tokens in (1, 2, 15, 32, 127, 128, 1000, 1024, 4095, 4096, 8200)),
        plan(4096, 8, 256, tile=64, used=8, valid=1.0),  # most experts empty
        plan(4096, 1, 256, used=1),  # all to one expert
        plan(130, 8, 256, valid=0.0),
        plan(511, 3, 10, tile=3),
        plan(300, 2, 8, tile=7),
        plan(64, 8, 40, tile=16),
        plan(1024, 8, 256, tile=32, others=224),  # one of eight devices
    ]


def check_plan(case: Plan, got: RoutingPlan) -> None:
    """The reference's arrays, exactly."""
    wanted = case.run("reference")
    assert got.tile == wanted.tile
    for name in ("row_token", "tile_expert", "token_row"):
        np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name), err_msg=name)


# ---- rows --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rows:
    """A plan with arguments of `gather_rows` and `combine`: NaN in tokens and rows that are padding."""

    plan: Plan
    x: np.ndarray
    rows: np.ndarray
    weights: np.ndarray

    def gathered(self, backend: str) -> jax.Array:
        """`gather_rows`."""
        return gather_rows(jnp.asarray(self.x), self.plan.run("reference"), backend=backend)

    def gathered_fp8(self, backend: str, scale_fmt: str | None, by_group: bool) -> tuple[jax.Array, jax.Array]:
        """`gather_rows_fp8`."""
        x, plan = jnp.asarray(self.x), self.plan.run("reference")
        return gather_rows_fp8(x, plan, scale_fmt, scales_by_group=by_group, backend=backend)

    def combined(self, backend: str) -> jax.Array:
        """`combine`."""
        rows, weights = jnp.asarray(self.rows), jnp.asarray(self.weights)
        return combine(rows, weights, self.plan.run("reference"), backend=backend)

    def expected_sum(self) -> np.ndarray:
        """Each token's rows, weighted and added up in the order of the choices, every step rounded to float32."""
        token_row = np.asarray(self.plan.run("reference").token_row)
        total = np.zeros((len(token_row), self.rows.shape[1]), np.float32)
        for choice, rows in enumerate(token_row.T):
            product = self.weights[:, choice, None] * self.rows[np.maximum(rows, 0)].astype(np.float32)
            total += np.where(rows[:, None] >= 0, product, np.float32(0))
        return total


def rows(case: Plan, width: int, *, dtype: str = "bfloat16") -> Rows:
    """Random values, whose sizes differ by powers of e; the rows that come back are of `dtype`."""
    rng = np.random.default_rng(width)
    tokens = len(case.experts)
    x = rng.standard_normal((tokens, width)) * np.exp(3 * rng.standard_normal((tokens, 1)))
    x[~case.valid] = np.nan
    row_token = np.asarray(case.run("reference").row_token)
    back = rng.standard_normal((len(row_token), width), np.float32)
    back[row_token < 0] = np.nan
    back = back.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    return Rows(case, x.astype(ml_dtypes.bfloat16), back, rng.random(case.experts.shape, np.float32))


def check_bytes(got: jax.Array, wanted: jax.Array) -> None:
    """The same bits."""
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.asarray(wanted).view(np.uint8))
