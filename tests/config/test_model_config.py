"""ModelConfig: the fields that it reads, writes back, and refuses by name."""

import json
import math

import pytest

from dsv32_jax.config import PRESETS, ModelConfig, RopeScaling
from dsv32_jax.errors import CheckpointWarning, UserError


def hf(**changes):
    """The tiny preset's config.json with some fields changed; None removes a field."""
    fields = ModelConfig.tiny().to_hf() | changes
    return {name: value for name, value in fields.items() if value is not None}


def nested(block, **changes):
    fields = hf()[block] | changes
    return hf(**{block: {name: value for name, value in fields.items() if value is not None}})


def test_671b_constants():
    config = ModelConfig.deepseek_v32()
    assert math.isclose(config.softmax_scale, 0.1352337788608801, rel_tol=1e-15)
    assert (config.qk_head_dim, config.latent_dim, config.has_mtp) == (192, 576, True)
    assert [config.is_moe(layer) for layer in (0, 2, 3, 60)] == [False, False, True, True]


def test_softmax_scale_without_yarn():
    assert ModelConfig.tiny(rope_scaling=None).softmax_scale == ModelConfig.tiny().qk_head_dim ** -0.5


@pytest.mark.parametrize("name", ["tiny", "tiny128_bf16", "tiny128_fp8"])
def test_golden_configs_round_trip_exactly(golden, name):
    path = golden(f"{name}/model/config.json")
    # Compared as text: 100 and 100.0 are equal in Python and different in a file.
    assert json.dumps(ModelConfig.from_hf(path).to_hf()) == json.dumps(json.loads(path.read_text()), sort_keys=True)


@pytest.mark.parametrize("config", [*PRESETS.values(), ModelConfig.full_width(num_layers=4)])
def test_presets_round_trip_and_hash(config):
    again = ModelConfig.from_hf(config.to_hf())
    assert again == config and hash(again) == hash(config)


def test_directory_and_file_read_the_same(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf()))
    assert ModelConfig.from_hf(tmp_path) == ModelConfig.from_hf(tmp_path / "config.json") == ModelConfig.tiny()


def test_unknown_fields_are_kept():
    extra = {"auto_map": {"AutoModel": "x.Y"}, "aux_loss_alpha": 1e-4, "pad_token_id": None, "notes": ["é", 1]}
    with pytest.warns(CheckpointWarning, match="notes"):
        config = ModelConfig.from_hf(hf() | extra)
        assert {name: config.to_hf()[name] for name in extra} == extra
        assert hash(config) == hash(ModelConfig.from_hf(hf() | extra))


def test_unquantised_checkpoint_has_no_quantisation():
    config = ModelConfig.from_hf(hf(quantization_config=None))
    assert config.quantization_config is None and "quantization_config" not in config.to_hf()


def test_several_eos_tokens_round_trip():
    assert ModelConfig.from_hf(hf(eos_token_id=[1, 2])).to_hf()["eos_token_id"] == [1, 2]


@pytest.mark.parametrize("keys", [("type",), ("rope_type",), ("type", "rope_type")])
def test_rope_type_spellings(keys):
    raw = nested("rope_scaling", type=None)
    raw["rope_scaling"] |= dict.fromkeys(keys, "yarn")
    config = ModelConfig.from_hf(raw)
    assert config.rope_scaling.factor == 40
    assert config.to_hf() == raw


@pytest.mark.parametrize("scaled", [True, False])
def test_rope_parameters_of_transformers_5(scaled):
    raw = hf()
    block = raw.pop("rope_scaling")
    block = block if scaled else {"type": "default"}
    block["rope_type"] = block.pop("type")
    raw["rope_parameters"] = block | {"rope_theta": raw.pop("rope_theta")}
    config = ModelConfig.from_hf(raw)
    assert (config.rope_theta, config.rope_scaling is None) == (10000, not scaled)
    assert config.to_hf() == raw


# Each: the changed content, and words that the one-line message must have.
REFUSED = {
    "model type": (hf(model_type="deepseek_v3"), ["model_type", "deepseek_v3", "deepseek_v32"]),
    "score": (hf(scoring_func="softmax"), ["scoring_func", "softmax", "sigmoid"]),
    "topk method": (hf(topk_method="greedy"), ["topk_method", "greedy", "noaux_tc"]),
    "activation": (hf(hidden_act="gelu"), ["hidden_act", "gelu", "silu"]),
    "bias": (hf(attention_bias=True), ["attention_bias", "True", "false"]),
    "moe frequency": (hf(moe_layer_freq=2), ["moe_layer_freq", "2", "1"]),
    "tied": (hf(tie_word_embeddings=True), ["tie_word_embeddings", "True", "false"]),
    "two MTP layers": (hf(num_nextn_predict_layers=2), ["num_nextn_predict_layers", "2", "0 or 1"]),
    "bool is no size": (hf(hidden_size=True), ["hidden_size", "True", "integer"]),
    "text is no size": (hf(hidden_size="128"), ["hidden_size", "'128'", "integer"]),
    "zero": (hf(index_topk=0), ["index_topk", "0", "at least 1"]),
    "negative": (hf(first_k_dense_replace=-1), ["first_k_dense_replace", "-1"]),
    "not finite": (hf(rms_norm_eps=math.nan), ["rms_norm_eps", "nan", "finite"]),
    "missing size": (hf(kv_lora_rank=None), ["kv_lora_rank", "missing"]),
    "near miss": (hf(num_hidden_layer=3), ["num_hidden_layer ", "num_hidden_layers"]),
    "camel case": (hf(hiddenSize=3), ["hiddenSize", "hidden_size"]),
    "key heads": (hf(num_key_value_heads=1), ["num_key_value_heads 1", "num_attention_heads 2"]),
    "groups": (hf(n_group=3, topk_group=2), ["n_routed_experts 8", "n_group 3"]),
    "single-expert groups": (hf(n_group=8), ["n_routed_experts 8", "n_group 8"]),
    "kept groups": (hf(topk_group=5), ["topk_group 5", "n_group 4"]),
    "too many experts": (hf(num_experts_per_tok=5), ["num_experts_per_tok 5", "topk_group 2"]),
    "dense layers": (hf(first_k_dense_replace=3), ["first_k_dense_replace 3", "num_hidden_layers 2"]),
    "odd rope": (hf(qk_rope_head_dim=63), ["qk_rope_head_dim", "63", "even"]),
    "wide rope": (hf(qk_rope_head_dim=256), ["qk_rope_head_dim 256", "index_head_dim 128"]),
    "Hadamard": (hf(index_head_dim=192), ["index_head_dim", "192", "power of two"]),
    "token id": (hf(eos_token_id=512), ["eos_token_id 512", "vocab_size 512"]),
    "FP8 width": (hf(moe_intermediate_size=192), ["moe_intermediate_size 192", "weight_block_size", "128"]),
    "FP8 heads": (hf(v_head_dim=80), ["num_attention_heads * v_head_dim 160", "weight_block_size"]),
    "rope kind": (nested("rope_scaling", type="linear"), ["rope_scaling.type", "linear", "yarn"]),
    "rope near miss": (nested("rope_scaling", beta_fats=1), ["rope_scaling.beta_fats", "beta_fast"]),
    "rope extra": (nested("rope_scaling", truncate=1), ["rope_scaling.truncate"]),
    "rope missing": (nested("rope_scaling", mscale_all_dim=None), ["rope_scaling.mscale_all_dim", "missing"]),
    "rope mscale": (nested("rope_scaling", mscale=0.5), ["mscale 0.5", "mscale_all_dim 1.0"]),
    "rope factor": (nested("rope_scaling", factor=0.5), ["rope_scaling.factor", "0.5"]),
    "rope text": (hf(rope_scaling="yarn"), ["rope_scaling", "object"]),
    "method": (nested("quantization_config", quant_method="awq"), ["quant_method", "awq", "fp8"]),
    "format": (nested("quantization_config", fmt="e5m2"), ["fmt", "e5m2", "e4m3"]),
    "blocks": (nested("quantization_config", weight_block_size=[64, 64]), ["weight_block_size", "64", "[128, 128]"]),
    "scheme": (nested("quantization_config", activation_scheme="static"), ["activation_scheme", "static", "dynamic"]),
    "scales": (nested("quantization_config", scale_fmt="int8"), ["scale_fmt", "int8", "ue8m0"]),
    "quant near miss": (nested("quantization_config", scale_format="ue8m0"), ["scale_format", "scale_fmt"]),
    "two ropes": (hf(rope_parameters={"rope_theta": 1}), ["rope_scaling", "rope_parameters"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_in_one_line(case):
    raw, words = REFUSED[case]
    with pytest.raises(UserError) as refusal:
        ModelConfig.from_hf(raw)
    message = str(refusal.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("name", ["dtype", "head_dim", "pad_token_id", "seq_aux", "pretraining_tp"])
def test_fields_of_other_tools_are_no_near_misses(name):
    assert ModelConfig.from_hf(hf() | {name: 1}).to_hf()[name] == 1


@pytest.mark.parametrize("text", [None, "{", "[]", '{"hidden_size": 1}'])
def test_unreadable_file_names_itself_or_the_field(tmp_path, text):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"config\.json|first_k_dense_replace is missing"):
        ModelConfig.from_hf(tmp_path)


def test_constructor_checks_too():
    with pytest.raises(UserError, match="hidden_size"):
        ModelConfig(hidden_size=0)
    with pytest.raises(UserError, match="topk_group"):
        ModelConfig.tiny().replace(topk_group=9)
    with pytest.raises(UserError, match="beta_fast"):
        RopeScaling(beta_fast=1, beta_slow=32)
