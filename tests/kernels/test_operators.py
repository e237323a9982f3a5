"""`pallas_kernels.top_k` means one thing, and is called, whatever was imported before."""

import inspect
import pydoc
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk

SINGLE = [name for name in pk.__all__ if name != "moe_dispatch"]


def test_an_op_is_called_before_and_after_its_package_is_imported():
    code = """
import sys
import pallas_kernels as pk
assert "jax" not in sys.modules and "pallas_kernels.top_k" not in sys.modules
import jax.numpy as jnp
scores = jnp.asarray([[1.0, 3.0, 2.0]])
before, called = pk.top_k, pk.top_k(scores, 2).tolist()
import pallas_kernels.top_k
from pallas_kernels import top_k
from pallas_kernels.top_k import top_k as function
print(called, pk.top_k(scores, 2).tolist(), function(scores, 2).tolist(), before is top_k is pk.top_k)
import pallas_kernels.quantize, pallas_kernels.matmul.few_rows
print(len(pk.quantize(jnp.zeros((2, 128)))), callable(pk.matmul))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["[[1, 2]] [[1, 2]] [[1, 2]] True", "2 True"], done.stderr


@pytest.mark.parametrize("name", SINGLE)
def test_an_op_is_its_package_and_its_function(name):
    package = getattr(pk, name)
    function = getattr(package, name)
    assert inspect.ismodule(package) and sys.modules[f"pallas_kernels.{name}"] is package
    assert inspect.signature(package) == inspect.signature(function)
    assert name in package.__all__
    assert f"{name}(" in pydoc.render_doc(package, renderer=pydoc.plaintext)


def test_what_is_several_ops_says_which():
    with pytest.raises(TypeError, match=r"pallas_kernels\.moe_dispatch is no function; it holds .*make_plan, route"):
        pk.moe_dispatch(jnp.zeros((2, 8)))


def test_names_are_listed_and_others_are_refused():
    assert set(pk.__all__) <= set(dir(pk))
    with pytest.raises(AttributeError, match="no attribute 'topk'"):
        pk.topk  # noqa: B018


def test_an_op_can_be_transformed():
    scores = jnp.asarray([[1.0, 3.0, 2.0]])
    assert jax.jit(pk.top_k, static_argnames="k")(scores, k=2).tolist() == [[1, 2]]
    np.testing.assert_array_equal(jax.vmap(lambda x: pk.top_k(x, 1))(scores[None]), [[[1]]])
