"""Checks fields of config.json that are no attribute of `ModelConfig`: the values that each may have, and why.

Every field that a released config of this family has, or that transformers' classes for `deepseek_v32` and
`glm_moe_dsa` define, is an attribute of `ModelConfig` (and computed or checked there) or listed here. A value that
would change the result is refused; null is the same as absent. Unknown fields are named in one warning.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dsv32_jax.common.fields import near_miss, neutral, shown
from dsv32_jax.config.rope_scaling import check_rope_again
from dsv32_jax.errors import UserError

if TYPE_CHECKING:
    from dsv32_jax.config import ModelConfig

_OFF = (False, 0)
_ONE = (1,)

# Lists with one entry a layer: the values that a layer's entry may have, and the reason.
PER_LAYER: dict[str, tuple[Callable[[ModelConfig, int], tuple[str, ...]], str]] = {
    "mlp_layer_types": (
        lambda config, layer: ("sparse",) if config.is_moe(layer) else ("dense",),
        "the first first_k_dense_replace layers are dense, and every later one has experts",
    ),
    "layer_types": (
        lambda config, layer: ("indexed_attention", "deepseek_sparse_attention"),
        "every layer has an indexer and sparse attention",
    ),
    "indexer_types": (lambda config, layer: ("full",), "every layer chooses by its own indexer"),
    "index_topk_pattern": (lambda config, layer: ("F", "full"), "every layer chooses by its own indexer"),
}


def _of_yarn(name: str, without: Any) -> Callable[[ModelConfig], Any]:
    """An attribute of `rope_scaling`, or `without` in a config that has none."""
    return lambda config: getattr(config.rope_scaling, name) if config.rope_scaling else without


# Other names of attributes, or values that follow from several; many are of DeepSeek's own inference code.
RESTATED: dict[str, Callable[[ModelConfig], Any]] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "moe_num_experts"), lambda config: config.n_routed_experts),
    **dict.fromkeys(("num_shared_experts", "moe_num_shared_experts"), lambda config: config.n_shared_experts),
    **dict.fromkeys(
        (
            "num_experts_per_token",
            "num_selected_experts",
            "n_activated_experts",
            "moe_topk",
            "moe_top_k",
            "moe_router_topk",
        ),
        lambda config: config.num_experts_per_tok,
    ),
    **dict.fromkeys(
        ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
        lambda config: config.n_shared_experts * config.moe_intermediate_size,
    ),
    **dict.fromkeys(("qk_head_dim", "q_head_dim"), lambda config: config.qk_head_dim),
    **dict.fromkeys(("dim", "d_model", "n_embd"), lambda config: config.hidden_size),
    **dict.fromkeys(("inter_dim", "ffn_hidden_size"), lambda config: config.intermediate_size),
    **dict.fromkeys(("moe_inter_dim", "moe_ffn_hidden_size"), lambda config: config.moe_intermediate_size),
    **dict.fromkeys(("n_layers", "n_layer", "num_layers"), lambda config: config.num_hidden_layers),
    **dict.fromkeys(("n_heads", "n_head", "num_heads"), lambda config: config.num_attention_heads),
    **dict.fromkeys(("n_expert_groups", "num_expert_groups", "num_expert_group"), lambda config: config.n_group),
    **dict.fromkeys(("n_limited_groups", "num_limited_groups"), lambda config: config.topk_group),
    **dict.fromkeys(("normalize_topk_prob", "norm_topk_probs", "route_norm"), lambda config: config.norm_topk_prob),
    **dict.fromkeys(
        ("moe_layer_start_index", "num_dense_layers", "n_dense_layers"), lambda config: config.first_k_dense_replace
    ),
    **dict.fromkeys(
        ("route_scale", "router_scaling_factor", "moe_router_scaling_factor", "moe_routed_scaling_factor"),
        lambda config: config.routed_scaling_factor,
    ),
    "mlp_only_layers": lambda config: list(range(config.first_k_dense_replace)),
    **dict.fromkeys(("num_mtp_layers", "mtp_num_layers"), lambda config: config.num_nextn_predict_layers),
    **dict.fromkeys(
        ("layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_eps", "norm_epsilon", "rms_norm_epsilon"),
        lambda config: config.rms_norm_eps,
    ),
    "rotary_dim": lambda config: config.qk_rope_head_dim,
    **dict.fromkeys(
        ("rope_base", "rotary_base", "rotary_emb_base", "index_rope_theta"), lambda config: config.rope_theta
    ),
    **dict.fromkeys(("rope_type", "rope_scaling_type"), _of_yarn("type", "default")),
    "rope_factor": _of_yarn("factor", 1),
    **{name: _of_yarn(name, None) for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")},
    **dict.fromkeys(
        ("original_max_position_embeddings", "original_max_seq_len", "original_seq_len"),
        lambda config: (
            config.rope_scaling.original_max_position_embeddings
            if config.rope_scaling
            else config.max_position_embeddings
        ),
    ),
    **dict.fromkeys(
        ("attention_multiplier", "attention_scale", "attn_scale", "softmax_scale"),
        lambda config: config.softmax_scale,
    ),
}

Rules = dict[str, tuple[tuple[Any, ...], str]]
"""By name: the values besides null that leave the computation as it is, and the reason."""


def _each(*groups: tuple[str, tuple[Any, ...], str]) -> Rules:
    return {name: (accepted, reason) for names, accepted, reason in groups for name in names.split()}


FAMILY = _each(
    ("rope_interleave", (True,), "attention rotates neighbouring pairs"),
    ("indexer_rope_interleave", (False,), "the indexer rotates its first half against its second"),
    ("index_topk_freq", _ONE, "every layer chooses by its own indexer"),
    # Without a schedule that shares nothing, readers would have to guess the rest of it.
    ("index_skip_topk_offset", (2,), "every layer chooses by its own indexer; with index_topk_freq 1 any offset does"),
    ("moe_router_dtype router_dtype", ("float32", "fp32"), "the router's product and scores are float32"),
    ("index_norm_eps", (1e-6,), "the norm of the index keys has 1e-6 whatever rms_norm_eps is"),
    ("lm_head_dtype", ("float32", "fp32"), "logits are float32"),
    ("scale_fmt", ("ue8m0",), "scales of activations are powers of two"),
    ("mlp_bias", (False,), "no feed-forward layer has a bias"),
    ("index_kpool index_block_size index_topk_blocks index_local_blocks indexer_compress_ratio", _OFF,
     "the indexer scores and chooses single tokens"),
    ("per_layer_config", ({},), "all layers have the same sizes"),
)  # fmt: skip
"""Fields of this family, by transformers, vLLM and SGLang."""

OTHERS = _each(
    ("attention_window local_attention attention_chunk_size window_size", _OFF,
     "attention reaches back to the first token"),
    ("is_causal causal causal_attention", (True,), "attention is causal"),
    ("attention_sink attention_sinks use_sinks attn_sink add_full_attention_sink_bias "
     "add_swa_attention_sink_bias", _OFF,
     "the softmax of attention has no sink"),
    ("attn_temperature_tuning llama_4_scaling use_logn_attn use_dynamic_ntk floor_scale", _OFF,
     "the scale of attention does not depend on positions"),
    ("query_pre_attn_scalar", (), "the scale of attention follows from the widths of a head and from YaRN"),
    ("clip_qkv qkv_clip", _OFF, "queries, keys and values are not clipped"),
    ("attn_output_gate attention_gate gated_attention gated_attn use_attention_gate use_output_gate", _OFF,
     "the output of attention has no gate"),
    ("attention_value_scale", _ONE, "values are not scaled"),
    ("attention_k_eq_v", _OFF, "keys and values are different parts of the latent's product"),
    ("use_bidirectional_attention", _OFF, "attention is causal"),
    ("mla_scale_q_lora mla_scale_kv_lora", _OFF, "latents are not scaled"),
    ("num_kv_shared_layers", _OFF, "every layer has its own keys and values"),
    ("cla_share_factor", _ONE, "every layer has its own keys and values"),
    ("alibi use_alibi", _OFF, "positions are RoPE's"),
    ("position_embedding_type", ("rope", "rotary"), "positions are RoPE's"),
    ("partial_rotary_factor rotary_pct rotary_percent rotary_percentage rope_pct rope_ratio rope_scaling_factor", _ONE,
     "all of qk_rope_head_dim is rotated, by rope_theta's frequencies"),
    ("rope_local_base_freq local_rope_theta global_rope_theta swa_rope_theta layer_rope_theta compress_rope_theta", (),
     "all layers rotate by rope_theta"),
    ("no_rope_layers", ([],), "every layer has RoPE"),
    ("no_rope_layer_interval", _OFF, "every layer has RoPE"),
    ("use_rope use_mla", (True,), "attention is MLA with RoPE"),
    ("norm_type layer_norm_type layernorm_type normalization normalization_type",
     ("rmsnorm", "rms_norm", "RMSNorm", "RMS", "rms"),
     "the residual stream has RMSNorm"),
    ("layernorm_zero_centered_gamma layernorm_1p zero_centered_gamma use_gemma_norm", _OFF,
     "RMSNorm multiplies by its weight"),
    ("use_post_norm post_norm sandwich_norm use_sandwich_norm norm_after apply_residual_connection_post_layernorm "
     "parallel_attn parallel_residual use_parallel_residual", _OFF,
     "a layer is attention and then feed-forward, each after its norm"),
    ("embed_layer_norm embedding_norm use_embedding_layernorm normalize_embeddings scale_embedding "
     "scale_embeddings", _OFF,
     "embeddings go into the first layer as they are"),
    ("emb_scale embedding_scale scale_emb residual_scale residual_scaling logit_scale logit_scaling "
     "logits_scale logits_scaling output_scale", _ONE,
     "embeddings, residual additions and logits are not scaled"),
    ("scale_depth dim_model_base", (), "embeddings, residual additions and logits are not scaled"),
    ("hidden_activation activation activation_function act_fn mlp_activation mlp_hidden_act", ("silu", "swish"),
     "feed-forward layers are SwiGLU"),
    ("swiglu_limit swiglu_alpha", _OFF, "SwiGLU is not clamped"),
    ("use_moe", (True,), "later layers have experts"),
    ("decoder_sparse_step expert_interval moe_layer_interval interleave_moe_layer_step moe_every_n_layers", _ONE,
     "every layer after first_k_dense_replace has experts"),
    ("use_expert_bias use_routing_bias moe_router_enable_expert_bias", (True,), "experts are chosen by score and bias"),
    ("moe_router_score_function router_score_function router_scoring_func score_func score_function "
     "scoring_function", ("sigmoid",),
     "the router's score is a sigmoid"),
    ("use_grouped_topk", (True,), "experts are chosen among topk_group of n_group groups"),
    ("apply_router_weight_on_input", _OFF, "routing weights multiply what experts return"),
    ("attn_config ffn_config", ({},), "sizes and kinds are read from the fields of DeepSeek-V3.2 alone"),
    ("pre_norm", (True,), "a layer is attention and then feed-forward, each after its norm"),
    ("router_temperature", _ONE, "the router's logits are as they come"),
    ("capacity_factor expert_capacity moe_capacity_factor moe_expert_capacity_factor moe_token_drop_policy "
     "drop_tokens", _OFF,
     "every token reaches all its experts"),
    ("use_shared_expert_gate shared_expert_gate", _OFF, "the shared expert has no gate"),
    ("mtp_layer_types", (["indexed_attention"], ["deepseek_sparse_attention"], ["sparse"]),
     "the MTP layer has an indexer, sparse attention and experts"),
    ("moe_latent_size", (), "experts read the residual stream at its full width"),
    ("n_zero_experts zero_expert_num num_hash_layers", (0,), "experts are chosen among n_routed_experts"),
    ("compress_ratios o_groups o_lora_rank", ([], 0), "attention is that of DeepSeek-V3.2"),
    ("hc_mult", _ONE, "there is one residual stream"),
    ("is_encoder_decoder add_cross_attention tie_encoder_decoder cross_attention_hidden_size", _OFF,
     "the model is a decoder alone"),
    ("pruned_heads", ({},), "no head is pruned"),
    ("prefix", ("",), "nothing is put before a prompt but the beginning-of-sentence token"),
    ("vision_config audio_config text_config encoder decoder", (), "the model is of text alone"),
    ("quantization compression_config", (), "how weights are stored is read from quantization_config"),
    ("expert_dtype", ("fp8",), "experts are stored as quantization_config says"),
)  # fmt: skip
"""Fields by which other architectures compute something else."""

_PATTERNS = _each(
    ("*softcap* *soft_cap* *logit_cap*", _OFF, "neither attention scores nor logits are capped"),
    ("mup_*", (False, 1), "widths are not those of muP"),
    ("*_multiplier", _ONE,
     "nothing is multiplied by a constant beside the softmax scale and the routing weights"),
    ("*qk_norm* *qk_layernorm* *query_key_norm* q_norm k_norm", _OFF,
     "only the latents and the index keys have a norm"),
    ("*sliding_window*", _OFF, "attention reaches back to the first token"),
    ("*_bias bias add_bias* *bias_linear", _OFF, "no linear has a bias"),
    ("use_lora* lora_*", _OFF, "the model has no adapters"),
)  # fmt: skip
"""The same for fields that are not listed by name, by shell patterns of their names."""

WITHOUT_EFFECT: dict[str, str] = {
    name: reason
    for reason, names in {
        "it says where the file comes from": """
            _name_or_path name_or_path _commit_hash auto_map custom_pipelines transformers.js_config
            dsv32_jax_quantization unsloth_fixed unsloth_version model_name license language""",
        "the widths of a head are qk_nope_head_dim, qk_rope_head_dim and v_head_dim": """
            head_dim attention_head_dim kv_channels""",
        "a tensor's type is that of the file, and the computation's is chosen by whoever loads it": """
            dtype params_dtype use_bfloat16 _pre_quantization_dtype""",
        "how long a sequence may be is read from max_position_embeddings": """
            max_seq_len max_seq_length max_sequence_length seq_length model_max_length n_positions""",
        "absent positions are known by their place, and a chat's tokens by the tokenizer": """
            pad_token_id sep_token_id decoder_start_token_id tokenizer_class mask_token_id unk_token_id""",
        "with sliding_window off nothing reads it": "max_window_layers",
        "with one drafted token a step nothing is shared between drafts": "index_share_for_mtp_iteration",
        "it switches on sharing between layers, whose schedule is refused": "use_index_cache",
        "it asks for more outputs beside the same result": """
            output_attentions output_hidden_states output_router_logits return_dict use_return_dict torchscript
            tie_last_hidden_states""",
        "it chooses between implementations of the same": """
            attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal
            experts_implementation _experts_implementation chunk_size_feed_forward is_decoder pretraining_tp tp_size
            use_flash_attn base_model_tp_plan base_model_ep_plan base_model_pp_plan base_model_fsdp_plan xla_device""",
        "it belongs to heads for other tasks": """
            id2label label2id num_labels problem_type classifier_dropout finetuning_task""",
        "it concerns training": """
            aux_loss_alpha seq_aux router_aux_loss_coef aux_loss_coef router_z_loss_coef moe_aux_loss_coeff
            z_loss_alpha router_jitter_noise bias_update_speed router_bias_update_speed gradient_checkpointing
            loss_type tf_legacy_loss mtp_loss_scaling_factor hidden_dropout hidden_dropout_prob attn_dropout
            resid_dropout resid_pdrop embd_pdrop attn_pdrop residual_dropout dropout attention_probs_dropout_prob
            initializer_std init_std""",
        "sampling is set by generation_config.json and by whoever samples, as in transformers 5": """
            task_specific_params max_length min_length max_new_tokens do_sample early_stopping num_beams temperature
            top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
            encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
            forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
            suppress_tokens begin_suppress_tokens num_beam_groups diversity_penalty min_p epsilon_cutoff eta_cutoff
            encoder_repetition_penalty num_assistant_tokens num_assistant_tokens_schedule
            assistant_confidence_threshold assistant_lookbehind target_lookbehind""",
    }.items()
    for name in names.split()
}  # fmt: skip
"""By name: why a field has no effect, whatever its value."""

_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
_IMPORTANT = frozenset({*PER_LAYER, *FAMILY, *RESTATED, "rope_parameters"})
"""Names of which a typing slip is refused like one of an attribute's."""


def check_extra_fields(config: ModelConfig, fields: Mapping[str, Any]) -> None:
    """Refuses fields beside the attributes of `config` whose values would change the computation."""
    for name, value in fields.items():
        check_field(config, name, value, fields)


def check_field(config: ModelConfig, name: str, value: Any, fields: Mapping[str, Any]) -> None:
    """The same for one field; `fields` are all fields beside the attributes."""
    if name in WITHOUT_EFFECT or value is None:
        return
    if name in _ROPE:
        check_rope_again(config, name, value)
    elif name in PER_LAYER:
        _check_layers(config, name, value)
    elif name in RESTATED:
        neutral(name, value, [RESTATED[name](config)], "the config's other fields say so")
    elif (rule := _rule(name)) is not None and not _switched_off(name, fields):
        neutral(name, value, *rule)


def unknown(names: Iterable[str]) -> list[str]:
    """Those of the names that are not listed here."""
    known = {*WITHOUT_EFFECT, *PER_LAYER, *RESTATED, *_ROPE}
    return [name for name in names if name not in known and _rule(name) is None]


def refuse_typing_slips(names: Iterable[str], attributes: frozenset[str]) -> None:
    """Refuses an unknown name that is nearly a name that matters; otherwise it would be ignored."""
    for name in unknown(names):
        if meant := near_miss(name, attributes | _IMPORTANT):
            raise UserError(f"{name} is not a field of this config; did you mean {meant}?")


def _rule(name: str) -> tuple[tuple[Any, ...], str] | None:
    rule = FAMILY.get(name) or OTHERS.get(name)
    return rule or next((rule for glob, rule in _PATTERNS.items() if fnmatch.fnmatchcase(name, glob)), None)


def _switched_off(name: str, fields: Mapping[str, Any]) -> bool:
    """Whether another field says that nothing reads this one."""
    if "sliding_window" in name and name != "use_sliding_window":
        return fields.get("use_sliding_window") is False
    return name == "index_skip_topk_offset" and _shares_nothing(fields)


def _shares_nothing(fields: Mapping[str, Any]) -> bool:
    """Whether a field says that every layer has its own indexer; its value is checked by itself."""
    return any(fields.get(name) is not None for name in ("index_topk_freq", "index_topk_pattern", "indexer_types"))


def _check_layers(config: ModelConfig, name: str, value: Any) -> None:
    expected, reason = PER_LAYER[name]
    text = isinstance(value, str) and name == "index_topk_pattern"
    if not (text or isinstance(value, list | tuple)) or len(value) != config.num_hidden_layers:
        raise UserError(
            f"{name} is {shown(value)}; it must be absent or have one entry for each of the "
            f"num_hidden_layers {config.num_hidden_layers} layers"
        )
    for layer, entry in enumerate(value):
        neutral(f"{name}[{layer}]", entry, expected(config, layer), reason)
        if entry is None:
            raise UserError(f"{name}[{layer}] is null; it must be {shown(expected(config, layer)[0])}: {reason}")
