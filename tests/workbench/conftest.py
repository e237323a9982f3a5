"""Small models, which the workbench's tests share."""

import pytest

from dsv32_jax.config import ModelConfig
from dsv32_jax.experiments.workbench.random_model import random_model
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def small(tiny) -> LanguageModel:
    """Two layers, one of them with experts, 8 chosen positions, random weights, contexts of up to 256 tokens."""
    config = ModelConfig.tiny(
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_nextn_predict_layers=0,
        index_topk=8,
        vocab_size=512,
        max_position_embeddings=256,
        initializer_range=0.15,
        quantization_config=None,
    )
    m = random_model(config)
    m.tokenizer = Tokenizer(tiny)
    return m


@pytest.fixture(scope="session")
def fp8() -> LanguageModel:
    """Four layers in FP8 blocks, the last of them with experts."""
    config = ModelConfig.tiny(
        num_hidden_layers=4, first_k_dense_replace=3, num_nextn_predict_layers=0, max_position_embeddings=1024
    )
    return random_model(config)
