"""Do the parity tests notice the mistakes that are easily made? Each bug is planted, and the named check must fail."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv32_jax.config import ModelConfig
from dsv32_jax.model import indexer, moe, variants
from dsv32_jax.model.parts import Parts
from pallas_kernels import moe_dispatch, rowwise
from pallas_kernels.cache_write import reference as cache_reference
from pallas_kernels.index_select import index_select
from pallas_kernels.indexer_logits import reference as indexer_reference
from pallas_kernels.matmul import reference as matmul_reference
from pallas_kernels.moe_dispatch import reference as moe_reference
from tests.harness import EXACT, load_golden
from tests.model import test_golden

TINY, FP8 = "tiny", "tiny128_fp8"


SWAPPED_ROPE_IN_THE_INDEXER = Parts(index_rope=rowwise.rope_interleaved)


SWAPPED_ROPE_IN_MLA = Parts(rope=rowwise.rope_half_split)


def dropped_relu(patch):
    patch.setattr(indexer_reference.jax.nn, "relu", lambda x: x)


def dropped_indexer_head(patch):
    original = indexer.Indexer.queries

    def queries(self, *args):
        q, weights = original(self, *args)
        return q, weights.at[:, -1].set(0)

    patch.setattr(indexer.Indexer, "queries", queries)


def one_key_too_many(*args, **options):
    """The indexer may see the next token's key."""
    return index_select(*args[:-1], args[-1] + 1, **options)


def one_key_too_few(*args, **options):
    """No token sees itself, except the first."""
    return index_select(*args[:-1], jnp.maximum(args[-1] - 1, 0), **options)


def group_score_by_maximum(patch):
    original = jax.lax.top_k

    def top_k(operand, k, **options):
        values, indices = original(operand, k, **options)
        # The router's group scores are the only top-k over three axes.
        return (values.at[..., 1:].set(0), indices) if operand.ndim == 3 else (values, indices)

    patch.setattr(moe_reference.jax.lax, "top_k", top_k)


def divided_scale(patch):
    original = matmul_reference.dequantize_blocks

    def dequantize(values, scales, dtype=jnp.float32):
        return original(values, 1 / scales, dtype)

    patch.setattr(matmul_reference, "dequantize_blocks", dequantize)


def transposed_scale_grid(patch):
    original = matmul_reference.dequantize_blocks

    def dequantize(values, scales, dtype=jnp.float32):
        return original(values, scales.T.reshape(scales.shape), dtype)

    patch.setattr(matmul_reference, "dequantize_blocks", dequantize)


def softmax_scale_without_mscale(patch):
    patch.setattr(ModelConfig, "softmax_scale", property(lambda self: self.qk_head_dim**-0.5))


def index_key_norm_as_rms_norm(patch):
    def norm(x, weight, bias, eps):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * weight + bias

    patch.setattr(cache_reference, "index_keys", functools.partial(cache_reference.index_keys, norm=norm))


def scaled_shared_expert(patch):
    original = moe.MLP.__call__

    def call(self, x, numerics):
        out = original(self, x, numerics)
        return out * 2.5 if self.gate.shape[0] == 48 else out  # only the shared expert of `tiny` is 48 wide

    patch.setattr(moe.MLP, "__call__", call)


def weights_from_biased_scores(logits, bias, **options):
    experts, _ = moe_dispatch.route(logits, bias, **options)
    biased = jnp.take_along_axis(jax.nn.sigmoid(logits) + bias, experts, 1)
    return experts, biased / biased.sum(-1, keepdims=True) * 2.5


def index_queries_from_another_input(patch):
    """wq_b takes the query latent after its norm; here it gets numbers of another size and direction."""
    original = indexer.Indexer.queries

    def queries(self, x, q_latent, *args):
        return original(self, x, jnp.sign(q_latent), *args)

    patch.setattr(indexer.Indexer, "queries", queries)


ATTENTION_IGNORES_THE_CHOICE = Parts(index_select=variants.every_key)
"""Dense attention in place of the chosen keys: what a mask that is never applied would do."""


BUGS: list[tuple[Callable | Parts, str, Callable]] = [
    (SWAPPED_ROPE_IN_THE_INDEXER, TINY, test_golden.check_topk),
    (SWAPPED_ROPE_IN_THE_INDEXER, TINY, test_golden.check_index_scores),
    (SWAPPED_ROPE_IN_MLA, TINY, test_golden.check_logits),
    (dropped_relu, TINY, test_golden.check_index_scores),
    (dropped_indexer_head, TINY, test_golden.check_topk),
    (Parts(index_select=one_key_too_many), TINY, test_golden.check_topk),
    (Parts(index_select=one_key_too_few), TINY, test_golden.check_topk),
    (group_score_by_maximum, TINY, test_golden.check_experts),
    (divided_scale, FP8, test_golden.check_logits),
    (transposed_scale_grid, FP8, test_golden.check_logits),
    (softmax_scale_without_mscale, TINY, test_golden.check_logits),
    (index_key_norm_as_rms_norm, TINY, test_golden.check_index_scores),
    (scaled_shared_expert, TINY, test_golden.check_hidden),
    (Parts(route=weights_from_biased_scores), TINY, test_golden.check_experts),
    (index_queries_from_another_input, TINY, test_golden.check_topk),
    (ATTENTION_IGNORES_THE_CHOICE, TINY, test_golden.check_logits),
]


DEPTH = {test_golden.check_topk: 1, test_golden.check_index_scores: 1}
DEPTH |= {test_golden.check_experts: 3, test_golden.check_hidden: 3}
"""How many of the four layers a check of `tiny` needs to see, the first or the first with experts: it compares them in
order, so that a bug it finds in these it also finds in all. Logits need them all."""


def first_layers(name: str, count: int):
    model = jax.tree.map(lambda leaf: leaf, load_golden(name))  # another object, with the same arrays
    dense = min(count, model.config.first_k_dense_replace)
    model.config = model.config.replace(num_hidden_layers=count, first_k_dense_replace=dense)
    model.layers = nnx.List(list(model.layers)[:count])
    return model


@functools.cache
def broken(plant, name, depth):
    """What is computed under a bug."""
    with pytest.MonkeyPatch.context() as patch:
        if depth is not None:
            model = first_layers(name, depth)
            patch.setattr(test_golden, "load_golden", lambda _: model)
        if isinstance(plant, Parts):
            return test_golden.compute(name, dataclasses.replace(EXACT, parts=plant))
        plant(patch)
        return test_golden.compute(name)


@pytest.mark.parametrize(("plant", "name", "check"), BUGS, ids=lambda value: getattr(value, "__name__", value))
def test_the_check_fails_under_the_bug_and_only_then(plant, name, check):
    check(test_golden.computed(name), name)
    results = broken(plant, name, DEPTH.get(check))
    with pytest.raises(AssertionError):
        check(results, name)


@pytest.mark.parametrize("depth", sorted(set(DEPTH.values())))
def test_without_a_bug_the_first_layers_are_those_of_the_whole(depth):
    found, whole = broken(lambda patch: None, TINY, depth), test_golden.computed(TINY)
    for row, want in zip(found, whole, strict=True):
        assert len(row.layers) == depth
        for record, expected in zip(row.layers, want.layers[:depth], strict=True):
            assert record.keys() == expected.keys()
            for key, value in record.items():
                if value.dtype == np.int32:
                    np.testing.assert_array_equal(value, expected[key], err_msg=key)
                else:
                    np.testing.assert_allclose(value, expected[key], rtol=1e-4, atol=1e-4, err_msg=key)
