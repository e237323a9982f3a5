"""The sizes of the trained models, and their stages."""

import dataclasses

from dsv32_jax.config import ModelConfig, RopeScaling
from dsv32_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
      name: of its checkpoints and curves.
      steps: optimiser steps.
      batch: sequences a step.
      length: tokens of a sequence.
      selection: what attention sees, "dense" or "indexer".
      trains: "main" (all but the indexers), "indexer" (all else frozen) or "all".
      learning_rate: of Muon, matched to Adam's by its update size; reached after `warmup` steps.
      final: the share of it at the last step, approached linearly over the last `decay` of the steps.
      warmup: steps.
      decay: share of the steps.
      recall_share: share of the sequences that carry recall tasks (`recall.py`).
      chat_every: every so many steps is one on question and answer pairs; 0 for none.
      greeting_share: share of those pairs that are greetings and questions about the model itself, beyond their own.
      mtp_weight: of the multi-token prediction loss (V3 report, section 4.2: 0.3, later 0.1).
      bias_speed: the router bias's change a step (V3 report: 0.001, 0 at the end).
    """

    name: str
    steps: int
    batch: int
    length: int
    selection: str
    trains: str
    learning_rate: float
    final: float = 1.0
    warmup: int = 50
    decay: float = 1.0
    recall_share: float = 0.3
    chat_every: int = 0
    greeting_share: float = 0.0
    mtp_weight: float = 0.3
    bias_speed: float = 0.001

    @property
    def attention(self) -> str:
        """That of `dsv32_jax.model.sequence.Run`: over everything visible, or over what the indexer selects."""
        return "dense" if self.selection == "dense" else "sparse"

    @property
    def index_loss(self) -> bool:
        """Whether the indexers train."""
        return self.trains != "main"


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and its stages, in order."""

    config: ModelConfig
    stages: tuple[Stage, ...]

    def stage_number(self, name: str) -> int:
        """The place of a stage."""
        names = [stage.name for stage in self.stages]
        if name not in names:
            raise UserError(f"stage {name}: unknown; it is one of {', '.join(names)}")
        return names.index(name)


def size_named(name: str) -> Size:
    """One of `SIZES`."""
    if name not in SIZES:
        raise UserError(f"--size {name}: unknown; it is one of {', '.join(SIZES)}")
    return SIZES[name]


DEMO = ModelConfig(
    vocab_size=3072,
    hidden_size=256,
    num_hidden_layers=6,
    first_k_dense_replace=3,
    max_position_embeddings=4096,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=128,
    kv_lora_rank=512,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=64,
    index_n_heads=4,
    index_head_dim=128,
    index_topk=256,
    intermediate_size=640,
    moe_intermediate_size=128,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    rope_scaling=RopeScaling(factor=4, original_max_position_embeddings=1024),
    transformers_version=None,
)
"""Latent 512, rope 64, index head 128 as in the real model: the widths that the kernels are made for."""

SIZES = {
    "demo": Size(
        DEMO,
        (
            Stage("pretrain", 6900, 64, 1024, "dense", "main", 1e-2, warmup=100, recall_share=0.25),
            Stage("long", 520, 16, 4096, "dense", "main", 1e-2, recall_share=0.5),
            Stage("warmup", 220, 16, 4096, "dense", "indexer", 3e-3, final=0.1, warmup=20, recall_share=0.5),
            Stage("sparse", 430, 16, 4096, "indexer", "all", 6e-3, final=0.1, recall_share=0.4, mtp_weight=0.1),
            Stage(
                "chat", 60, 16, 4096, "indexer", "all", 1e-3, final=0.1, warmup=10, recall_share=0.4, chat_every=2,
                mtp_weight=0.1,
            ),
            Stage(
                "talk", 220, 16, 128, "indexer", "all", 6e-4, final=0.1, warmup=10, chat_every=1, greeting_share=0.2,
                mtp_weight=0.1, bias_speed=0.0,
            ),
        ),
    ),
    "tiny": Size(
        ModelConfig.tiny(vocab_size=3072, index_topk=16, max_position_embeddings=1280),
        (
            Stage("pretrain", 20, 4, 64, "dense", "main", 1e-2, warmup=2),
            Stage("long", 4, 2, 128, "dense", "main", 5e-3, warmup=1),
            Stage("warmup", 8, 2, 128, "dense", "indexer", 5e-3, warmup=1),
            Stage("sparse", 6, 2, 128, "indexer", "all", 2e-3, final=0.1, warmup=1),
            Stage("chat", 4, 2, 128, "indexer", "all", 1e-3, final=0.1, warmup=1, chat_every=2, bias_speed=0.0),
        ),
    ),
}  # fmt: skip
"""By name. The tiny one trains in seconds on a CPU and learns nothing: it shows that every stage works."""
