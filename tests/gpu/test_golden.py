"""The model on a GPU against the recorded outputs: float32 as exactly as on a CPU, bfloat16 within its own noise."""

import numpy as np
import pytest

from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.model.model import Options
from tests.harness import forward, load_golden, load_oracle
from tests.model import test_golden as golden

NAMES = ["tiny", "tiny128_bf16", "tiny128_fp8", "kernel_widths"]


@pytest.mark.parametrize("name", NAMES)
def test_float32(name):
    """Would fail with TF32 products."""
    results = golden.computed(name)
    for check in (
        golden.check_logits,
        golden.check_greedy,
        golden.check_hidden,
        golden.check_topk,
        golden.check_index_scores,
        golden.check_experts,
    ):
        check(results, name)


@pytest.mark.parametrize("name", NAMES)
def test_generate(name):
    golden.test_generate_gives_the_recorded_tokens(name)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name):
    """Hard choices flip at near-ties in bfloat16, so the measure is the relative rms over all positions."""
    oracle, model = load_oracle(name), load_golden(name)
    rows = [ids[:length] for ids, length in zip(oracle.ids, oracle.lengths, strict=True)]
    results = forward(model, rows, Options(compute_dtype="bfloat16"))
    got = np.concatenate([result.logits for result in results])
    expected = np.concatenate([logits[:length] for logits, length in zip(oracle.logits, oracle.lengths, strict=True)])
    assert np.sqrt(((got - expected) ** 2).mean() / (expected**2).mean()) <= 0.10


def test_defaults_on_a_gpu():
    """bfloat16, activations quantised where the checkpoint is FP8, an FP8 cache on request: generation runs."""
    model = load_golden("tiny128_fp8")
    options = Options.default(model.config)
    assert (options.compute_dtype, options.act_quant) == ("bfloat16", True)
    for form in (None, "fp8"):
        options = Options.default(model.config, cache_dtype=form)
        tokens = LanguageModel(model, model.config, None, options).generate([[0, 5, 9]], 8, ignore_eos=True).tokens
        assert tokens.shape == (1, 8) and (tokens >= 0).all()
