"""Products of many rows: dense and grouped, FP8 with scales and bfloat16, and what they should give in float64."""

import dataclasses

import ml_dtypes
import numpy as np

E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of `many_rows_matmul`: None where a form has none."""

    name: str
    x: np.ndarray
    row_scales: np.ndarray | None
    weights: np.ndarray
    weight_scales: np.ndarray | None
    tile_expert: np.ndarray | None

    @property
    def arguments(self) -> tuple:
        """In the kernel's order."""
        return self.x, self.row_scales, self.weights, self.weight_scales, self.tile_expert


def case(
    name: str, rows: int, columns: int, depth: int, *, fp8: bool, tile_expert: list[int] | None = None, seed: int = 0
) -> Case:
    """Standard normal rows (a quarter of the last tile's are zeros, as padding is) and weights of scattered magnitude.

    Scales are no powers of two, and those of neighbouring blocks differ by up to a factor of 16: a wrong one shows.
    """
    rng = np.random.default_rng(seed)
    experts = () if tile_expert is None else (max(tile_expert) + 2,)  # one that no row belongs to
    x = rng.standard_normal((rows, depth)).astype(np.float32)
    x[rows - rows // 8 :] = 0
    weights = rng.standard_normal((*experts, columns, depth)).astype(np.float32)
    row_scales = weight_scales = None
    if fp8:
        x, weights = (x * 50).astype(E4M3), (weights * 50).astype(E4M3)
        row_scales = rng.uniform(0.25, 4, (depth // BLOCK, rows)).astype(np.float32) / 50
        weight_scales = rng.uniform(0.25, 4, (*experts, -(-columns // BLOCK), depth // BLOCK)).astype(np.float32) / 50
    else:
        x, weights = x.astype(BF16), weights.astype(BF16)
    if tile_expert is not None:
        weights[-1] = np.nan
    chosen = None if tile_expert is None else np.array(tile_expert, np.int32)
    return Case(name, x, row_scales, weights, weight_scales, chosen)


def expected(case: Case) -> np.ndarray:
    """float64 [M, N]."""
    x, weights = case.x.astype(np.float64), case.weights.astype(np.float64)
    if case.row_scales is not None:
        x = x * np.repeat(case.row_scales.T, BLOCK, axis=1)
        scales = np.repeat(np.repeat(case.weight_scales, BLOCK, axis=-2), BLOCK, axis=-1)
        weights = weights * scales[..., : weights.shape[-2], :]
    if case.tile_expert is None:
        return x @ weights.T
    tiles = x.reshape(len(case.tile_expert), -1, x.shape[1])
    return np.concatenate([tile @ weights[e].T for tile, e in zip(tiles, case.tile_expert, strict=True)])


def forms(name: str, rows: int, columns: int, depth: int, **options) -> list[Case]:
    """FP8 and bfloat16."""
    return [
        case(f"{'fp8' if fp8 else 'bf16'} {name}", rows, columns, depth, fp8=fp8, **options) for fp8 in (True, False)
    ]


def tiny() -> list[Case]:
    """For the interpreter: tiles of 64 rows and 256 columns."""
    return [
        *forms("one tile", 64, 256, 256),
        *forms("ragged rows and columns", 150, 320, 256),
        *forms("grouped", 256, 128, 256, tile_expert=[0, 2, 2, 1]),
        *forms("grouped in tiles of two", 256, 64, 128, tile_expert=[1, 0]),
    ]


def real() -> list[Case]:
    """For a GPU: more tiles than multiprocessors, ragged ends, and K longer than the ring."""
    return [
        *forms("one tile", 128, 256, 128),
        *forms("one row", 1, 576, 7168),
        *forms("ragged", 333, 1600, 1536),
        *forms("many", 4096, 7168, 2048),
        *forms("long", 1000, 576, 7168),
        *forms("grouped 128", 128 * 40, 4096, 512, tile_expert=sorted([i % 7 for i in range(40)])),
        *forms("grouped 64", 64 * 24, 1024, 1024, tile_expert=[i // 3 for i in range(24)]),
        *forms("one expert", 128 * 8, 512, 896, tile_expert=[3] * 8),
    ]
