"""A setting says what runs: what flags make of it, what it makes of a model, how it is described."""

import functools
import json

import numpy as np
import pytest

from dsv32_jax.errors import UserError
from dsv32_jax.experiments.workbench.settings import Setting, description, differences
from dsv32_jax.model import variants
from pallas_kernels.top_k import top_k

IDS = [list(range(2, 42))]


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ({"sets": ["index_topk=4"]}, ["options.index_topk"]),
        ({"sets": ["attention=dense"]}, ["attention"]),
        ({"sets": ["act_quant=false"]}, ["options.act_quant"]),
        ({"sets": ["cache_dtype=bfloat16"]}, ["options.cache_dtype"]),
        ({"sets": ["absorb=false"]}, ["attention"]),
        ({"sets": ["prepare=false"]}, ["options.prepare"]),
        ({"sets": ["scheme=bf16"]}, ["schemes"]),
        ({"sets": ["scheme=stored"]}, []),
        ({"parts": ["index_select=recent"]}, ["parts.index_select"]),
        ({"backends": ["reference"]}, ["options.backend"]),
        ({"backends": ["top_k=reference"]}, ["parts.top_k"]),
        ({"sets": ["index_topk=4"], "backends": ["top_k=reference"]}, ["options.index_topk", "parts.top_k"]),
    ],
)
def test_a_flag_changes_what_it_names_and_nothing_else(fp8, flags, changed):
    setting = Setting.of("x", **flags)
    before = description(fp8)
    after = setting.describe(fp8)
    if flags.get("sets") == ["absorb=false"]:
        changed = ["attention", "options.absorb"]
    assert differences(before, after) == changed
    assert differences(before, description(fp8)) == []  # the model itself is as it was
    json.dumps([before, after])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"sets": ["index_topk"]}, "--set index_topk: must be FIELD=VALUE"),
        (
            {"sets": ["topk=4"]},
            "--set topk=4: there is no field 'topk'; it is one of compute_dtype, .*index_topk.*scheme",
        ),
        ({"sets": ["index_topk=many"]}, "--set index_topk=many: must be a whole number, or none"),
        ({"sets": ["index_topk=0"]}, "--set index_topk=0: index_topk"),
        ({"sets": ["act_quant=1"]}, "--set act_quant=1: must be true or false"),
        ({"sets": ["attention=full"]}, "--set attention=full: attention 'full' is unknown"),
        ({"sets": ["scheme=int3"]}, "--set scheme=int3: must be one of stored, bf16"),
        ({"sets": ["index_topk=4", "index_topk=5"]}, "index_topk is set twice"),
        ({"sets": ["backend=reference"], "backends": ["reference"]}, "--set names a backend as well"),
        ({"parts": ["index_selct=recent"]}, "--part 'index_selct' is unknown; did you mean index_select"),
        ({"backends": ["top_k=cuda"]}, "--backend top_k=cuda: 'cuda' is unknown"),
        ({"backends": ["rope=reference"]}, "--backend rope=reference: rope has no kernel .* index_select, "),
        ({"backends": ["cuda"]}, "--backend 'cuda' is unknown"),
        ({"backends": ["auto", "reference"]}, "--backend reference: auto is named too"),
        ({"backends": ["top_k=auto", "top_k=reference"]}, "top_k is named twice"),
        ({"parts": ["experts=ragged"], "backends": ["experts=reference"]}, "--part replaces it as well"),
        ({"sets": ["topk=4"], "suffix": "-a"}, "--set-a topk=4"),
        ({"parts": ["x=y"], "suffix": "-a"}, "--part-a 'x' is unknown"),
    ],
)
def test_wrong_flags_are_named(flags, message):
    with pytest.raises(UserError, match=message):
        Setting.of("x", **flags)


def test_a_pinned_op_is_the_op_itself(small):
    part = variants.pinned("top_k", "reference")
    assert isinstance(part, functools.partial) and part.func is top_k
    same = Setting.of("x", backends=["top_k=reference"]).apply(small)
    np.testing.assert_array_equal(same.logits(IDS), small.logits(IDS))
    with pytest.raises(UserError, match="kernel"):
        Setting.of("x", backends=["top_k=mosaic_gpu"]).apply(small).logits(IDS)


def test_a_scheme_is_that_of_every_linear(fp8):
    plain = Setting(scheme="bf16").apply(fp8)
    assert {str(leaf.dtype) for path, leaf in plain.weights.items() if ".experts." in path} == {"bfloat16"}
    path = "layers.3.ffn.experts.gate"
    np.testing.assert_array_equal(plain.weights[path], fp8.weights[path].dequantize("bfloat16"))
    mixed = Setting(scheme="mixed").describe(fp8)["schemes"]
    assert set(mixed["experts"]) == {"int4"} and set(mixed["attn"]) == {"int8"}
    assert Setting(scheme="fp8_block").apply(fp8).model is fp8.model  # it has it already


def test_settings_merge_and_the_later_one_holds():
    first = Setting(name="a", options={"index_topk": 4}, parts={"experts": variants.ragged}, scheme="bf16")
    merged = first.merged(Setting(name="b", options={"index_topk": 8}, parts={"experts": None}, contiguous=True))
    assert (merged.name, merged.options["index_topk"], merged.scheme, merged.contiguous) == ("b", 8, "bf16", True)
    assert merged.parts == {"experts": None}
