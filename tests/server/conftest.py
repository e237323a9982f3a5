import pytest
from flax import nnx

from dsv32_jax.config import ModelConfig
from dsv32_jax.engine.engine import Engine
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.tokenizer import Tokenizer
from dsv32_jax.model.model import DeepseekV32
from tests.harness import EXACT, golden_directory
from tests.server.harness import Gate

SMALL = {"cache_tokens": 4 * 64, "max_tokens": 8, "max_sequences": 4}
"""One shape of a step, so that little is compiled."""


@pytest.fixture(scope="session")
def lm():
    """Random weights, with the golden checkpoint's tokenizer: texts are nonsense, with broken characters too."""
    config = ModelConfig.tiny(
        num_hidden_layers=2, initializer_range=0.3, quantization_config=None, num_nextn_predict_layers=0
    )
    tokenizer = Tokenizer(golden_directory("tiny") / "model")
    return LanguageModel(DeepseekV32(config, nnx.Rngs(0)), config, tokenizer, EXACT)


@pytest.fixture(scope="session")
def session_engine(lm):
    engine = Engine(lm, **SMALL)
    assert engine.warmup() == 1
    return engine


@pytest.fixture
def engine(session_engine):
    """The engine of the session, without cached blocks; at the end of a test no request or block may be left."""
    session_engine.pool.forget()
    yield session_engine
    while session_engine.busy:
        session_engine.step()
    assert session_engine.pool.statistics().in_use == 0 and not session_engine._owner


@pytest.fixture
def gate(engine, monkeypatch):
    return Gate(engine, monkeypatch)


@pytest.fixture(scope="session")
def reference_engine(lm):
    """Another engine, which nothing else uses."""
    return Engine(lm, **SMALL)
