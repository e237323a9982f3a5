"""Every op refuses arrays of other dtypes and ranks by name, and takes what its docstring says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.backend import BackendError
from pallas_kernels.cache_format import index_block_bytes, record_bytes
from pallas_kernels.cache_write import KeyNorms
from pallas_kernels.matmul import fp8_block, int4, int8

T, H, E = 3, 2, 16
F32, BF16, E4M3, INT = jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn, jnp.int32


def of(*shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


def write(kv, index, slots, kv_a, index_key, latent_weight, index_weight, index_bias, cos, sin, **options):
    norms = KeyNorms(latent_weight, index_weight, index_bias, 1e-6, 1e-6)
    return pk.cache_write(kv, index, 0, slots, kv_a, index_key, norms, (cos, sin), **options)


def select(function, queries, head_weights, index, block_tables, sequence, positions, **options):
    return function(queries, head_weights, index, 0, block_tables, sequence, positions, **options)


def attend(queries, kv, slots, lengths, **options):
    return pk.sparse_mla(queries, kv, 0, slots, scale=0.1, rope_dim=64, lengths=lengths, **options)


def route(logits, bias, groups_kept=2, experts_per_token=4, **options):
    how = {"num_groups": 4, "normalize": True, "scaling_factor": 1.0}
    how |= {"groups_kept": groups_kept, "experts_per_token": experts_per_token}
    return pk.moe_dispatch.route(logits, bias, **how, **options)


def multiply(scheme, x, values, scales, **options):
    return pk.matmul(x, pk.matmul.QTensor(values, scales, scheme), **options)


def multiply_grouped(scheme, rows, values, scales, tile_expert, **options):
    return pk.matmul.grouped_matmul(rows, pk.matmul.QTensor(values, scales, scheme), tile_expert, **options)


def activate(function, gate_values, gate_scales, up_values, up_scales, rows=None, x=None, tile_expert=None, **options):
    gate, up = pk.matmul.QTensor(gate_values, gate_scales), pk.matmul.QTensor(up_values, up_scales)
    plan = () if tile_expert is None else (tile_expert,)
    return function(x if rows is None else rows, gate, up, *plan, **options)


@functools.cache
def plan():
    return pk.moe_dispatch.make_plan(jnp.zeros((T, 2), INT), jnp.ones(T, bool), E, 8)


INDEX = {
    "queries": of(T, H, 128, dtype=E4M3),
    "head_weights": of(T, H),
    "index": of(1, 2, index_block_bytes(128), dtype=jnp.uint8),
    "block_tables": of(2, 2, dtype=INT),
    "sequence": of(T, dtype=INT),
    "positions": of(T, dtype=INT),
}
BLOCKS = {"values": of(E, 128, 512, dtype=E4M3), "scales": of(E, 1, 4)}
TILES = {"tile_expert": of(2, dtype=INT), "used_tiles": of(dtype=INT)}
SWIGLU = {
    "gate_values": BLOCKS["values"],
    "gate_scales": BLOCKS["scales"],
    "up_values": BLOCKS["values"],
    "up_scales": BLOCKS["scales"],
}
CALLS = {
    "top_k": (functools.partial(pk.top_k, k=2), {"scores": of(T, 8), "lengths": of(T, dtype=INT)}),
    "sparse_mla": (
        attend,
        {
            "queries": of(T, H, 576, dtype=BF16),
            "kv": of(1, 2, 64, record_bytes(512, 64), dtype=jnp.uint8),
            "slots": of(T, 5, dtype=INT),
            "lengths": of(T, dtype=INT),
        },
    ),
    "indexer_logits": (functools.partial(select, pk.indexer_logits), INDEX),
    "index_select": (functools.partial(select, pk.index_select, k=2), INDEX),
    "cache_write": (
        write,
        {
            "kv": of(1, 2, 64, record_bytes(512, 64), dtype=jnp.uint8),
            "index": INDEX["index"],
            "slots": of(T, dtype=INT),
            "kv_a": of(T, 576, dtype=BF16),
            "index_key": of(T, 128, dtype=BF16),
            "latent_weight": of(512),
            "index_weight": of(128),
            "index_bias": of(128),
            "cos": of(T, 32),
            "sin": of(T, 32),
        },
    ),
    "moe_dispatch.route": (route, {"logits": of(T, E), "bias": of(E)}),
    "moe_dispatch.make_plan": (
        functools.partial(pk.moe_dispatch.make_plan, num_experts=E),
        {"experts": of(T, 2, dtype=INT), "valid": of(T, dtype=bool)},
    ),
    "moe_dispatch.gather_rows": (lambda x, **o: pk.moe_dispatch.gather_rows(x, plan(), **o), {"x": of(T, 128)}),
    "moe_dispatch.gather_rows_fp8": (
        lambda x, **o: pk.moe_dispatch.gather_rows_fp8(x, plan(), **o),
        {"x": of(T, 128, dtype=BF16)},
    ),
    "moe_dispatch.combine": (
        lambda expert_rows, weights, **o: pk.moe_dispatch.combine(expert_rows, weights, plan(), **o),
        {"expert_rows": of(*plan().row_token.shape, 128, dtype=BF16), "weights": of(T, 2)},
    ),
    "matmul": (
        lambda x, weight, **o: pk.matmul(x, weight, **o),
        {"x": of(T, 512, dtype=BF16), "weight": of(128, 512, dtype=BF16)},
    ),
    "matmul fp8_block": (
        functools.partial(multiply, pk.matmul.FP8_BLOCK),
        {"x": of(T, 512, dtype=BF16), "values": of(128, 512, dtype=E4M3), "scales": of(1, 4)},
    ),
    "matmul int8": (
        functools.partial(multiply, pk.matmul.INT8),
        {"x": of(T, 512, dtype=BF16), "values": of(128, 512, dtype=jnp.int8), "scales": of(128)},
    ),
    "matmul int4": (
        functools.partial(multiply, pk.matmul.INT4),
        {
            "x": of(T, 512, dtype=BF16),
            "values": of(128, 256, dtype=jnp.uint8),
            "scales": of(4, 128, dtype=jnp.uint32),
        },
    ),
    "grouped_matmul": (
        lambda rows, weight, tile_expert, **o: pk.matmul.grouped_matmul(rows, weight, tile_expert, **o),
        {"rows": of(128, 512, dtype=BF16), "weight": of(E, 128, 512, dtype=BF16), **TILES},
    ),
    "grouped_matmul fp8_block": (
        functools.partial(multiply_grouped, pk.matmul.FP8_BLOCK),
        {"rows": of(16, 512, dtype=E4M3), "row_scales": of(16, 4), **BLOCKS, **TILES},
    ),
    "grouped_matmul int8": (
        functools.partial(multiply_grouped, pk.matmul.INT8),
        {"rows": of(16, 512, dtype=BF16), "values": of(E, 128, 512, dtype=jnp.int8), "scales": of(E, 128), **TILES},
    ),
    "grouped_matmul int4": (
        functools.partial(multiply_grouped, pk.matmul.INT4),
        {
            "rows": of(16, 512, dtype=BF16),
            "values": of(E, 128, 256, dtype=jnp.uint8),
            "scales": of(E, 4, 128, dtype=jnp.uint32),
            **TILES,
        },
    ),
    "swiglu": (
        functools.partial(activate, pk.matmul.swiglu),
        {
            "x": of(T, 512, dtype=E4M3),
            "row_scales": of(T, 4),
            "gate_values": of(128, 512, dtype=E4M3),
            "gate_scales": of(1, 4),
            "up_values": of(128, 512, dtype=E4M3),
            "up_scales": of(1, 4),
        },
    ),
    "grouped_swiglu": (
        functools.partial(activate, pk.matmul.grouped_swiglu),
        {"rows": of(16, 512, dtype=E4M3), "row_scales": of(16, 4), **SWIGLU, **TILES},
    ),
    "quantize": (pk.quantize, {"x": of(T, 128)}),
    "quantize_int8": (pk.quantize.quantize_int8, {"x": of(T, 128, dtype=BF16)}),
}
WITHOUT_BACKEND = {
    "dequantize": (pk.quantize.dequantize, {"values": of(T, 256, dtype=E4M3), "scales": of(T, 2)}),
    "quantize_weight_fp8": (fp8_block.quantize_weight_fp8, {"weight": of(130, 200)}),
    "quantize_weight_int8": (int8.quantize_weight_int8, {"weight": of(130, 200)}),
    "quantize_weight_int4": (int4.quantize_weight_int4, {"weight": of(130, 256)}),
    "dequantize_blocks": (
        fp8_block.dequantize_blocks,
        {"values": of(130, 200, dtype=E4M3), "scales": of(2, 2)},
    ),
    "dequantize_int8": (
        int8.dequantize_int8,
        {"values": of(130, 200, dtype=jnp.int8), "scales": of(130)},
    ),
    "dequantize_int4": (
        int4.dequantize_int4,
        {"packed": of(130, 64, dtype=jnp.uint8), "words": of(1, 130, dtype=jnp.uint32)},
    ),
}
ALL = CALLS | WITHOUT_BACKEND
LEADING_AXES = {"quantize", "quantize_int8", *WITHOUT_BACKEND}
"""These take any axes before the last ones."""


def trace(name, changed=None, **options):
    function, arrays = ALL[name]
    jax.eval_shape(functools.partial(function, **options), **arrays | (changed or {}))


def wrong(name):
    """(argument, another dtype or rank) of a call."""
    for argument, array in ALL[name][1].items():
        floating = jnp.issubdtype(array.dtype, jnp.floating)
        others = [INT, jnp.int8] if floating else [F32, jnp.int16]
        others += [F32] if array.dtype == E4M3 and argument == "values" else []
        others += (
            [BF16] if argument in ("scores", "logits", "bias", "scales", "head_weights", "cos", "row_scales") else []
        )
        for dtype in others:
            if dtype != array.dtype:
                yield argument, of(*array.shape, dtype=dtype)
        if name not in LEADING_AXES:
            yield argument, of(1, *array.shape, dtype=array.dtype)


@pytest.mark.parametrize("name", ALL)
def test_an_op_names_the_array_that_it_does_not_take(name):
    trace(name)
    for argument, array in wrong(name):
        with pytest.raises(ValueError, match=rf"\b{argument}\b"):
            trace(name, {argument: array})


@pytest.mark.parametrize("name", [name for name in CALLS if name != "matmul"])  # of an array: XLA's product alone
def test_a_kernel_asked_for_on_a_cpu_names_the_backend_and_what_would_work(name):
    function, arrays = CALLS[name]
    if name == "moe_dispatch.gather_rows":
        arrays = {"x": of(T, 128, dtype=BF16)}
    call = jax.jit(functools.partial(function, backend="mosaic_gpu"))
    traced = call.trace(**arrays)
    with pytest.raises(BackendError, match=rf"{name.split()[0]}: backend 'mosaic_gpu'.*CPU.*'auto' or 'reference'"):
        traced.lower()
    traced.lower(lowering_platforms=("cuda",))


def test_a_kernel_asked_for_on_a_cpu_outside_of_a_program():
    with pytest.raises(BackendError, match=r"top_k: backend 'mosaic_gpu'.*CPU"):
        pk.top_k(jnp.zeros((2, 8)), 3, backend="mosaic_gpu")


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("top_k", {"scores": of(T, 8, dtype=BF16)}, r"scores float32 \[T, L\], not bfloat16"),
        ("matmul fp8_block", {"values": of(128, 512)}, r"values float8_e4m3fn \[N, K\], not float32"),
        ("matmul fp8_block", {"scales": of(1, 4, dtype=BF16)}, "scales float32"),
        (
            "matmul fp8_block",
            {"x": of(T, 200), "values": of(128, 200, dtype=E4M3), "scales": of(1, 2)},
            "groups of 128",
        ),
        ("indexer_logits", {"queries": of(T, H, 128)}, "FP8 .*needs queries float8_e4m3fn, not float32"),
        ("index_select", {"index": of(1, 2, 64, 128)}, "needs float queries, not float8_e4m3fn"),
        ("index_select", {"index": of(1, 2, 64 * 68, dtype=jnp.uint8)}, "keys of width 128"),
        ("sparse_mla", {"kv": of(1, 2, 64, 576, dtype=jnp.uint8)}, "rows of 656"),
        ("grouped_matmul", {"weight": of(E, 128, 512, dtype=E4M3)}, "weight float"),
        ("moe_dispatch.combine", {"weights": of(T, 3)}, "weights of shape"),
        ("cache_write", {"cos": of(T, 16), "sin": of(T, 32)}, "kv_a of shape|cos and sin of shapes"),
        ("dequantize_blocks", {"scales": of(1, 2)}, r"must be \(2, 2\)"),
    ],
)
def test_forms_that_do_not_go_together_are_named(name, changed, message):
    with pytest.raises(ValueError, match=message):
        trace(name, changed)


@pytest.mark.parametrize("k", [0, -1, 2.0, True, None, jnp.int32(2)])
@pytest.mark.parametrize("name", ["top_k", "index_select"])
def test_k_is_a_positive_int(name, k):
    with pytest.raises(ValueError, match="needs k "):
        trace(name, k=k)


@pytest.mark.parametrize(("kept", "chosen"), [(5, 4), (4, 17), (0, 1), (1, 0)])
def test_route_chooses_no_more_than_there_is(kept, chosen):
    with pytest.raises(ValueError, match=r"moe_dispatch\.route"):
        trace("moe_dispatch.route", groups_kept=kept, experts_per_token=chosen)


@pytest.mark.parametrize("layer", [1, -1, 0.0, "0"])
def test_a_layer_that_the_cache_does_not_have(layer):
    arrays = ALL["indexer_logits"][1]
    with pytest.raises(ValueError, match="layer"):
        jax.eval_shape(lambda *a: pk.indexer_logits(*a[:3], layer, *a[3:]), *arrays.values())


def test_arrays_of_numpy_count_as_what_jax_makes_of_them():
    scores = np.array([[3.0, 1.0, 2.0]])
    assert pk.top_k(scores, 2, lengths=np.array([3])).tolist() == [[0, 2]]
    with pytest.raises(ValueError, match=r"scores as an array, .*not list \[\[3.0\]\]"):
        pk.top_k([[3.0]], 1)
