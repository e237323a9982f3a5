"""The shapes that other tile sizes are tried at."""

import argparse

import pytest

from dsv32_jax.experiments.bench.sweep import shape_of
from pallas_kernels.shapes import SHAPES


def test_a_name_says_the_shape():
    for shape in SHAPES["matmul"]:
        assert shape_of(shape.name).dims() == shape.dims()
    assert shape_of("int4-32x2240x7168").dims() == {"scheme": "int4", "tokens": 32, "columns": 2240, "depth": 7168}


def test_a_name_that_is_no_shape():
    with pytest.raises(argparse.ArgumentTypeError, match="int3-1x64x512 is not like 32x2240x7168"):
        shape_of("int3-1x64x512")
