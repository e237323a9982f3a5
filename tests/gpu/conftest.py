"""Tests that need a GPU: `pytest tests/gpu` on a machine with one; elsewhere each is skipped by name."""

import jax
import pytest


@pytest.fixture(autouse=True)
def on_gpu():
    """Skips the test where JAX does not run on a GPU."""
    if jax.default_backend() != "gpu":
        pytest.skip(f"needs a GPU; JAX runs on {jax.default_backend()}")
