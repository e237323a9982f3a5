"""Rows of scores that make a selection go wrong, for any length: small for the references, long on a GPU."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """Rows of one kind."""

    name: str
    scores: np.ndarray
    """float32 [T, L]."""
    lengths: np.ndarray
    """int32 [T]: how many scores of each row exist."""


def expected(scores: np.ndarray, length: int, k: int) -> np.ndarray:
    """The chosen positions of one row in ascending order, then -1: a stable sort in float64, where all are exact."""
    row = scores[:length].astype(np.float64)
    choosable = np.flatnonzero(row > -np.inf)  # false for NaN
    chosen = choosable[np.argsort(-row[choosable], kind="stable")][:k]
    return np.concatenate([np.sort(chosen), np.full(k - len(chosen), -1)]).astype(np.int32)


def wrong_rows(case: Case, k: int, chosen: np.ndarray) -> list[int]:
    """Rows of `chosen` (int32 [T, k]) that are not the expected set, or not -1 exactly where nothing is left."""

    def right(t: int) -> bool:
        present = chosen[t][chosen[t] >= 0]
        ordered = np.concatenate(
            [np.sort(present), chosen[t][len(present) :]]
        )  # a -1 among the first ones moves places
        return np.array_equal(ordered, expected(case.scores[t], case.lengths[t], k))

    return [t for t in range(len(chosen)) if not right(t)]


def values(length: int, seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """Named rows float32 [length]; `adversarial` puts them together."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(length, dtype=np.float32)
    infinity = np.float32(np.inf)
    yield "normal", normal
    yield "all equal", np.full(length, 1.5, np.float32)
    yield "all equal and negative", np.full(length, -3.25, np.float32)
    yield "two values", rng.integers(0, 2, length).astype(np.float32)
    yield "four values", rng.integers(-2, 2, length).astype(np.float32)
    yield "ascending", np.sort(normal)
    yield "descending", -np.sort(-normal)
    yield "ascending with ties", np.floor(np.arange(length) / 37).astype(np.float32)
    yield "97 % minus infinity", np.where(rng.random(length) < 0.97, -infinity, normal)
    yield "nothing but minus infinity", np.full(length, -infinity)
    yield "nothing but NaN", np.full(length, np.nan, np.float32)
    yield "lowest numbers", np.where(rng.random(length) < 0.5, np.finfo(np.float32).min, -infinity)
    yield "half NaN", np.where(rng.random(length) < 0.5, np.float32(np.nan), normal)
    yield "some infinity", np.where(rng.random(length) < 0.01, infinity, normal)
    yield "narrow range", np.abs(normal) * np.float32(1e-3) + 1
    yield "negative, narrow range", np.abs(normal) * np.float32(1e-5) - 1
    yield "denormals", (rng.integers(0, 300, length).astype(np.int32)).view(np.float32)
    yield "both zeros", np.where(rng.random(length) < 0.5, np.float32(0), np.float32(-0.0))
    zeros = np.where(rng.random(length) < 0.5, np.float32(0), np.float32(-0.0))
    zeros[rng.integers(0, length, max(1, length // 50))] = np.float32(1e-42)
    zeros[rng.integers(0, length, max(1, length // 50))] = np.float32(-1e-42)
    yield "both zeros and denormals", zeros
    yield "one decimal", np.round(normal, 1)
    yield "random bits", rng.integers(-(2**31), 2**31, length, dtype=np.int64).astype(np.int32).view(np.float32)
    yield "outliers", normal * np.exp(4 * rng.standard_normal(length)).astype(np.float32)
    yield "best at the end", np.where(np.arange(length) < length * 15 // 16, normal, normal + 8)
    yield "best at the start", np.where(np.arange(length) < length // 16, normal + 8, normal)
    yield "hidden from a sample", np.where(np.arange(length) % 512 < 480, np.abs(normal) + 4, normal)
    relu = np.maximum(rng.standard_normal((4, length), dtype=np.float32) - 1, 0)
    yield "indexer, heavy ties at zero", relu.sum(0) * (rng.random(length) < 0.3)
    yield "indexer", np.einsum("h,hl->l", rng.standard_normal(4).astype(np.float32), relu)


def adversarial(length: int, k: int, chunk: int = 4096, seed: int = 0) -> list[Case]:
    """Every kind of row once at full length, and two kinds at awkward lengths with NaN and huge scores beyond them."""
    rows = [row for _, row in values(length, seed)]
    cases = [Case("full rows", np.stack(rows).astype(np.float32), np.full(len(rows), length, np.int32))]

    around = [n + d for n in (k, chunk, 2 * chunk, length // 2) for d in (-1, 0, 1)]
    lengths = sorted({n for n in [0, 1, 2, 3, 5, *around, length - 1, length] if 0 <= n <= length})
    rng = np.random.default_rng(seed + 1)
    for name, scale in (("short rows", 1e3), ("short rows with ties", 2.0)):
        scores = np.floor(rng.standard_normal((len(lengths), length), dtype=np.float32) * np.float32(scale))
        for row, n in zip(scores, lengths, strict=True):
            row[n:] = rng.choice(np.array([np.nan, np.inf, 1e30], np.float32), length - n)
        cases.append(Case(name, scores, np.array(lengths, np.int32)))
    cases.append(tie_case(length, k, chunk, seed))
    return cases


def tie_case(length: int, k: int, chunk: int, seed: int) -> Case:
    """Rows in which k-1, k, k+1, ... scores share the k-th value, on both sides of the borders of chunks."""
    rng = np.random.default_rng(seed + 2)
    rows = []
    for ties in (1, 2, k - 1, k, k + 1, 3 * k):
        row = rng.random(length, dtype=np.float32)  # below 1
        ties = min(max(ties, 1), length)
        near = np.arange(length)
        order = np.argsort(np.minimum(near % chunk, chunk - near % chunk), kind="stable")  # nearest to a border first
        row[order[:ties]] = 1
        better = order[ties : ties + max(k - ties // 2 - 1, 0)]
        row[better] = 2 + row[better]
        rows.append(row)
    return Case("ties at the k-th", np.stack(rows), np.full(len(rows), length, np.int32))


def random_lengths(rows: int, length: int, seed: int = 0) -> Case:
    """Normal scores in rows of random lengths."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, length + 1, rows).astype(np.int32)
    scores = rng.standard_normal((rows, length), dtype=np.float32)
    scores[np.arange(length) >= lengths[:, None]] = np.nan
    return Case("random lengths", scores, lengths)
