"""`make demo` runs from end to end, and the shipped model is what its card says."""

import numpy as np
import pytest

from dsv32_jax import convert
from dsv32_jax.config import ModelConfig
from dsv32_jax.experiments import demo
from dsv32_jax.experiments.train_demo.sizes import SIZES
from dsv32_jax.generate.loading import DEMO, load
from dsv32_jax.generate.tokenizer import Tokenizer


@pytest.mark.slow
def test_demo_continues_answers_and_scores(capfd):
    demo.main()
    out = capfd.readouterr().out
    commands = [line for line in out.splitlines() if line.startswith("$ ")]
    assert [line.partition("dsv32 ")[2].split()[0] for line in commands] == ["info", "generate", "chat", "score"]
    perplexity = next(float(line.split()[1]) for line in out.splitlines() if line.startswith("perplexity"))
    assert perplexity < 60  # of 3072 tokens; random weights would have about as many


def test_shipped_model_is_the_one_that_training_makes():
    assert ModelConfig.from_hf(DEMO) == ModelConfig.from_hf(SIZES["demo"].config.to_hf())
    sizes = [file.stat().st_size for file in DEMO.iterdir()]
    assert sum(sizes) <= 20 * 10**6 and max(sizes) <= 15 * 10**6
    model = convert.load_hf(DEMO)
    np.testing.assert_array_equal(model.embed, model.mtp.embed)
    tokenizer = Tokenizer(DEMO)
    assert tokenizer.vocab_size <= model.config.vocab_size
    assert (tokenizer.bos_id, tokenizer.eos_id) == (model.config.bos_token_id, model.config.eos_token_id)


def test_shipped_model_writes_words():
    lm = load("demo")
    text = lm.generate("The command", 24).texts[0]
    assert len(text.split()) > 8 and text.isprintable() | ("\n" in text)
    score = lm.score("The file is read from the current directory, and its name is written to standard output.")
    assert score.perplexity < 60
