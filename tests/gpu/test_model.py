"""The whole model with kernels against the same model with references: the same tokens, or a tie within the error."""

import dataclasses

import numpy as np
import pytest

from dsv32_jax.language_model import LanguageModel
from dsv32_jax.loading import load
from dsv32_jax.model import Options
from experiments import held_out
from tests.harness import load_golden, load_oracle

NEW_TOKENS = 48


def golden_prompts():
    oracle = load_oracle("kernel_widths")
    return [ids[:length].tolist() for ids, length in zip(oracle.ids, oracle.lengths, strict=True)]


def demo_prompts():
    """Prompts on both sides of index_topk = 256, up to several times as long."""
    encode = load("demo").tokenizer.encode
    texts = [document["text"] for document in held_out.documents()[:4]]
    lengths = (40, 250, 600, 1500)
    return [encode(text, bos=True)[:length] for text, length in zip(texts, lengths, strict=True)]


def golden_model():
    model = load_golden("kernel_widths")
    return LanguageModel(model, model.config, None)


CASES = {
    "golden": (golden_model, golden_prompts, Options("bfloat16", act_quant=False)),
    "golden_quantised": (golden_model, golden_prompts, Options("bfloat16", act_quant=True)),
    "golden_fp8_cache": (golden_model, golden_prompts, Options("bfloat16", act_quant=True, cache_dtype="fp8")),
    "demo": (lambda: load("demo"), demo_prompts, Options("bfloat16", act_quant=True)),
    "demo_fp8_cache": (lambda: load("demo"), demo_prompts, Options("bfloat16", act_quant=True, cache_dtype="fp8")),
}


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_with_kernels_equal_those_with_references(name):
    """Where they part, the two candidates' logits are closer than the two backends' logits are to each other."""
    make, prompts, options = CASES[name]
    lm, rows = make(), prompts()
    runs = {}
    for backend in ("auto", "reference"):
        lm.options = dataclasses.replace(options, backend=backend)
        runs[backend] = lm.generate(rows, NEW_TOKENS, ignore_eos=True).tokens
    equal = 0
    for row, ours, theirs in zip(rows, runs["auto"], runs["reference"], strict=True):
        parted = np.nonzero(ours != theirs)[0]
        equal += NEW_TOKENS if not parted.size else int(parted[0])
        if not parted.size:
            continue
        at = parted[0]
        prefix = row + theirs[:at].tolist()
        logits = {}
        for backend in runs:
            lm.options = dataclasses.replace(options, backend=backend)
            logits[backend] = lm.logits([prefix])[0, -1]
        gap = logits["reference"][theirs[at]] - logits["reference"][ours[at]]
        error = np.abs(logits["auto"] - logits["reference"]).max()
        print(f"{name}: a row parts at token {at}: top-2 gap {gap:.3g}, largest difference of logits {error:.3g}")
        assert 0 <= gap <= 2 * error
        # A difference that is not rounding would dwarf the spread of the logits' own rounding.
        assert error <= 0.1 * logits["reference"].std()
    print(f"{name}: {equal} of {NEW_TOKENS * len(rows)} tokens before a row parted")
