"""Calls of `sparse_mla` with NaN in every row of the cache that no token chose, and what they must give."""

import dataclasses

import ml_dtypes
import numpy as np

BLOCK, LATENT, ROPE, GROUP = 64, 512, 64, 128
BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
SCALE = 0.06


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of the op, and `rows` float64 [blocks * 64, 576]: what the layer's rows hold."""

    name: str
    queries: np.ndarray
    kv: np.ndarray
    layer: int
    slots: np.ndarray
    lengths: np.ndarray | None
    rows: np.ndarray

    @property
    def arguments(self) -> tuple:
        """In the op's order."""
        return self.queries, self.kv, self.layer, self.slots

    @property
    def options(self) -> dict:
        """The op's keywords."""
        return {"scale": SCALE, "rope_dim": ROPE, "lengths": self.lengths}

    @property
    def chosen(self) -> list[np.ndarray]:
        """Each token's keys."""
        ends = [self.slots.shape[1]] * len(self.slots) if self.lengths is None else self.lengths
        return [row[:end][row[:end] >= 0] for row, end in zip(self.slots, ends, strict=True)]

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """out float64 [T, H, 512] and lse [T, H]."""
        tokens, heads, _ = self.queries.shape
        out, lse = np.zeros((tokens, heads, LATENT)), np.full((tokens, heads), -np.inf)
        for token, chosen in enumerate(self.chosen):
            if not len(chosen):
                continue
            keys = self.rows[chosen]
            scores = SCALE * self.queries[token].astype(np.float64) @ keys.T
            top = scores.max(-1, keepdims=True)
            weights = np.exp(scores - top)
            total = weights.sum(-1, keepdims=True)
            out[token], lse[token] = weights @ keys[:, :LATENT] / total, (top + np.log(total))[:, 0]
        return out, lse


def check(case: Case, out, lse, *, rms: float = 3e-3, largest: float = 1e-2, of_lse: float = 1e-4) -> None:
    """Asserts that out and lse are the expected ones: zeros and -inf without keys, else within relative errors.

    `largest` is the largest error in units of the largest value.
    """
    out, lse = np.asarray(out, np.float64), np.asarray(lse, np.float64)
    expected, expected_lse = case.expected()
    assert out.shape == expected.shape and lse.shape == expected_lse.shape
    empty = np.isneginf(expected_lse)
    np.testing.assert_array_equal(np.isneginf(lse), empty)
    assert not out[empty].any()
    assert np.isfinite(out).all() and np.isfinite(lse[~empty]).all()
    if empty.all():
        return
    error = out - expected
    assert np.sqrt((error**2).mean() / (expected**2).mean()) <= rms
    assert np.abs(error).max() <= largest * np.abs(expected).max()
    assert np.abs(lse[~empty] - expected_lse[~empty]).max() <= of_lse * max(1, np.abs(expected_lse[~empty]).max())


def records(rows: np.ndarray, powers: bool) -> tuple[np.ndarray, np.ndarray]:
    """float32 [N, 576] as uint8 [N, 656], and the same values as they read."""
    latent = rows[:, :LATENT].reshape(len(rows), -1, GROUP)
    scales = np.abs(latent).max(-1, keepdims=True) / 448
    scales = (2 ** np.ceil(np.log2(scales)) if powers else scales).astype(np.float32)
    values = (latent / scales).astype(E4M3)
    rope = rows[:, LATENT:].astype(BF16)
    read = np.concatenate([(values.astype(np.float64) * scales).reshape(len(rows), -1), rope.astype(np.float64)], -1)
    parts = (values.reshape(len(rows), -1), scales[..., 0], rope)
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts], -1), read


def case(
    name: str,
    counts: list[int],
    *,
    heads: int,
    keys: int,
    blocks: int,
    fp8: bool = False,
    prefix: bool = False,
    powers: bool = True,
    rising: bool = False,
    seed: int = 0,
) -> Case:
    """Token t has `counts[t]` keys among `keys` slots.

    With `prefix` they come first, `lengths` says how many, and what follows them are slots that do not exist; else they
    are anywhere, with -1 between them. Each token with three keys or more has one twice. Slot 0, layer 0 and all rows
    that nobody chose hold NaN. `powers`: FP8 scales are powers of two. `rising`: large queries, and keys in the order
    of the first head's scores, so that maxima grow until the end.
    """
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((blocks * BLOCK, LATENT + ROPE)).astype(np.float32)
    rows[:, :LATENT] *= np.exp2(rng.integers(-3, 3, (len(rows), 1)))
    rows[rng.random(rows.shape) < 0.05] *= 2.0**-10  # FP8 numbers below the normal ones, and zeros
    queries = ((20 if rising else 1) * rng.standard_normal((len(counts), heads, LATENT + ROPE))).astype(BF16)
    slots = np.full((len(counts), keys), 2**31 - 1 if prefix else -1, np.int32)
    for row, count, query in zip(slots, counts, queries, strict=True):
        mine = 1 + rng.permutation(blocks * BLOCK - 1)[:count].astype(np.int32)
        if count >= 3:
            mine[1] = mine[0]
        if rising:
            mine = mine[np.argsort(rows[mine] @ query[0].astype(np.float32))]
        row[np.arange(count) if prefix else np.sort(rng.permutation(keys)[:count])] = mine
    if fp8:
        stored, read = records(rows, powers)
    else:
        stored = rows.astype(BF16)
        read = stored.astype(np.float64)
    kv = np.full((2, blocks * BLOCK, stored.shape[1]), 0xFF if fp8 else np.nan, stored.dtype)
    ends = np.array(counts) if prefix else np.full(len(counts), keys)
    used = np.unique(np.concatenate([[], *[row[:end][row[:end] >= 0] for row, end in zip(slots, ends, strict=True)]]))
    used = used.astype(np.int64)
    kv[1, used] = stored[used]
    lengths = np.array(counts, np.int32) if prefix else None
    return Case(name, queries, kv.reshape(2, blocks, BLOCK, -1), 1, slots, lengths, read)
