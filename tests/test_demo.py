"""`make demo` runs from end to end."""

import numpy as np
import pytest

from experiments import demo


@pytest.mark.slow
def test_demo_says_that_weights_are_random_and_prints_every_step(tmp_path, capfd):
    demo.main(tmp_path)
    out = capfd.readouterr().out
    assert "RANDOM" in out and "gibberish" in out
    assert [line.split()[2] for line in out.splitlines() if line.startswith("$ ")] == [
        "convert",
        "info",
        "score",
        "generate",
    ]
    # Random weights know nothing: the perplexity is near the size of the vocabulary.
    perplexity = next(float(line.split()[1]) for line in out.splitlines() if line.startswith("perplexity"))
    assert np.isclose(perplexity, 512, rtol=0.2)
    assert (tmp_path / "random-orbax" / "dsv32_checkpoint.json").is_file()


def test_tokenizer_gives_back_any_text(tmp_path):
    from dsv32_jax.tokenizer import Tokenizer

    demo.write_tokenizer(tmp_path, 512)
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.vocab_size <= 512
    for text in (demo.TEXT, "naïve 灯台 🗼"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
