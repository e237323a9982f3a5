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


def weight(width: int, dtype: str, seed: int = 0) -> np.ndarray:
    """Of a norm."""
    return (1 + 0.3 * np.random.default_rng(seed).standard_normal(width)).astype(DTYPES[dtype])


def check_nearly(got, wanted) -> None:
    """Values and scales whose norms were summed in another order: few values moved, by one step of e4m3 at most."""
    values, scales = (np.asarray(x) for x in got)
    expected, expected_scales = (np.asarray(x) for x in wanted)
    assert values.shape == expected.shape and scales.shape == expected_scales.shape
    assert (values.view(np.uint8) == expected.view(np.uint8)).mean() >= 0.999
    np.testing.assert_allclose(scales, expected_scales, rtol=2**-7)
    groups = len(scales.reshape(-1))
    real = values.astype(np.float32).reshape(groups, -1) * scales.reshape(-1, 1)
    wanted_real = expected.astype(np.float32).reshape(groups, -1) * expected_scales.reshape(-1, 1)
    floor = 2.0**-9 * expected_scales.reshape(-1, 1)
    assert (np.abs(real - wanted_real) <= np.abs(wanted_real) / 7 + floor).all()
