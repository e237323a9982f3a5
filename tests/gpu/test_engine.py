"""The engine with kernels on a GPU: in steps of every size, small ones too, a request gets what it gets alone."""

import numpy as np

from dsv32_jax.engine.engine import Engine
from dsv32_jax.engine.request import SamplingParams
from dsv32_jax.experiments.studies import held_out
from dsv32_jax.generate.loading import load
from dsv32_jax.model.model import Options

NEW_TOKENS = 24


def test_requests_in_steps_of_many_sizes_equal_those_alone():
    """Equal tokens, or parted where the two likeliest are closer than the same token's log-probabilities elsewhere."""
    lm = load("demo")
    lm.options = Options("bfloat16", act_quant=True, cache_dtype="fp8")
    lengths = (3, 40, 100, 240, 500, 7)  # on both sides of index_topk = 256; one crosses it
    texts = [document["text"] for document in held_out.documents()[: len(lengths)]]
    prompts = [lm.tokenizer.encode(text, bos=True)[:n] for text, n in zip(texts, lengths, strict=True)]
    engine = Engine(lm, cache_tokens=4096, max_tokens=128, max_prompt_tokens=128, max_sequences=4)
    engine.warmup()
    assert {tokens for tokens, _ in engine.shapes()} == {8, 32, 128}
    drawn = engine.generate(prompts[:2], SamplingParams(8, temperature=0.8, top_p=0.9, logprobs=2, ignore_eos=True))
    assert all(len(request.completions[0].tokens) == 8 for request in drawn)

    def generate(rows):
        engine.pool.forget()
        requests = engine.generate(rows, SamplingParams(NEW_TOKENS, logprobs=2, ignore_eos=True))
        return [request.completions[0] for request in requests]

    together, error, parted = generate(prompts), 0.0, []
    for prompt, mixed in zip(prompts, together, strict=True):
        (alone,) = generate([prompt])
        differ = np.nonzero(np.array(alone.tokens) != np.array(mixed.tokens))[0]
        at = int(differ[0]) if differ.size else NEW_TOKENS
        pairs = zip(alone.logprobs[:at], mixed.logprobs[:at], strict=True)
        error = max([error, *(abs(one.token - other.token) for one, other in pairs)])
        if at < NEW_TOKENS:
            assert set(alone.logprobs[at].likeliest) == set(mixed.logprobs[at].likeliest), (len(prompt), at)
            parted.append((len(prompt), at, abs(np.subtract(*alone.logprobs[at].likeliest.values()))))
    print(f"log-probabilities of equal tokens differ by at most {error:.3g}; parted (prompt, token, gap): {parted}")
    assert all(gap <= 2 * error for _, _, gap in parted)
