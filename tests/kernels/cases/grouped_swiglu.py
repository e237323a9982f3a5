"""Gate and up as one product with SwiGLU behind it: FP8 and bfloat16, by expert or not, and bounds of what is right."""

import dataclasses

import ml_dtypes
import numpy as np

from tests.kernels.cases import many_rows_matmul as products

E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of `grouped_swiglu`: None where a form has none; row_scales are [K / 128, P]."""

    name: str
    rows: np.ndarray
    row_scales: np.ndarray | None
    gate: np.ndarray
    gate_scales: np.ndarray | None
    up: np.ndarray
    up_scales: np.ndarray | None
    tile_expert: np.ndarray | None

    @property
    def tile(self) -> int | None:
        """Rows of an expert's tile."""
        return None if self.tile_expert is None else self.rows.shape[0] // len(self.tile_expert)


def case(
    name: str, rows: int, width: int, depth: int, *, fp8: bool, tile_expert: list[int] | None = None, seed: int = 0
) -> Case:
    """Both products have a deviation of about 2, so that the bend of silu counts. The last eighth of the rows is 0.

    Scales are no powers of two and differ by up to a factor of 16 between neighbours: a wrong one shows.
    """
    gate = products.case(name, rows, width, depth, fp8=fp8, tile_expert=tile_expert, seed=seed)
    up = products.case(name, rows, width, depth, fp8=fp8, tile_expert=tile_expert, seed=seed + 1)

    def shrunk(part: products.Case) -> tuple[np.ndarray, np.ndarray | None]:
        factor = np.float32(0.5 if fp8 else 2) / np.float32(np.sqrt(depth))
        if fp8:
            return part.weights, part.weight_scales * factor
        return (part.weights.astype(np.float32) * factor).astype(BF16), None

    return Case(name, gate.x, gate.row_scales, *shrunk(gate), *shrunk(up), gate.tile_expert)


def expected(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float64 [P, W]: the gate's product, up's, and the result, nothing of them rounded."""
    shared = case.rows, case.row_scales

    def product(weights, scales):
        return products.expected(products.Case(case.name, *shared, weights, scales, case.tile_expert))

    gate, up = product(case.gate, case.gate_scales), product(case.up, case.up_scales)
    return gate, up, gate / (1 + np.exp(-gate)) * up


def rounded(case: Case) -> np.ndarray:
    """`expected` in float64, rounded to bfloat16 where the op rounds."""
    gate, up, _ = (x.astype(BF16).astype(np.float64) for x in expected(case))
    return (gate / (1 + np.exp(-gate)) * up).astype(BF16).astype(np.float64)


def bound(case: Case) -> np.ndarray:
    """How far from `expected` a right bfloat16 result may be.

    The gate, up and the result are each rounded, by 2^-8 of them at most; silu makes up to 1 + |gate| times of that.
    Sums in float32, in whatever order, are off by 1e-5 of the largest.
    """
    gate, up, hidden = expected(case)
    inexact = 1e-5 * (np.abs(gate).max(initial=0) * np.abs(up) + np.abs(up).max(initial=0) * np.abs(gate))
    return 1.02 * 2**-8 * (3 + np.abs(gate)) * np.abs(hidden) + inexact


def check(got: np.ndarray, case: Case, rows: slice = slice(None)) -> None:
    """Asserts that a bfloat16 result is right."""
    hidden, most = expected(case)[2][rows], bound(case)[rows]
    error = np.abs(np.nan_to_num(got[rows].astype(np.float64), nan=np.inf) - hidden)
    worst = np.unravel_index(np.argmax(error - most), error.shape)
    assert (error <= most).all(), f"at {worst}: {got[rows][worst]}, not {hidden[worst]} within {most[worst]}"


def check_quantized(values: np.ndarray, scales: np.ndarray, case: Case, rows: slice = slice(None)) -> None:
    """Asserts that FP8 values with scales [P, W / 128] are right: half a step of e4m3 further off.

    A step is an eighth of a value's power of two, or 2^-9 for the smallest ones; and a scale no larger than needed.
    """
    hidden, most = expected(case)[2][rows], bound(case)[rows]
    full = np.repeat(scales[rows].astype(np.float64), BLOCK, axis=1)
    error = np.abs(np.nan_to_num(values[rows].astype(np.float64), nan=np.inf) * full - hidden)
    assert (error <= most + 2**-4 * (np.abs(hidden) + most) + 2**-10 * full).all()
    largest = np.abs(hidden).reshape(*scales[rows].shape, BLOCK).max(axis=2)
    assert (scales[rows] <= 2.05 * np.maximum(largest, 1e-4) / 448).all()


def forms(name: str, *arguments, **options) -> list[Case]:
    """FP8 and bfloat16."""
    return [case(f"{'fp8' if fp8 else 'bf16'} {name}", *arguments, fp8=fp8, **options) for fp8 in (True, False)]


def real() -> list[Case]:
    """For a GPU, many rows."""
    return [
        *forms("one tile", 128, 128, 128),
        *forms("one row", 1, 384, 7168),
        *forms("ragged", 333, 640, 1536),
        *forms("many", 4096, 2048, 1024),
        *forms("grouped 128", 128 * 40, 2048, 512, tile_expert=sorted([i % 7 for i in range(40)])),
        *forms("grouped 64", 64 * 24, 512, 896, tile_expert=[i // 3 for i in range(24)]),
        *forms("one expert", 128 * 8, 256, 896, tile_expert=[3] * 8),
    ]


def real_few() -> list[Case]:
    """For a GPU, few rows: strips of all widths."""
    return [
        case("1 row", 1, 2048, 2048, fp8=True),
        case("9 rows", 9, 2048, 1536, fp8=True),
        case("31 rows", 31, 2048, 1536, fp8=True),
        case("64 rows", 64, 2048, 512, fp8=True),
        case("7 rows, wide", 7, 18432, 512, fp8=True),
        case("64 rows, wide", 64, 18432, 512, fp8=True),
        case("8 experts of 8", 64, 2048, 7168, fp8=True, tile_expert=[0, 2, 3, 5, 5, 5, 6, 9]),
        case("3 experts of 8", 24, 2048, 1536, fp8=True, tile_expert=[0, 2, 2]),
        case("12 tiles of 16", 192, 2048, 1536, fp8=True, tile_expert=[i // 2 for i in range(12)]),
        case("7 tiles of 32", 224, 2048, 1536, fp8=True, tile_expert=[0, 0, 1, 2, 4, 4, 5]),
        case("8 tiles of 64", 512, 2048, 1536, fp8=True, tile_expert=[0, 0, 1, 2, 4, 4, 5, 5]),
        case("40 tiles of 8", 320, 1024, 512, fp8=True, tile_expert=[i // 3 for i in range(40)]),
    ]
