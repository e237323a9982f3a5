"""Products with int8 and four-bit weights, dense and grouped, with NaN wherever nothing may be read."""

import dataclasses

import ml_dtypes
import numpy as np

from tests.kernels.cases.few_rows import positive

BF16 = ml_dtypes.bfloat16
GROUP = 128


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which expert each tile has, and how many tiles are used; `counts`: rows of each expert that is."""

    counts: dict[int, int]
    experts: int
    tile: int
    spare: int = 2

    @property
    def tile_expert(self) -> np.ndarray:
        """Of the tiles in use, then of the spare ones."""
        used = [e for e, count in sorted(self.counts.items()) for _ in range(-(-count // self.tile))]
        return np.array(used + [self.experts - 1] * self.spare, np.int32)

    @property
    def used(self) -> int:
        """Tiles."""
        return len(self.tile_expert) - self.spare

    @property
    def filled(self) -> np.ndarray:
        """bool [P]: which rows hold something; others of used tiles hold zeros."""
        rows = np.zeros((len(self.tile_expert), self.tile), bool)
        place = 0
        for _, count in sorted(self.counts.items()):
            tiles = -(-count // self.tile)
            rows[place : place + tiles].reshape(-1)[:count] = True
            place += tiles
        return rows.reshape(-1)


@dataclasses.dataclass(frozen=True)
class Case:
    """One product; the weight's arrays have a leading axis of experts where there is a plan."""

    name: str
    x: np.ndarray
    weight: tuple[np.ndarray, ...]
    plan: Plan | None
    x_scales: np.ndarray | None = None

    @property
    def written(self) -> int:
        """Rows of the result that are."""
        return len(self.x) if self.plan is None else self.plan.used * self.plan.tile

    def by_expert(self, product) -> np.ndarray:
        """`product(rows, *weight)` for the rows of each tile in use; rows: slices of x."""
        if self.plan is None:
            return product(slice(None), *self.weight)
        tile = self.plan.tile
        parts = [
            product(slice(i * tile, (i + 1) * tile), *(part[expert] for part in self.weight))
            for i, expert in enumerate(self.plan.tile_expert[: self.plan.used])
        ]
        return np.concatenate(parts) if parts else np.zeros((0, self.weight[0].shape[-2]))


def of(name: str, rows: int | Plan, out: int, columns: int) -> tuple[str, int, Plan | None, tuple[int, ...]]:
    """Name, rows of x, plan, and leading axes of the weight."""
    name = f"{name}, {out} x {columns}"
    if isinstance(rows, Plan):
        return name, len(rows.filled), rows, (rows.experts,)
    return name, rows, None, ()


def int8(name: str, rows: int | Plan, out: int, columns: int) -> Case:
    """x int8 with its scales, and (values, scales); scales that nobody may read are NaN."""
    name, count, plan, experts = of(name, rows, out, columns)
    rng = np.random.default_rng(count)
    x, x_scales = rng.integers(-127, 128, (count, columns), np.int8), positive(rng, count)
    values, scales = rng.integers(-127, 128, (*experts, out, columns), np.int8), positive(rng, *experts, out)
    if plan is not None:
        x[~plan.filled] = 0
        x_scales[plan.used * plan.tile :] = np.nan
        scales[[e for e in range(plan.experts) if e not in plan.counts]] = np.nan
    return Case(name, x, (values, scales), plan, x_scales)


def expected_int8(case: Case) -> np.ndarray:
    """float32 [rows written, N], to the last bit: sums of whole numbers are exact in float64."""

    def product(rows, values, scales):
        sums = case.x[rows].astype(np.float64) @ values.astype(np.float64).T
        return sums.astype(np.float32) * (case.x_scales[rows, None] * scales)

    return case.by_expert(product)


def int4(name: str, rows: int | Plan, out: int, columns: int) -> Case:
    """x bfloat16 and (values [..., N, K], scales, zeros), all values and zeros alike; NaN that nobody may read."""
    name, count, plan, experts = of(name, rows, out, columns)
    rng = np.random.default_rng(count)
    x = rng.standard_normal((count, columns), np.float32).astype(BF16)
    values = rng.integers(0, 16, (*experts, out, columns), np.uint8)
    scales = positive(rng, *experts, out, columns // GROUP).astype(BF16)
    zeros = rng.integers(0, 16, scales.shape, np.uint8)
    if plan is not None:
        x[~plan.filled] = 0
        x[plan.used * plan.tile :] = np.nan
        scales[[e for e in range(plan.experts) if e not in plan.counts]] = np.nan
    return Case(name, x, (values, scales, zeros), plan)


def expected_int4(case: Case, dtype=np.float64) -> np.ndarray:
    """[rows written, N]."""

    def product(rows, values, scales, zeros):
        grouped = values.reshape(*scales.shape, GROUP).astype(dtype)
        weight = (grouped - zeros[..., None].astype(dtype)) * scales[..., None].astype(dtype)
        return case.x[rows].astype(dtype) @ weight.reshape(len(values), -1).T

    return case.by_expert(product)


SPREAD = {1: 3, 2: 9, 4: 8}
"""Rows of experts: part of a tile, more than one, and a whole one, if a tile has 8."""


def tiny(kind) -> list[Case]:
    """For the interpreter; `kind` is `int8` or `int4`."""
    return [
        kind("one row", 1, 128, 1024),
        kind("part of a tile", 5, 128, 512),
        kind("a whole tile", 8, 64, 1024),
        kind("experts", Plan(SPREAD, 5, 8), 128, 512),
        kind("two tiles' worth", 16, 192, 512),
        kind("experts of two parts", Plan({0: 3, 2: 20}, 4, 16, spare=1), 128, 512),
        kind("nothing", Plan({}, 2, 8), 64, 512),
    ]


def uneven(kind, tile: int) -> list[Case]:
    """For each config with such tiles: strips that end past the weight's end, or an expert's."""
    return [
        kind("dense", tile - tile // 4, 1216, 1024),
        kind("grouped", Plan({0: 3, 2: tile + 1, 4: tile}, 6, tile), 320, 1024),
    ]


def real(kind) -> list[Case]:
    """For the GPU: what both kernels take."""
    return [
        *[kind(f"{rows} rows", rows, 7168, 2048) for rows in (1, 5, 8, 9, 16, 17, 31, 32, 33, 64, 65, 100, 128)],
        *[kind(f"{rows} rows", rows, 4096, 7168) for rows in (1, 16, 40)],
        *[kind(f"{rows} rows", rows, 36864, 512) for rows in (1, 16, 40, 128)],
        *[kind(f"{rows} rows", rows, 64, 512) for rows in (1, 32)],
        *[kind(f"{rows} rows", rows, *size) for rows in (3, 100) for size in ((576, 1536), (13312, 512))],
        kind("one row each", Plan(dict.fromkeys((0, 3, 5, 9, 11), 1), 12, 8, spare=3), 4096, 2048),
        kind("several tiles of an expert", Plan({0: 1, 1: 17, 4: 40, 6: 8}, 8, 8), 1024, 1536),
        kind("tiles of 16", Plan({0: 16, 2: 33}, 3, 16), 1024, 1536),
        kind("tiles of 32", Plan({0: 16, 1: 32, 3: 33, 4: 1}, 6, 32), 1024, 1536),
        kind("tiles of 64", Plan({1: 100, 3: 1}, 5, 64), 1024, 512),
        kind("tiles of 128", Plan({2: 200, 3: 1}, 4, 128), 1024, 1536),
        kind("nothing", Plan({}, 4, 8), 1024, 1536),
    ]


def many_tiny() -> list[Case]:
    """int8 products of many rows, for the interpreter: tiles of 64 or 128 rows and 256 columns, ragged ends."""
    return [
        int8("ragged rows", 130, 192, 256),
        int8("one piece of columns", 70, 64, 256),
        int8("columns of two tiles", 64, 320, 128),
        int8("experts", Plan({0: 130, 2: 128}, 4, 128, spare=1), 192, 256),
        int8("nothing", Plan({}, 2, 128), 64, 128),
    ]


def many_real() -> list[Case]:
    """The same for the GPU: more tiles than multiprocessors, and K longer than the ring; x at its limits in one."""
    extreme = int8("largest values", 300, 576, 7168)
    extreme.x[:], extreme.weight[0][::2], extreme.weight[0][1::2] = -127, -127, 127
    return [
        *[int8(f"{rows} rows", rows, 576, 1536) for rows in (1, 64, 65, 129, 1000)],
        int8("one step", 200, 64, 128),
        int8("odd steps", 777, 1600, 896),
        int8("many", 4096, 7168, 1024),
        int8("long", 512, 4096, 16384),
        extreme,
        int8("tiles of 64", Plan({1: 100, 3: 1, 4: 64}, 6, 64), 1024, 512),
        int8("tiles of 128", Plan({2: 200, 3: 1, 6: 640}, 8, 128), 2112, 1536),
        int8("tiles of 192", Plan({0: 200, 1: 192}, 3, 192), 576, 640),
        int8("tiles of 256", Plan({0: 300, 2: 1}, 3, 256), 576, 640),
        int8("no rows", Plan({}, 4, 128), 1024, 1536),
    ]
