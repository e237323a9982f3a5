"""The least bytes and operations of a step's parts."""

import math

import pytest

from dsv32_jax.config import ModelConfig
from dsv32_jax.convert.conversion import nbytes
from dsv32_jax.experiments.workbench.least_work import least_work
from dsv32_jax.experiments.workbench.steps import StepShape
from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.context import Options
from dsv32_jax.model.model import abstract_model
from dsv32_jax.model.params import named_parameters

CONFIG = ModelConfig.tiny(num_nextn_predict_layers=0)
MODEL = abstract_model(CONFIG)
MOE = sum(CONFIG.is_moe(layer) for layer in range(CONFIG.num_hidden_layers))


def work(sequences=1, context=128, used=2, kernels=False, **options):
    shape = StepShape(sequences=sequences, context=context)
    return least_work(MODEL, Options(**options), shape, kernels, [used] * MOE)


def test_a_product_reads_its_weights_once_and_its_rows_each():
    one, two = work(1), work(2)
    weights = {
        path: leaf
        for path, leaf in named_parameters(MODEL).items()
        if ".attn." in path and len(leaf.shape) > 1 and (".indexer." not in path or path.endswith("indexer.k"))
    }
    assert 2 * one["projections"].bytes - two["projections"].bytes == nbytes(list(weights.values()))
    elements = sum(math.prod(leaf.shape) for leaf in weights.values())
    assert one["projections"].operations == {"float32": 2 * elements}
    assert two["projections"].operations == {"float32": 4 * elements}


def test_of_the_experts_those_are_read_that_were_chosen():
    experts = [leaf for path, leaf in named_parameters(MODEL).items() if ".experts." in path]
    difference = work(used=3)["experts"].bytes - work(used=2)["experts"].bytes
    assert difference == nbytes(experts) // CONFIG.n_routed_experts
    assert work(used=3)["experts"].operations == work(used=2)["experts"].operations


def test_quantised_products_are_in_fp8_where_kernels_run_them():
    kinds = {part: set(each.operations) for part, each in work(act_quant=True, kernels=True).items() if each.operations}
    fp8 = {"projections", "indexer queries", "indexer scores", "shared expert", "dense feed-forward", "experts"}
    assert {part for part, names in kinds.items() if "fp8" in names} == fp8
    assert kinds["head"] == kinds["sparse MLA"] == {"float32"}
    assert kinds["experts"] == {"fp8"}


def test_the_indexer_reads_every_key_and_the_attention_the_chosen():
    long, short = work(context=1280), work(context=640)
    key = KVCache.shapes(CONFIG, 1, "float32", False, layers=1).index.size * 4 // 64
    heads, dim = CONFIG.index_n_heads, CONFIG.index_head_dim
    layers = CONFIG.num_hidden_layers
    assert long["indexer scores"].bytes - short["indexer scores"].bytes == layers * 640 * (key + 4)
    assert long["indexer scores"].operations["float32"] == layers * 2 * 1280 * heads * dim
    assert long["sparse MLA"] == short["sparse MLA"]
    assert (
        work(context=1280, index_topk=128)["sparse MLA"].bytes > work(context=1280, index_topk=64)["sparse MLA"].bytes
    )


def test_a_prompt_s_tokens_see_what_lies_before_them():
    shape = StepShape(phase="prefill", context=64, tokens=64)
    heads, dim = CONFIG.index_n_heads, CONFIG.index_head_dim
    scores = least_work(MODEL, Options(), shape, False, [2] * MOE)["indexer scores"]
    assert scores.operations["float32"] == CONFIG.num_hidden_layers * 2 * (64 * 65 // 2) * heads * dim


def test_dense_attention_has_no_indexer_and_shared_selections_fewer():
    assert not {"indexer scores", "top-k", "indexer queries", "sparse MLA"} & set(work(attention="dense"))
    every, shared = work(), work(index_topk_freq=CONFIG.num_hidden_layers)
    for part in ("indexer scores", "top-k", "indexer queries"):
        assert shared[part].bytes * CONFIG.num_hidden_layers == pytest.approx(every[part].bytes, rel=1e-3)
    assert shared["cache write"] == every["cache write"]
