"""Hugging Face tensor names: the one table from the checkpoint's names to this model's parameters."""

from collections.abc import Collection

from dsv32_jax.config import ModelConfig

MODEL = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}

MTP = {
    "embed": "embed_tokens.weight",
    "enorm": "enorm.weight",
    "hnorm": "hnorm.weight",
    "eh_proj": "eh_proj.weight",
    "norm": "shared_head.norm.weight",
    "head": "shared_head.head.weight",
}

MTP_PATHS = "mtp."
"""The prefix of the paths of the MTP layer's parameters."""

LAYER = {
    "attn_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "attn.q_a": "self_attn.q_a_proj.weight",
    "attn.q_a_norm": "self_attn.q_a_layernorm.weight",
    "attn.q_b": "self_attn.q_b_proj.weight",
    "attn.kv_a": "self_attn.kv_a_proj_with_mqa.weight",
    "attn.kv_a_norm": "self_attn.kv_a_layernorm.weight",
    "attn.kv_b": "self_attn.kv_b_proj.weight",
    "attn.o": "self_attn.o_proj.weight",
    "attn.indexer.q_b": "self_attn.indexer.wq_b.weight",
    "attn.indexer.k": "self_attn.indexer.wk.weight",
    "attn.indexer.k_norm_weight": "self_attn.indexer.k_norm.weight",
    "attn.indexer.k_norm_bias": "self_attn.indexer.k_norm.bias",
    "attn.indexer.head_weights": "self_attn.indexer.weights_proj.weight",
    "ffn.gate": "mlp.gate_proj.weight",
    "ffn.up": "mlp.up_proj.weight",
    "ffn.down": "mlp.down_proj.weight",
    "ffn.router": "mlp.gate.weight",
    "ffn.router_bias": "mlp.gate.e_score_correction_bias",
    "ffn.shared.gate": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared.up": "mlp.shared_experts.up_proj.weight",
    "ffn.shared.down": "mlp.shared_experts.down_proj.weight",
    "ffn.experts.gate": "mlp.experts.{expert}.gate_proj.weight",
    "ffn.experts.up": "mlp.experts.{expert}.up_proj.weight",
    "ffn.experts.down": "mlp.experts.{expert}.down_proj.weight",
}


def hf_name(path: str, config: ModelConfig) -> str:
    """The HF name of a parameter; the name of stacked experts contains "{expert}"."""
    if path in MODEL:
        return MODEL[path]
    head, rest = path.split(".", 1)
    if head == "layers":
        layer, rest = rest.split(".", 1)
        return f"model.layers.{layer}.{LAYER[rest]}"
    prefix = f"model.layers.{config.num_hidden_layers}."
    return prefix + (LAYER[rest.removeprefix("layer.")] if rest.startswith("layer.") else MTP[rest])


def mtp_prefix(config: ModelConfig) -> str:
    """The prefix of the names of the MTP layer's tensors."""
    return f"model.layers.{config.num_hidden_layers}."


def is_mtp(names: Collection[str], config: ModelConfig) -> bool:
    """Whether the names are an MTP layer's: only that has eh_proj, which joins an embedding to a hidden state."""
    return mtp_prefix(config) + MTP["eh_proj"] in names


def without_mtp(names: str) -> str:
    """The error of files without the MTP layer that their config announces; `names` is the prefix of its names."""
    return (
        f"num_nextn_predict_layers announces an MTP layer and the files have no {names}*: load without it (mtp=False, "
        "--no-mtp), or set num_nextn_predict_layers to 0 in config.json"
    )


def undeclared_mtp(names: str) -> str:
    """The error of files with an MTP layer that their config does not announce."""
    return (
        f"the files have an MTP layer, {names}*, and num_nextn_predict_layers is 0: set it to 1 in config.json, or "
        "load without the layer (mtp=False, --no-mtp)"
    )


def group_of(path: str) -> str:
    """The unit of streaming of a parameter: a layer, one of its stacks of experts, or a part outside the layers.

    Writing takes twice a unit's bytes of memory, so a stack of experts is a unit by itself.
    """
    if ".experts." in path:
        return path
    return ".".join(path.split(".")[:2]) if path.startswith("layers.") else path.split(".", 1)[0]
