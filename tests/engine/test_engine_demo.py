"""The shipped model under many requests: nothing is lost, nothing leaks, nothing is compiled twice."""

import random

import pytest

from dsv32_jax.engine.engine import Engine
from dsv32_jax.engine.request import SamplingParams
from dsv32_jax.experiments.studies import held_out
from dsv32_jax.generate.loading import load
from tests.engine.test_engine import programs


@pytest.mark.slow
def test_two_hundred_mixed_requests():
    """Prompts of 5 to 400 tokens, some with a common beginning, 1 to 24 new tokens, in a cache of a few of them."""
    lm, rng = load("demo"), random.Random(0)
    engine = Engine(lm, cache_tokens=2048, max_tokens=128, max_sequences=16)
    shapes = engine.warmup()
    before = programs()
    texts = [lm.tokenizer.encode(document["text"], bos=True) for document in held_out.documents()[:6]]
    requests, given_up = [], []
    while len(requests) < 200 or engine.busy:
        for _ in range(rng.choice((0, 0, 1, 2))):
            if len(requests) < 200:
                prompt = rng.choice(texts)[: rng.randint(5, 400)]
                params = SamplingParams(
                    rng.randint(1, 24), rng.choice((0.0, 0.8)), 0.95, rng.randint(0, 9), rng.choice((1, 1, 1, 3))
                )
                requests.append(engine.add(prompt, params))
        if rng.random() < 0.05:
            request = rng.choice(requests) if requests else None
            if request is not None and not request.finished:
                given_up.append(request)
                engine.cancel(request)
        engine.step()
    assert len(requests) == 200 and all(request.finished for request in requests)
    for request in requests:
        for completion in request.completions:
            if request not in given_up:
                assert completion.finish_reason in ("stop", "length")
                assert completion.finish_reason == "stop" or len(completion.tokens) == request.params.max_new_tokens
                assert completion.text == lm.tokenizer.decode(completion.tokens)
    summary = engine.summary()
    assert summary["cache"]["in_use"] == 0 and summary["cache"]["hit_rate"] > 0.2 and given_up
    assert programs() == before and before[0] <= shapes
    print(summary)
