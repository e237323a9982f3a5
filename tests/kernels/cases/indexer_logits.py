"""Calls of `indexer_logits` over a paged FP8 cache, with NaN wherever nothing may be read."""

import dataclasses

import ml_dtypes
import numpy as np

BLOCK, DIM = 64, 128
E4M3 = ml_dtypes.float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of the op, and the float32 keys and scales of each sequence for a reference of one's own."""

    name: str
    queries: np.ndarray
    head_weights: np.ndarray
    index: np.ndarray
    layer: int
    block_tables: np.ndarray
    sequence: np.ndarray
    positions: np.ndarray
    keys: list[np.ndarray]
    scales: list[np.ndarray]

    @property
    def arguments(self) -> tuple:
        """In the op's order."""
        return (
            self.queries,
            self.head_weights,
            self.index,
            self.layer,
            self.block_tables,
            self.sequence,
            self.positions,
        )

    @property
    def visible(self) -> np.ndarray:
        """bool [T, N * 64]: which scores are not -inf."""
        return np.arange(self.block_tables.shape[1] * BLOCK) <= self.positions[:, None]


def case(name: str, tokens: list[tuple[int, int]], *, heads: int = 64, more_blocks: int = 0, seed: int = 0) -> Case:
    """Tokens of (sequence, position) in their order; a position of -1 is padding.

    The blocks of a sequence are those that its tokens see, in random places; every other block, the end of the last
    one, and the other layer hold NaN. `more_blocks` columns of the block tables are -1 in all rows.
    """
    rng = np.random.default_rng(seed)
    sequence, positions = np.array(tokens, np.int32).T if tokens else np.zeros((2, 0), np.int32)
    sequences = int(sequence.max(initial=0)) + 1
    lengths = [int(positions[sequence == s].max(initial=-1)) + 1 for s in range(sequences)]
    counts = [-(-length // BLOCK) for length in lengths]
    places = iter(rng.permutation(sum(counts) + 3))
    tables = np.full((sequences, max(counts) + more_blocks), -1, np.int32)
    index = np.full((2, sum(counts) + 3, BLOCK * (DIM + 4)), 0xFF, np.uint8)
    keys, scales = [], []
    for s, length in enumerate(lengths):
        keys.append((rng.standard_normal((length, DIM), np.float32) * 60).astype(E4M3))
        scales.append(np.exp(rng.standard_normal(length, np.float32)))
        for block in range(counts[s]):
            tables[s, block] = place = next(places)
            rows = slice(block * BLOCK, min(length, (block + 1) * BLOCK))
            size = rows.stop - rows.start
            index[1, place, : size * DIM] = keys[s][rows].view(np.uint8).reshape(-1)
            index[1, place, BLOCK * DIM :][: size * 4] = scales[s][rows].view(np.uint8)
    queries = (rng.standard_normal((len(tokens), heads, DIM), np.float32) * 60).astype(E4M3)
    weights = rng.standard_normal((len(tokens), heads), np.float32)
    keys = [k.astype(np.float32) for k in keys]
    return Case(name, queries, weights, index, 1, tables, sequence, positions, keys, scales)


def expected(case: Case, dtype=np.float64) -> np.ndarray:
    """[T, N * 64] in NumPy."""
    scores = np.full(case.visible.shape, -np.inf, dtype)
    for t, (s, position) in enumerate(zip(case.sequence, case.positions, strict=True)):
        keys = case.keys[s][: position + 1].astype(dtype)
        dots = np.maximum(keys @ case.queries[t].astype(dtype).T, 0)
        scores[t, : position + 1] = dots @ case.head_weights[t].astype(dtype) * case.scales[s][: position + 1]
    return scores


def last(length: int, count: int, sequence: int = 0) -> list[tuple[int, int]]:
    """The last `count` tokens of a sequence of `length`."""
    return [(sequence, position) for position in range(length - count, length)]


def tiny() -> list[Case]:
    """For the interpreter: each has partial runs and tiles, and both halves of the ring."""
    mixture = [*last(130, 4), (1, 5), (2, -1), *last(70, 3, sequence=2), (1, -1)]
    return [
        case("one sequence", last(200, 8), heads=4),
        case("mixture with decode tokens and padding", mixture, heads=3, more_blocks=1),
        case("padding alone", [(0, 5), (0, -1), (0, -1)], heads=2),
        case("one token", last(300, 1), heads=1),
        case("one token a sequence", [(0, 150), (1, -1), (2, 63), (3, 64)], heads=5, more_blocks=3),
        case("two tokens a sequence", [*last(150, 2), *last(66, 2, 1), (2, 0), (2, -1)], heads=2),
    ]


def real() -> list[Case]:
    """For the GPU."""
    rng = np.random.default_rng(1)
    many = [(s, int(p)) for s, p in enumerate(rng.integers(0, 9000, 50))]
    mixture = [*last(3001, 131), *many[1:20], *[(0, -1)] * 3, *last(777, 777, 20), *last(5000, 64, 21), *[(0, -1)] * 9]
    return [
        case("prefill", last(8192, 1000)),
        case("whole prompt", last(2500, 2500), heads=32),
        case("mixture", mixture, more_blocks=5),
        case("decode", many, more_blocks=7),
        case("decode with padding", [(s, p if s % 3 else -1) for s, p in many], heads=4),
        case("decode of pairs", [x for s, p in many for x in ((s, p), (s, p + 1))]),
        case("one long sequence", last(40000, 1)),
        *[case(f"{count} tokens", last(1000, count), seed=count) for count in (1, 2, 3, 5, 6, 7, 12, 13, 20)],
    ]
