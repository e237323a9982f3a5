"""From an operation of a compiled program to its scope and its part of a step."""

import pytest

from dsv32_jax.experiments.workbench.profile import Event
from dsv32_jax.experiments.workbench.scopes import PARTS, Scopes, part_of, part_of_event

PROGRAM = """\
HloModule jit_f, is_scheduled=true

%add_computation (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %sum = f32[] add(%a, %a), metadata={op_name="reduce_sum"}
}

%body (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  %state = (s32[], f32[4]{0}) parameter(0)
  %got = f32[4]{0} get-tuple-element(%state), index=1
  %copied = f32[4]{0} copy(%got)
  ROOT %next = (s32[], f32[4]{0}) tuple(%state, %copied)
}

%called (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %top.1 = f32[4]{0} custom-call(%x), custom_call_target="mosaic_gpu_v2", metadata={op_name="top_k/mpmd_map"}
}

ENTRY %main.3 (p: f32[4], w: f8e4m3fn[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %w = f8e4m3fn[4]{0} parameter(1), metadata={op_name="leaves[3]"}
  %wrapped_convert.2 = f32[4]{0} fusion(%w), kind=kLoop, calls=%convert_computation
  %tuple.1 = (s32[], f32[4]{0}) tuple(%p, %wrapped_convert.2)
  %while.7 = (s32[], f32[4]{0}) while(%tuple.1), condition=%condition, body=%body, \
metadata={op_name="jit(f)/layers.3/attn/q_b/matmul/while"}
  %sort.1 = f32[4]{0} sort(%p), to_apply=%add_computation, metadata={op_name="jit(f)/jit(g)"}
  %call.1 = f32[4]{0} call(%sort.1), to_apply=%called, \
metadata={op_name="jit(f)/layers.0/attn/index_select/jit(index_select)"}
  ROOT %out = f32[4]{0} add(%call.1, %p), metadata={op_name="jit(f)/jit(g)/add"}
}
"""


def scope(name):
    return Scopes(PROGRAM).of(Event(name, "jit_f", "s", 0, 1))


def test_an_operation_has_its_own_scope():
    assert scope("while.7") == "jit(f)/layers.3/attn/q_b/matmul/while"


def test_what_the_compiler_added_belongs_to_what_uses_it():
    assert part_of(scope("wrapped_convert.2")) == "projections"
    assert "index_select" in scope("sort.1")


def test_what_lies_in_a_loop_or_a_called_function_belongs_to_it():
    assert part_of(scope("copied")) == "projections"
    assert scope("top.1") == "jit(f)/layers.0/attn/index_select/jit(index_select)/top_k/mpmd_map"
    assert part_of(scope("top.1")) == "top-k"


def test_kernels_are_found_by_names_with_other_punctuation():
    assert scope("wrapped_convert_2") == scope("wrapped_convert.2")


def test_what_nobody_knows_has_the_profile_s_own_scope_or_none():
    assert scope("out") == ""
    assert scope("memcpy") == ""
    assert Scopes(PROGRAM).of(Event("gemm", "", "s", 0, 1, scope="a/layers.1/ffn/route")).endswith("route")


def test_loops_and_calls_wait():
    scopes = Scopes(PROGRAM)
    waiting = {name for name in ("while.7", "call.1", "sort.1") if scopes.waits(Event(name, "", "", 0, 1))}
    assert waiting == {"while.7", "call.1"}


@pytest.mark.parametrize(
    ("scope", "part"),
    [
        ("attn/q_a+indexer.k+kv_a/matmul/dot_general", "projections"),
        ("attn/thn,hnc->thc/dot_general", "projections"),
        ("attn/indexer/q_b/matmul/dot_general", "indexer queries"),
        ("attn/index_select/jit(index_select)/jit(top_k)/pallas_call", "top-k"),
        ("attn/index_select/jit(index_select)/pad", "indexer scores"),
        ("attn/sparse_mla/vmap(hk,kd->hd)/dot_general", "sparse MLA"),
        ("attn/dense_mla/exp", "dense MLA"),
        ("attn/cache_write/rms_norm/mul", "cache write"),
        ("attn/rms_norm/mul", "norms and other"),
        ("rms_norm/mul", "norms and other"),
        ("ffn/router/dot_general", "routing"),
        ("ffn/route/top_k", "routing"),
        ("ffn/make_plan/sort", "routing"),
        ("ffn/experts/experts/jit(gather_rows)/pallas_call", "dispatch"),
        ("ffn/combine/jit(combine)/add", "dispatch"),
        ("ffn/experts/experts/jit(swiglu)/pallas_call", "experts"),
        ("ffn/experts/swiglu/mul", "experts"),
        ("ffn/shared/gate+up/jit(swiglu)/pallas_call", "shared expert"),
        ("ffn/gate+up/mul", "dense feed-forward"),
        ("ffn/add", "norms and other"),
    ],
)
def test_scopes_of_a_layer(scope, part):
    assert part_of(f"jit(step)/layers.12/{scope}") == part
    assert part in PARTS


@pytest.mark.parametrize(
    ("scope", "part"),
    [
        ("jit(step)/embedding/gather", "embedding"),
        ("jit(step)/head/dot_general", "head"),
        ("jit(step)/sampling/jit(sample)/argmax", "sampling"),
        ("jit(step)/rms_norm/mul", "norms and other"),
        ("sparse_mla_combine/mpmd_map", "sparse MLA"),
        ("jit(step)/add", "unattributed"),
        ("", "unattributed"),
    ],
)
def test_scopes_outside_the_layers(scope, part):
    assert part_of(scope) == part


def test_a_replaced_selection_is_one_part():
    scope = "jit(step)/layers.0/attn/index_select/jit(top_k)/sort"
    assert part_of(scope, {"index_select": print}) == "index selection"


def test_copies_from_the_host_are_transfers_unless_a_scope_says_more():
    scopes = Scopes(PROGRAM)
    assert part_of_event(Event("MemcpyH2D", "", "s", 0, 1, "MemcpyH2D"), scopes) == "transfers"
    assert part_of_event(Event("while.7", "", "s", 0, 1, "MemcpyH2D"), scopes) == "projections"
    assert part_of_event(Event("gemm", "", "s", 0, 1, "gemm"), scopes) == "unattributed"
