"""FP8 products with few rows, dense and grouped, with NaN scales where nothing may be read."""

import dataclasses

import ml_dtypes
import numpy as np

from pallas_kernels.hopper import SMS
from pallas_kernels.matmul.config import TILES, FewRows
from pallas_kernels.matmul.schemes import Scheme

E4M3 = ml_dtypes.float8_e4m3fn
BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of the products: `tile_expert` and `used_tiles` for the grouped one only; its weights are [E, N, K]."""

    name: str
    x: np.ndarray
    x_scales: np.ndarray
    values: np.ndarray
    scales: np.ndarray
    tile_expert: np.ndarray | None = None
    used_tiles: int = 1

    @property
    def arguments(self) -> tuple:
        """In the functions' order."""
        plan = () if self.tile_expert is None else (self.tile_expert, np.int32(self.used_tiles))
        return (self.x, self.x_scales, self.values, self.scales, *plan)

    @property
    def written(self) -> int:
        """Rows of the result that are."""
        if self.tile_expert is None:
            return self.x.shape[0]
        return self.used_tiles * (self.x.shape[0] // len(self.tile_expert))


def quantised(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Values as after quantisation: up to 448."""
    return np.clip(rng.standard_normal(shape, np.float32) * 100, -448, 448).astype(E4M3)


def positive(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Scales that differ by some powers of two, and are none."""
    return np.exp(rng.standard_normal(shape, np.float32)).astype(np.float32) * np.float32(1e-2)


def dense(name: str, tokens: int, rows: int, columns: int, seed: int = 0) -> Case:
    """x [tokens, columns] and a weight [rows, columns]."""
    rng = np.random.default_rng(seed)
    blocks = columns // BLOCK
    return Case(
        name,
        quantised(rng, tokens, columns),
        positive(rng, tokens, blocks),
        quantised(rng, rows, columns),
        positive(rng, -(-rows // BLOCK), blocks),
    )


def grouped(
    name: str, counts: dict[int, int], experts: int, tile: int, rows: int, columns: int, spare: int = 2
) -> Case:
    """`counts`: rows of each expert that is used; `spare` tiles at the end are not.

    The scales of other experts and of rows in unused tiles are NaN.
    """
    rng = np.random.default_rng(0)
    blocks = columns // BLOCK
    tile_expert = [expert for expert, count in sorted(counts.items()) for _ in range(-(-count // tile))]
    used, tiles = len(tile_expert), len(tile_expert) + spare
    scales = positive(rng, experts, -(-rows // BLOCK), blocks)
    scales[[expert for expert in range(experts) if expert not in counts]] = np.nan
    x = np.zeros((tiles * tile, columns), E4M3)
    x_scales = np.full((tiles * tile, blocks), np.nan, np.float32)
    x_scales[: used * tile] = 1e-4
    place = 0
    for _, count in sorted(counts.items()):
        x[place : place + count] = quantised(rng, count, columns)
        x_scales[place : place + count] = positive(rng, count, blocks)
        place += -(-count // tile) * tile
    return Case(
        name,
        x,
        x_scales,
        quantised(rng, experts, rows, columns),
        scales,
        np.array(tile_expert + [experts - 1] * spare, np.int32),
        used,
    )


def expected(case: Case, dtype=np.float64) -> np.ndarray:
    """The rows that are written, in NumPy."""

    def full(values, scales, rows):
        scales = np.repeat(scales, rows, axis=0)[: values.shape[0]] if rows > 1 else scales
        return values.astype(dtype) * np.repeat(scales, BLOCK, axis=1).astype(dtype)

    x = full(case.x, case.x_scales, 1)
    if case.tile_expert is None:
        return x @ full(case.values, case.scales, BLOCK).T
    tile = len(x) // len(case.tile_expert)
    return np.concatenate(
        [
            x[i * tile : (i + 1) * tile] @ full(case.values[expert], case.scales[expert], BLOCK).T
            for i, expert in enumerate(case.tile_expert[: case.used_tiles])
        ]
        or [np.zeros((0, case.values.shape[1]), dtype)]
    )


def tiny() -> list[Case]:
    """For the interpreter."""
    return [
        dense("one row", 1, 128, 1024),
        dense("part of a tile", 5, 192, 512),
        dense("two tiles' worth", 16, 64, 1024),
        grouped("experts", {1: 3, 2: 9, 4: 8}, 5, 8, 128, 512),
        grouped("experts of two parts", {0: 3, 2: 20}, 4, 16, 128, 512, spare=1),
        grouped("nothing", {}, 2, 8, 64, 512),
    ]


def uneven(tile: int) -> list[Case]:
    """For each config with such tiles: strips that end within a group of scales, and past the weight or an expert's."""
    return [
        dense("dense", tile - tile // 4, 1216, 1024, seed=tile),
        grouped("grouped", {0: 3, 2: tile + 1, 4: tile}, 6, tile, 320, 512),
    ]


def token_parts() -> list[FewRows]:
    """Configs whose warpgroups share rows: one part of a strip and two, of 64 rows and less."""
    return [
        FewRows(tile=16, rows=64, warpgroups=2, token_parts=2, blocks=4, stages=3),
        FewRows(tile=64, rows=64, warpgroups=2, token_parts=2, blocks=2, stages=5),
        FewRows(tile=64, rows=112, warpgroups=4, token_parts=2, blocks=2, stages=4),
        FewRows(tile=128, rows=64, warpgroups=2, token_parts=2, blocks=1, stages=8),
        FewRows(tile=128, rows=56, warpgroups=2, token_parts=2, blocks=1, stages=4, ctas=2 * SMS),
        FewRows(tile=128, rows=48, warpgroups=2, token_parts=2, blocks=2, stages=4),
        FewRows(tile=128, rows=96, warpgroups=4, token_parts=2, blocks=2, stages=3),
        FewRows(tile=128, rows=96, warpgroups=4, token_parts=2, blocks=1, stages=6),
        FewRows(tile=128, rows=128, warpgroups=8, token_parts=4, blocks=1, stages=6),
    ]


def real() -> list[Case]:
    """For the GPU."""
    return [
        *[dense(f"{tokens} rows", tokens, 7168, 2048, seed=tokens) for tokens in (1, 7, 8, 9, 16, 31, 64, 65, 128)],
        *[dense(f"{tokens} rows of 4096 x 7168", tokens, 4096, 7168, seed=tokens) for tokens in (1, 16, 40, 128)],
        *[dense(f"{tokens} rows of 36864 x 512", tokens, 36864, 512, seed=tokens) for tokens in (1, 16, 40, 128)],
        dense("tall strips", 128, 24576, 512),
        dense("few strips", 3, 576, 7168),
        dense("half a block of scales at the end", 20, 2112, 1536),
        grouped("one row each", dict.fromkeys((0, 3, 5, 9, 11), 1), 12, 8, 4096, 2048, spare=3),
        grouped("several tiles of an expert", {0: 1, 1: 17, 4: 40, 6: 8}, 8, 8, 1024, 1536),
        grouped("tiles of 32", {0: 16, 1: 32, 3: 33, 4: 1}, 6, 32, 1024, 1536),
        grouped("tiles of 128", {2: 200, 3: 1}, 4, 128, 1024, 1536),
        grouped("nothing", {}, 4, 8, 1024, 1536),
    ]


def tuned(scheme: Scheme, rows: int, columns: int, depth: int, tiles: int | None = None):
    """The config of the kernel of few rows at a shape, whichever kernel the op would choose."""
    tile = next(tile for tile in TILES if tile >= rows) if tiles is None else rows // tiles
    return scheme.few_rows_config(min(tile, scheme.few_tiles[-1]), columns, tiles or 1, depth)
