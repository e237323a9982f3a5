"""The whole model with kernels against the same model with references: the same tokens, or a tie within the error.

Both run in bfloat16, whose rounding alone moves logits: what they are measured against is the reference in float32.
"""

import dataclasses

import numpy as np
import pytest

from dsv32_jax.experiments.studies import held_out
from dsv32_jax.generate import decoding
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.loading import load
from dsv32_jax.model.model import Options
from tests.harness import load_golden, load_oracle

NEW_TOKENS = 24


def golden():
    oracle, model = load_oracle("kernel_widths"), load_golden("kernel_widths")
    rows = [ids[:length].tolist() for ids, length in zip(oracle.ids, oracle.lengths, strict=True)]
    return LanguageModel(model, model.config), rows


def demo():
    """Prompts on both sides of index_topk = 256; the first crosses it while it is continued."""
    lm = load("demo")
    texts = [document["text"] for document in held_out.documents()[:2]]
    return lm, [lm.tokenizer.encode(text, bos=True)[:length] for text, length in zip(texts, (240, 500), strict=True)]


PLAIN, QUANTISED = Options("bfloat16", act_quant=False), Options("bfloat16", act_quant=True)
CASES = {
    "golden": (golden, PLAIN),
    "golden, activations quantised, FP8 cache": (golden, dataclasses.replace(QUANTISED, cache_dtype="fp8")),
    "demo": (demo, QUANTISED),
    "demo, FP8 cache": (demo, dataclasses.replace(QUANTISED, cache_dtype="fp8")),
}


def generate(lm: LanguageModel, rows: list[list[int]], monkeypatch) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens [B, N] and the logits that each was taken from [B, N, V]."""
    seen = []

    def sample(logits, *arguments, **how):
        seen.append(np.asarray(logits))
        return original(logits, *arguments, **how)

    original = decoding.sample
    lm.warmup(list(map(len, rows)), NEW_TOKENS)  # nearly all of the time, so at least all programs at once
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "sample", sample)
        tokens = lm.generate(rows, NEW_TOKENS, ignore_eos=True).tokens
    return tokens, np.stack(seen, axis=1)


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_with_kernels_equal_those_with_references(name, monkeypatch):
    make, options = CASES[name]
    lm, rows = make()
    found = {}
    for backend in ("auto", "reference"):
        lm.options = dataclasses.replace(options, backend=backend)
        found[backend] = generate(lm, rows, monkeypatch)
    (tokens, logits), (expected_tokens, expected_logits) = found["auto"], found["reference"]
    exact = {"compute_dtype": "float32", "cache_dtype": None, "backend": "reference"}
    lm.options = dataclasses.replace(options, **exact)
    errors, expected_errors, common = [], [], 0
    for b, row in enumerate(rows):
        parted = np.nonzero(tokens[b] != expected_tokens[b])[0]
        steps = NEW_TOKENS if not parted.size else int(parted[0]) + 1  # of the same prefix
        common += NEW_TOKENS if not parted.size else steps - 1
        true = lm.logits([row + expected_tokens[b, : steps - 1].tolist()])[0, len(row) - 1 :]
        errors.append(logits[b, :steps] - true)
        expected_errors.append(expected_logits[b, :steps] - true)
        if parted.size:
            ours, theirs = (true[-1, chosen[b, parted[0]]] for chosen in (tokens, expected_tokens))
            error = np.abs(expected_errors[-1][-1]).max()
            print(f"{name}, row {b}: parts at token {parted[0]}; top-2 gap {abs(ours - theirs):.3g}, error {error:.3g}")
            assert abs(ours - theirs) <= 2 * error
    print(f"{name}: {common} of {NEW_TOKENS * len(rows)} tokens before a row parts")
    rms, expected_rms = (np.sqrt(np.mean(np.concatenate(e) ** 2)) for e in (errors, expected_errors))
    print(f"{name}: rms error of the logits {rms:.3g}, with references {expected_rms:.3g}")
    assert rms <= 1.5 * expected_rms
