"""Rows to quantise: sizes over many powers of two, groups of zeros, and values in the middle of two of FP8."""

import ml_dtypes
import numpy as np

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def rows(count: int, width: int, dtype: str, seed: int = 0) -> np.ndarray:
    """[count, width] of random values."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, width)) * np.exp(3 * rng.standard_normal((count, width // 128, 1))).repeat(
        128, -1
    ).reshape(count, width)
    x[0, :128] = 0
    x[-1, -128:] = np.resize([448, -17, 18, 0.001, 17, 19, 21, -0.0], 128)  # a scale of 1, and halfway cases
    return x.astype(DTYPES[dtype])
