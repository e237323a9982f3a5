"""Many requests at once: each gets the tokens that it gets alone, whatever else runs, waits, ends or is evicted."""

import functools
import json

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings

from dsv32_jax.config import ModelConfig
from dsv32_jax.engine import engine as engine_module
from dsv32_jax.engine.engine import Engine
from dsv32_jax.engine.metrics import percentiles
from dsv32_jax.engine.request import Completion, SamplingParams, overlap
from dsv32_jax.errors import UserError
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.tokenizer import Tokenizer
from dsv32_jax.model.cache import BLOCK_SIZE, KVCache
from dsv32_jax.model.model import DeepseekV32
from tests.harness import EXACT, golden_directory, one_shape, times_compiled

TEXTS = [[(seed * 5 + i * i) % 97 + 2 for i in range(220)] for seed in range(2)]


@pytest.fixture(scope="module")
def lm():
    """Random weights large enough that tokens differ and no two logits are near each other."""
    config = ModelConfig.tiny(
        num_hidden_layers=2, initializer_range=0.3, quantization_config=None, num_nextn_predict_layers=0
    )
    return LanguageModel(DeepseekV32(config, nnx.Rngs(0)), config, options=EXACT)


SMALL = {"cache_tokens": 6 * 64, "max_tokens": 16, "max_sequences": 4}
"""Six blocks of cache for four sequences of up to four blocks each: often too few."""


@pytest.fixture(scope="module")
def engine(lm):
    engine = Engine(lm, **SMALL)
    engine.warmup()
    return engine


@functools.cache
def tokens_alone(lm, prompt, new, temperature, seed):
    sampling = {"temperature": temperature, "top_p": 0.9, "seed": seed, "ignore_eos": True}
    with one_shape():
        return lm.generate(list(prompt), new, **sampling).tokens[0].tolist()


REQUEST = st.tuples(
    st.sampled_from([0, 1]),  # which text
    st.sampled_from([1, 30, 65, 129, 180]),  # tokens of the prompt
    st.sampled_from([1, 40]),  # new ones
    st.sampled_from([0.0, 1.0]),  # temperature
    st.integers(0, 2),  # seed
    st.sampled_from([1, 1, 3]),  # continuations
    st.integers(0, 10),  # steps before it comes
    st.sampled_from([None, None, None, 2, 9]),  # steps until it is given up
)


def programs() -> list[int]:
    """How many programs of each function have been compiled by calls."""
    functions = (engine_module.engine_step, engine_module.sample_tokens, engine_module.log_probabilities)
    return [function._cache_size() for function in (*functions, engine_module.copy_blocks)]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=st.lists(REQUEST, min_size=1, max_size=6))
def test_every_request_gets_the_tokens_that_it_gets_alone(lm, engine, requests):
    added = []
    before = programs()
    for clock in range(2000):
        for text, length, new, temperature, seed, n, comes, leaves in requests:
            if clock == comes:
                params = SamplingParams(new, temperature, 0.9, seed, n, ignore_eos=True)
                added.append((engine.add(TEXTS[text][:length], params), leaves and clock + leaves))
        for request, leaves in added:
            if clock == leaves:
                engine.cancel(request)
        engine.step()
        if clock > 10 and not engine.busy:
            break
    assert len(added) == len(requests) and not engine.busy
    for request, _ in added:
        params = request.params
        for n, completion in enumerate(request.completions):
            if n == 0 or params.temperature == 0:
                want = tokens_alone(lm, tuple(request.prompt), params.max_new_tokens, params.temperature, params.seed)
                assert completion.tokens == want[: len(completion.tokens)]
            assert completion.finish_reason == (
                "length" if len(completion.tokens) == params.max_new_tokens else "cancelled"
            )
    assert engine.pool.statistics().in_use == 0 and not engine._owner
    assert programs() == before


def test_a_prompt_that_nobody_waits_for_is_read_in_longer_pieces(lm):
    engine = Engine(lm, **SMALL, max_prompt_tokens=64)
    prompt = TEXTS[0][:60]
    (request,) = engine.generate([prompt], SamplingParams(5, ignore_eos=True))
    assert request.completions[0].tokens == tokens_alone(lm, tuple(prompt), 40, 0.0, 0)[:5]
    assert engine.summary()["steps"] == 5  # the first has the whole prompt
    assert {tokens for tokens, _ in Engine(lm, **SMALL | {"max_tokens": 4}).shapes()} == {8}
    with pytest.raises(UserError, match="max_prompt_tokens: 15; must be no fewer"):
        Engine(lm, **SMALL, max_prompt_tokens=15)


def test_continuations_differ_and_are_the_same_in_any_company(engine):
    params = SamplingParams(12, 1.0, seed=3, n=3, ignore_eos=True)
    (first,) = engine.generate([TEXTS[0][:100]], params)
    again, _ = engine.generate([TEXTS[0][:100], TEXTS[1][:150]], params)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert len({tuple(completion.tokens) for completion in first.completions}) == 3


def test_a_prefix_is_found(lm):
    engine = Engine(lm, **SMALL)
    first, second = (engine.generate([TEXTS[0][:150]], SamplingParams(3))[0] for _ in range(2))
    assert (first.cached_tokens, second.cached_tokens) == (0, 128)
    assert first.completions[0].tokens == second.completions[0].tokens
    assert engine.pool.statistics().hit_rate == 128 / 300


def test_what_the_engine_says_of_itself(lm):
    engine = Engine(lm, **SMALL)
    given_up = engine.add(TEXTS[0][:20], SamplingParams(30, ignore_eos=True))
    requests = [engine.add(TEXTS[1][:150], SamplingParams(90, ignore_eos=True)) for _ in range(3)]
    for _ in range(3):
        engine.step()
    engine.cancel(given_up)
    while engine.busy:
        engine.step()
    summary = json.loads(json.dumps(engine.summary()))
    tokens = sum(len(completion.tokens) for r in (given_up, *requests) for completion in r.completions)
    assert (summary["prompt_tokens"], summary["generated_tokens"]) == (20 + 3 * 150, tokens)
    assert summary["finished"] == {"cancelled": 1, "length": 3} and summary["running"] == summary["waiting"] == 0
    assert summary["preemptions"] > 0 and summary["cached_tokens"] == sum(r.cached_tokens for r in requests)
    assert summary["cache"]["in_use"] == 0 and summary["step_tokens"] >= tokens
    for name in ("queued_seconds", "first_token_seconds", "between_tokens_seconds"):
        times = summary[name]
        assert 0 <= times["p50"] <= times["p90"] <= times["p99"]
    assert percentiles([1.0, 2.0, 3.0, 4.0, 5.0])["p50"] == 3 and percentiles([]) is None


def test_log_probabilities(lm, engine):
    """Those of the sampled token and the likeliest, at any temperature, also beside a request without them."""
    params = SamplingParams(4, temperature=1.5, seed=1, ignore_eos=True, logprobs=3)
    request = engine.add(TEXTS[0][:40], params)
    engine.generate([TEXTS[1][:40]], SamplingParams(9, ignore_eos=True))
    (completion,) = request.completions
    logits = lm.logits([*request.prompt, *completion.tokens]).astype(np.float64)[0, 39:-1]
    want = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    assert len(completion.logprobs) == 4
    for row, token, logprobs in zip(want, completion.tokens, completion.logprobs, strict=True):
        assert logprobs.token == pytest.approx(row[token], abs=1e-4)
        assert list(logprobs.likeliest) == np.argsort(-row)[:3].tolist()
        assert list(logprobs.likeliest.values()) == pytest.approx(np.sort(row)[::-1][:3], abs=1e-4)


def test_a_step_that_fails_ends_its_requests_and_not_the_engine(lm, monkeypatch):
    engine = Engine(lm, **SMALL)
    before = engine.generate([TEXTS[0][:150]], SamplingParams(5, ignore_eos=True))[0]
    requests = [engine.add(TEXTS[n][:150], SamplingParams(50, ignore_eos=True)) for n in (0, 1, 1)]
    for _ in range(12):
        engine.step()

    def broken(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "engine_step", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.step()
    assert not engine.busy and {r.completions[0].finish_reason for r in requests} == {"error"}
    assert engine.pool.statistics().free == engine.pool.num_blocks
    again = engine.generate([TEXTS[0][:150]], SamplingParams(5, ignore_eos=True))[0]
    assert again.cached_tokens == 0 and again.completions[0].tokens == before.completions[0].tokens


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_end_their_request_alone(lm, value, caplog):
    """A token's embedding is not finite. Other requests go on, at the same time and later in the same blocks."""
    model = DeepseekV32(lm.config, nnx.Rngs(0))
    model.embed = model.embed.at[1].set(value)
    engine = Engine(LanguageModel(model, lm.config, options=EXACT), **SMALL)
    prompts = [[*TEXTS[0][:90], 1], TEXTS[1][:129], TEXTS[0][:65]]
    ended, *others = engine.generate(prompts, SamplingParams(40, ignore_eos=True))
    assert not ended.completions[0].tokens and ended.completions[0].finish_reason == "error"
    assert ended.completions[0].error == "the logits behind its 91 tokens are not finite" in caplog.text
    while engine.busy:
        engine.step()
    assert engine.pool.statistics().in_use == 0 and engine.summary()["finished"] == {"error": 1, "length": 2}
    engine.pool.forget()
    others += engine.generate([prompts[2]] * 3, SamplingParams(40, ignore_eos=True))
    for request in others:
        assert request.completions[0].tokens == tokens_alone(lm, tuple(request.prompt), 40, 0.0, 0)


def test_warming_up_beside_requests_changes_nothing(lm):
    """The next step still gets the sampled tokens that the host has not seen."""
    engine = Engine(lm, **SMALL)
    request = engine.add(TEXTS[0][:30], SamplingParams(40, ignore_eos=True))
    for _ in range(4):
        engine.step()
    engine.warmup()
    list(engine.stream(request))
    assert request.completions[0].tokens == tokens_alone(lm, tuple(request.prompt), 40, 0.0, 0)


def test_the_step_updates_the_cache_in_place(engine):
    """There is no second cache: the largest step's output shares the memory of its input."""
    program, _ = engine.programs()[-1]()
    sizes = program.memory_analysis()
    cache = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.cache))
    assert sizes.alias_size_in_bytes >= cache
    sources = targets = np.zeros(4, np.int32)
    sizes = engine_module.copy_blocks.lower(engine.cache, sources, targets).compile().memory_analysis()
    assert sizes.alias_size_in_bytes >= cache


def test_an_engine_like_another_finds_its_programs(lm, engine, caplog):
    """The other engine has the same model; `engine` has been warmed up."""
    assert times_compiled("engine_step", Engine(lm, **SMALL).warmup, caplog) == 0
    other = Engine(lm, **SMALL | {"max_sequences": 3})
    other._sizes, other._widths = other._sizes[:1], other._widths[:1]
    assert times_compiled("engine_step", other.warmup, caplog) == 1


def test_text_and_stop_strings(lm):
    m = LanguageModel(lm.model, lm.config, Tokenizer(golden_directory("tiny") / "model"), EXACT)
    engine = Engine(m, **SMALL)
    plain = engine.generate(["The lighthouse keeper"], SamplingParams(20, ignore_eos=True))[0].completions[0]
    with one_shape():
        assert plain.text == m.generate("The lighthouse keeper", 20, ignore_eos=True).texts[0]
    stop = plain.text[4:7]
    request = engine.add("The lighthouse keeper", SamplingParams(20, stop=(stop,), ignore_eos=True))
    pieces = [event.text for event in engine.stream(request)]
    (completion,) = request.completions
    assert completion.finish_reason == "stop" and completion.text == plain.text[: plain.text.index(stop)] == "".join(
        pieces
    )
    assert len(completion.tokens) < 20
    eos = plain.tokens[2]
    (request,) = engine.generate(["The lighthouse keeper"], SamplingParams(20, stop_token_ids=(eos,), ignore_eos=True))
    assert request.completions[0].tokens == plain.tokens[: plain.tokens.index(eos) + 1]


def test_the_cache_takes_its_part_of_the_memory(lm, monkeypatch):
    a_block = KVCache.bytes_per_token(lm.config, "float32", False) * BLOCK_SIZE

    def blocks(free):
        monkeypatch.setattr(engine_module, "available_bytes", lambda: (free, "a GPU"))
        return Engine(lm, memory_fraction=0.5, max_sequences=3).pool.num_blocks

    assert (blocks(20 * a_block), blocks(1000 * a_block)) == (10, 3 * lm.config.max_position_embeddings // BLOCK_SIZE)
    with pytest.raises(UserError, match="holds no block"):
        blocks(a_block)


class Letters:
    """A decoder whose tokens are characters."""

    def add(self, token):
        return chr(token)

    def finish(self):
        return ""


def test_what_may_be_the_beginning_of_a_stop_string_is_held_back():
    completion = Completion(Letters())
    params = SamplingParams(9, stop=("abc", "bd"))
    pieces = [completion.add(ord(x), params, (), 0.0) for x in "xababd"]
    assert pieces == ["x", "", "", "ab", "", "a"] and completion.text == "xaba"
    assert completion.finish_reason == "stop"
    completion = Completion(Letters())
    assert [completion.add(ord(x), SamplingParams(2, stop=("abc",)), (), 0.0) for x in "ab"] == ["", "ab"]
    assert completion.finish_reason == "length"
    assert [overlap(text, "aab") for text in ("", "a", "aa", "aaa", "ab")] == [0, 1, 2, 2, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"n": 17}, r"n: 17; must be in 1\.\.16"),
        ({"n": 0}, "n: 0"),
        ({"logprobs": 21}, r"logprobs: 21; must be in 0\.\.20"),
        ({"logprobs": -1}, "logprobs: -1"),
        ({"stop": ("a", "")}, "stop: must be"),
        ({"stop": ("a",) * 17}, "stop: must be at most 16"),
        ({"seed": -1}, "seed: -1"),
    ],
)
def test_wrong_params(arguments, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**arguments)


def test_what_can_never_run_is_refused_at_once(lm, engine):
    with pytest.raises(UserError, match="prompt: 399 tokens are more than the whole cache holds, 384"):
        Engine(lm, cache_tokens=384).add([2] * 200, SamplingParams(200))
    with pytest.raises(UserError, match="5 continuations of one prompt; at most 4"):
        engine.add([2], SamplingParams(2, n=5))
    with pytest.raises(UserError, match="stop: the checkpoint has no tokenizer"):
        engine.add([2], SamplingParams(2, stop=("x",)))
    with pytest.raises(UserError, match="prompt: 2 of them; add one after the other"):
        engine.add([[2, 3], [4]])
    with pytest.raises(UserError, match="max_sequences: 9"):
        Engine(lm, max_tokens=8, max_sequences=9)
    with pytest.raises(UserError, match=r"memory_fraction: 1\.5"):
        Engine(lm, memory_fraction=1.5)
    with pytest.raises(UserError, match="memory_fraction: give it or cache_tokens"):
        Engine(lm, memory_fraction=0.5, cache_tokens=64)
    with pytest.raises(UserError, match="cache_tokens: 0"):
        Engine(lm, cache_tokens=0)
    assert not engine.busy
