"""Fields beside ModelConfig's attributes are checked, refused by name, without effect, or named in a warning."""

import json
import subprocess
import sys
import warnings

import pytest

from dsv32_jax.config import PRESETS, ModelConfig, RopeScaling
from dsv32_jax.config.fields import WITHOUT_EFFECT
from dsv32_jax.config.model_config import _NULL_IS_ABSENT
from dsv32_jax.config.quantization_config import QuantizationConfig
from dsv32_jax.errors import CheckpointWarning, UserError

LAYERS, EXPERTS = 2, 8  # of the tiny preset, whose layer 0 is dense
WRITTEN_BY_TRANSFORMERS_5 = {
    "_name_or_path": "", "architectures": ["DeepseekV32ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 0, "chunk_size_feed_forward": 0, "dtype": "bfloat16", "eos_token_id": 1, "first_k_dense_replace": 1,
    "head_dim": 64, "hidden_act": "silu", "hidden_size": 128, "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "index_head_dim": 128, "index_n_heads": 2, "index_topk": 16, "initializer_range": 0.02, "intermediate_size": 256,
    "is_encoder_decoder": False, "kv_lora_rank": 128, "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "layer_types": ["indexed_attention", "indexed_attention"], "max_position_embeddings": 1280, "mlp_bias": False,
    "mlp_layer_types": ["dense", "sparse"], "model_type": "deepseek_v32", "moe_intermediate_size": 128, "n_group": 4,
    "n_routed_experts": 8, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 2,
    "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_key_value_heads": 2, "output_attentions": False,
    "output_hidden_states": False, "output_router_logits": False, "pad_token_id": None, "problem_type": None,
    "q_lora_rank": 128, "qk_head_dim": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic", "dequantize": False, "expert_dtype": "fp8", "modules_to_convert": None,
        "modules_to_not_convert": None, "quant_method": "fp8", "scale_fmt": "float", "weight_block_size": [128, 128],
    },
    "return_dict": True, "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 32, "rope_theta": 10000, "rope_type": "yarn", "type": "yarn",
    },
    "routed_scaling_factor": 2.5, "tie_word_embeddings": False, "topk_group": 2, "transformers_version": "5.24.0",
    "use_cache": True, "v_head_dim": 64, "vocab_size": 512,
}  # fmt: skip


def hf(**changes):
    """The tiny preset's config.json with some fields changed."""
    return ModelConfig.tiny().to_hf() | changes


def read(**changes):
    """The same, read; no warning may come."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ModelConfig.from_hf(hf(**changes))


# The field and a value that would be another model.
REFUSED = [
    ("rope_interleave", False),
    ("indexer_rope_interleave", True),
    ("indexer_types", ["full", "shared"]),
    ("indexer_types", ["full"]),
    ("indexer_types", "full"),
    ("index_topk_freq", 4),
    ("index_topk_freq", True),
    ("index_topk_pattern", "FS"),
    ("index_topk_pattern", ["full", "shared"]),
    ("index_topk_pattern", "F"),
    ("index_skip_topk_offset", 3),
    ("moe_router_dtype", "bfloat16"),
    ("mlp_bias", True),
    ("mlp_layer_types", ["sparse", "sparse"]),
    ("mlp_layer_types", ["dense", "sparse", "sparse"]),
    ("layer_types", ["indexed_attention", "full_attention"]),
    ("layer_types", ["indexed_attention"]),
    ("layer_types", ["indexed_attention", None]),
    ("num_experts", 16),
    ("num_local_experts", 4),
    ("qk_head_dim", 192),
    ("architectures", ["GlmMoeDsaForCausalLM"]),
    ("architectures", "DeepseekV32ForCausalLM"),
    ("bos_token_id", [0]),
    ("eos_token_id", [1, True]),
    ("per_layer_config", {"1": {"index_topk": 8}}),
    ("sliding_window", 4096),
    ("use_sliding_window", True),
    ("attn_logit_softcapping", 50.0),
    ("final_logit_softcapping", 30.0),
    ("router_logit_softcapping", 30.0),
    ("embedding_multiplier", 12.0),
    ("residual_multiplier", 0.22),
    ("attention_multiplier", 0.5),
    ("logit_scale", 0.0625),
    ("logits_scaling", 8.0),
    ("clip_qkv", 8.0),
    ("use_qk_norm", True),
    ("qk_layernorm", True),
    ("qkv_bias", True),
    ("layer_norm_type", "layernorm"),
    ("layer_norm_eps", 1e-5),
    ("hidden_activation", "gelu_pytorch_tanh"),
    ("partial_rotary_factor", 0.5),
    ("swiglu_limit", 7.0),
    ("llama_4_scaling", {"beta": 0.1}),
    ("original_max_position_embeddings", 4096),
    ("pruned_heads", {"0": [1]}),
    ("is_encoder_decoder", True),
    ("add_cross_attention", True),
    ("vision_config", {"hidden_size": 8}),
    ("quantization", {"bits": 4}),
    ("compression_config", {"quant_method": "compressed-tensors"}),
    ("indexer_type", ["full", "shared"]),
    ("score_func", "softmax"),
    ("n_expert_groups", 1),
    ("n_limited_groups", 1),
    ("n_activated_experts", 1),
    ("rope_factor", 1),
    ("index_rope_theta", 1e6),
    ("index_norm_eps", 1e-5),
    ("rope_type", "linear"),
    ("rope_scaling_type", "default"),
    ("use_grouped_topk", False),
    ("apply_router_weight_on_input", True),
    ("normalize_topk_prob", False),
    ("attn_config", {"clip_qkv": 8}),
    ("residual_scaling", 0.5),
    ("logit_scaling", 0.5),
    ("pre_norm", False),
    ("lm_head_dtype", "bfloat16"),
    ("beta_fast", 16),
    ("dim", 256),
    ("use_cache", {}),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_what_would_be_another_model_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"^{name}") as refusal:
        ModelConfig.from_hf(hf(**{name: value}))
    assert "\n" not in str(refusal.value)


def test_the_message_has_the_value_that_would_work():
    with pytest.raises(UserError, match=r'moe_router_dtype is "bfloat16"; it must be "float32" or .*absent'):
        ModelConfig.from_hf(hf(moe_router_dtype="bfloat16"))
    with pytest.raises(UserError, match=r'mlp_layer_types\[1\] is "dense"; it must be "sparse"'):
        ModelConfig.from_hf(hf(mlp_layer_types=["dense", "dense"]))


NEUTRAL = [
    {"rope_interleave": True, "indexer_rope_interleave": False, "head_dim": 192, "qk_head_dim": 128},
    {"indexer_types": ["full", "full"], "index_topk_freq": 1, "index_skip_topk_offset": 3, "index_topk_pattern": None},
    {"index_topk_pattern": "FF", "index_skip_topk_offset": 3, "index_share_for_mtp_iteration": True},
    {"index_topk_pattern": ["full", "full"], "index_skip_topk_offset": None, "use_index_cache": False},
    {"index_skip_topk_offset": 2, "num_experts": EXPERTS, "num_local_experts": EXPERTS, "moe_router_dtype": "float32"},
    {"mlp_layer_types": ["dense", "sparse"], "layer_types": ["deepseek_sparse_attention"] * LAYERS, "mlp_bias": False},
    {"sliding_window": None, "use_sliding_window": False, "max_window_layers": 5, "attn_logit_softcapping": None},
    {"residual_multiplier": 1.0, "logit_scale": 1, "clip_qkv": None, "use_qk_norm": False, "qkv_bias": False},
    {"layer_norm_eps": 1e-6, "hidden_activation": "silu", "partial_rotary_factor": 1.0, "pruned_heads": {}},
    {"original_max_position_embeddings": 32, "attention_multiplier": ModelConfig.tiny().softmax_scale},
    {"dtype": "float32", "torch_dtype": "bfloat16", "task_specific_params": {"text-generation": {"max_length": 9}}},
    {"chunk_size_feed_forward": 64, "is_decoder": True, "output_attentions": True, "id2label": {"0": "a"}},
    {"use_sliding_window": False, "sliding_window": 4096, "sliding_window_size": 128},
    {"score_func": "sigmoid", "n_expert_groups": 4, "n_limited_groups": 2, "n_activated_experts": 2, "rope_factor": 40},
    {"index_rope_theta": 10000.0, "index_norm_eps": 1e-6, "rope_type": "yarn", "rope_scaling_type": "yarn"},
    {"use_grouped_topk": True, "apply_router_weight_on_input": False, "normalize_topk_prob": True, "attn_config": {}},
    {"residual_scaling": 1.0, "logit_scaling": 1, "pre_norm": True, "lm_head_dtype": "float32", "scale_fmt": "ue8m0"},
    {"dim": 128, "inter_dim": 256, "moe_inter_dim": 128, "n_layers": 2, "n_dense_layers": 1, "n_heads": 2},
    {"architectures": None, "prefix": None, "num_nextn_predict_layers": None, "cross_attention_hidden_size": None},
]  # fmt: skip


@pytest.mark.parametrize("fields", NEUTRAL)
def test_what_changes_nothing_is_read_without_a_word_and_written_back(fields):
    written = read(**fields).to_hf()
    expected = fields | ({"num_nextn_predict_layers": 0} if "num_nextn_predict_layers" in fields else {})
    assert {name: written[name] for name in fields} == expected


@pytest.mark.parametrize("name", [*_NULL_IS_ABSENT, "rope_theta"])
def test_null_is_the_same_as_absent(name):
    absent = hf()
    absent.pop(name, None)
    assert read(**{name: None}) == ModelConfig.from_hf(absent)


def test_a_null_whose_meaning_is_disputed_is_refused():
    """An absent field means true here, and to transformers a null means false."""
    with pytest.raises(UserError, match="norm_topk_prob is None"):
        read(norm_topk_prob=None)


def test_a_null_rope_theta_beside_one_in_a_block_is_none():
    block = ModelConfig.tiny().rope_scaling.to_hf() | {"rope_theta": 5}
    assert read(rope_theta=None, rope_scaling=block).rope_theta == 5


def test_every_field_without_effect_has_its_reason_and_may_say_anything():
    assert all(WITHOUT_EFFECT.values())
    written = read(**dict.fromkeys(WITHOUT_EFFECT, "any")).to_hf()
    assert {written[name] for name in WITHOUT_EFFECT} == {"any"}


def test_a_file_of_transformers_5_is_read_without_a_word_and_round_trips():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = ModelConfig.from_hf(WRITTEN_BY_TRANSFORMERS_5)
    assert config.rope_scaling == RopeScaling(original_max_position_embeddings=32, type_keys=("type", "rope_type"))
    assert config.quantization_config.scale_fmt is None
    assert {name: config.to_hf()[name] for name in WRITTEN_BY_TRANSFORMERS_5} == WRITTEN_BY_TRANSFORMERS_5


@pytest.mark.parametrize("config", PRESETS.values())
def test_what_this_project_writes_is_read_without_a_word(config, golden):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ModelConfig.from_hf(config.to_hf())
        for name in ("tiny", "tiny128_bf16", "tiny128_fp8"):
            ModelConfig.from_hf(golden(f"{name}/model"))


def test_fields_that_nobody_knows_are_named_in_one_warning(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf(frobnication=1, wibble=[2], dtype="bfloat16", absent=None)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ModelConfig.from_hf(tmp_path)
    (warning,) = caught
    assert warning.category is CheckpointWarning
    text = str(warning.message)
    assert text.startswith(str(tmp_path / "config.json")) and text.endswith(": frobnication, wibble")


def test_a_config_made_in_python_is_checked_too():
    with pytest.raises(UserError, match=r"^sliding_window is 4096"):
        ModelConfig.tiny(unknown=(("sliding_window", "4096"),))
    with pytest.raises(UserError, match=r"^architectures"):
        ModelConfig.tiny(architectures=("LlamaForCausalLM",))


def test_a_copy_leaves_out_what_only_said_again_what_has_changed():
    config = read(mlp_layer_types=["dense", "sparse"], num_experts=EXPERTS, dtype="bfloat16")
    assert config.replace(num_hidden_layers=3).extra_fields == {"num_experts": EXPERTS, "dtype": "bfloat16"}
    assert config.replace(index_topk=8).extra_fields == config.extra_fields
    default = read(rope_scaling={"type": "default"})
    assert default.replace(rope_scaling=RopeScaling()).to_hf()["rope_scaling"] == RopeScaling().to_hf()


# ---- rope ----


def rope(**fields):
    """The tiny preset with these rope fields instead of its own."""
    raw = hf()
    del raw["rope_scaling"], raw["rope_theta"]
    return raw | fields


YARN = ModelConfig.tiny().rope_scaling.to_hf()
ROPES = [
    {"rope_theta": 5e5, "rope_scaling": None},
    {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
    {"rope_theta": 5e5, "rope_scaling": None, "rope_parameters": None},
    {"rope_theta": 5e5, "rope_scaling": YARN | {"rope_theta": 5e5, "truncate": True, "attention_factor": None}},
    {"rope_parameters": YARN | {"rope_theta": 5e5, "partial_rotary_factor": 1.0, "attention_factor": 1.0}},
    {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default", "type": "default", "partial_rotary_factor": 1}},
    {"rope_theta": 5e5, "rope_parameters": YARN | {"rope_theta": 5e5}, "rope_scaling": YARN},
    {"rope_theta": 5e5, "rope_parameters": YARN | {"rope_theta": 5e5}, "rope_scaling": None},
]


@pytest.mark.parametrize("fields", ROPES)
def test_every_spelling_of_the_rope_fields_means_the_same_and_round_trips(fields):
    config = ModelConfig.from_hf(rope(**fields))
    scaled = "factor" in (fields.get("rope_parameters") or fields["rope_scaling"] or {})
    assert config.rope_theta == 5e5 and (config.rope_scaling and config.rope_scaling.factor) == (40 if scaled else None)
    assert config.to_hf() == rope(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_theta": 1e4, "rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "scaling.partial_rotary_factor"),
        ({"rope_theta": 1e4, "rope_scaling": YARN | {"attention_factor": 1.4}}, "rope_scaling.attention_factor"),
        ({"rope_theta": 1e4, "rope_scaling": YARN | {"truncate": False}}, "rope_scaling.truncate"),
        ({"rope_theta": 1e4, "rope_scaling": YARN | {"short_factor": [1.0]}}, "rope_scaling.short_factor"),
        ({"rope_theta": 1e4, "rope_scaling": YARN | {"rope_theta": 2e4}}, "rope_theta 10000.0 .* disagree"),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "default", "factor": 4}}, "rope_scaling.factor"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2}}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rs.partial_rotary_factor"),
        ({"rope_parameters": {"indexed_attention": YARN | {"rope_theta": 1e4}}}, "rope_parameters.indexed_attention"),
        ({"rope_parameters": []}, "rope_parameters"),
        ({"rope_parameters": YARN}, "rope_parameters.rope_theta is missing"),
        ({"rope_theta": 2e4, "rope_parameters": YARN | {"rope_theta": 1e4}}, "rope_theta .* disagree"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e4}, "rope_scaling": YARN}, "rope_scaling .* disagree"),
    ],
)  # fmt: skip
def test_rope_fields_that_are_not_computed_or_disagree_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        ModelConfig.from_hf(rope(**fields))


# ---- the released form of FP8 ----

PLAIN = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    "more",
    [
        {"modules_to_not_convert": None},
        {"modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"], "fmt": "e4m3"},
        {"ignored_layers": ["lm_head"], "scale_fmt": "ue8m0", "is_checkpoint_fp8_serialized": True},
        {"fmt": None, "scale_fmt": None, "dequantize": False, "modules_to_convert": None, "expert_dtype": "fp8"},
        {"scale_fmt": "float"},
    ],
)
def test_fp8_as_others_write_it(more):
    config = read(quantization_config=PLAIN | more)
    scale_fmt = "ue8m0" if more.get("scale_fmt") == "ue8m0" else None
    assert isinstance(config.quantization_config, QuantizationConfig)
    assert config.quantization_config.scale_fmt == scale_fmt
    assert config.to_hf()["quantization_config"] == PLAIN | more


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("modules_to_not_convert", "lm_head"),
        ("modules_to_convert", ["model.embed_tokens"]),
        ("dequantize", True),
        ("expert_dtype", "fp4"),
        ("kv_cache_scheme", {"num_bits": 8}),
        ("fmt", "e5m2"),
        ("weight_block_size", None),
        ("quant_method", None),
        ("frobnication", 1),
    ],
)
def test_fp8_of_another_kind_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"^quantization_config.{name}"):
        ModelConfig.from_hf(hf(quantization_config=PLAIN | {name: value}))


def test_a_list_of_plain_modules_loses_those_that_become_quantised():
    names = ["lm_head", "mlp.gate", "self_attn.q_a_proj", "mlp.experts.3", "model.layers.7"]
    parts = ("self_attn.q_a_proj", "mlp.experts.{expert}.up_proj", "mlp.gate_proj")
    config = QuantizationConfig(extra_fields=(("modules_to_not_convert", json.dumps(names)),))
    config = config.with_all_quantized(f"model.layers.0.{part}" for part in parts)
    assert config.to_hf()["modules_to_not_convert"] == ["lm_head", "mlp.gate", "model.layers.7"]


def test_configs_are_read_without_jax():
    code = "import sys, dsv32_jax.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
