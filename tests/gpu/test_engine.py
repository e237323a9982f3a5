"""The engine with kernels on a GPU: steps of every size, small ones too, give what each request gets alone."""

import dataclasses

import numpy as np

from dsv32_jax.engine import Engine
from dsv32_jax.loading import load
from dsv32_jax.model import Options
from dsv32_jax.request import SamplingParams
from experiments import held_out

NEW_TOKENS = 24


def test_requests_in_steps_of_many_sizes_equal_those_alone():
    """Equal tokens, or parted where the two likeliest are closer than bfloat16's error."""
    lm = load("demo")
    lm.options = Options("bfloat16", act_quant=True, cache_dtype="fp8")
    lengths = (3, 40, 100, 240, 500, 7)
    texts = [document["text"] for document in held_out.documents()[: len(lengths)]]
    prompts = [lm.tokenizer.encode(text, bos=True)[:n] for text, n in zip(texts, lengths, strict=True)]
    engine = Engine(lm, cache_tokens=4096, max_tokens=128, max_sequences=4)
    engine.warmup()
    assert {tokens for tokens, _ in engine.shapes()} == {8, 32, 128}
    greedy = SamplingParams(NEW_TOKENS, ignore_eos=True)
    drawn = engine.generate(prompts[:2], SamplingParams(8, temperature=0.8, top_p=0.9, logprobs=2, ignore_eos=True))
    assert all(len(request.completions[0].tokens) == 8 for request in drawn)
    for prompt, request in zip(prompts, engine.generate(prompts, greedy), strict=True):
        (completion,) = request.completions
        (alone,) = lm.generate([prompt], NEW_TOKENS, ignore_eos=True).tokens
        parted = np.nonzero(alone != np.asarray(completion.tokens))[0]
        if not parted.size:
            continue
        at = int(parted[0])
        ids = [prompt + alone[:at].tolist()]
        rounded = lm.logits(ids)[0, -1]
        options, lm.options = lm.options, dataclasses.replace(lm.options, compute_dtype="float32", cache_dtype=None)
        exact = lm.logits(ids)[0, -1]
        lm.options = options
        gap = abs(exact[alone[at]] - exact[completion.tokens[at]])
        print(f"prompt of {len(prompt)}: parts at token {at}; gap {gap:.3g}, error {np.abs(rounded - exact).max():.3g}")
        assert gap <= 2 * np.abs(rounded - exact).max()
