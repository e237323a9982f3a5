"""Speculation gives the same tokens as an engine without it, and its drafts are those of the MTP layer."""

import dataclasses
import functools

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings

from dsv32_jax.config import ModelConfig
from dsv32_jax.engine import engine as engine_module
from dsv32_jax.engine.engine import Engine
from dsv32_jax.engine.request import SamplingParams
from dsv32_jax.errors import UserError
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.loading import load
from dsv32_jax.model.cache import BLOCK_SIZE, KVCache
from dsv32_jax.model.model import DeepseekV32, StepContext
from tests.engine.test_engine import SMALL, TEXTS
from tests.generate.test_language_model import golden
from tests.harness import EXACT, Piece, flat_batch, tables_of

TINY = ModelConfig.tiny(
    num_hidden_layers=1, first_k_dense_replace=0, initializer_range=0.3, quantization_config=None, index_topk=32
)

LARGE = {"cache_tokens": 2048, "max_tokens": 64, "max_sequences": 4}


def guessing(influence: float, tokenizer=None, ahead: int = 0) -> LanguageModel:
    """A model whose MTP layer guesses well, since it has the model's embedding, head and norms.

    Args:
      influence: of attention and experts on both. 0: the next token depends on the last one alone, and the guess is
        always right; more: the tokens before matter too, to each layer in its own way.
      tokenizer: of the model.
      ahead: what is added to each guess.
    """
    model = DeepseekV32(TINY, nnx.Rngs(0))
    mtp, eye = model.mtp, jnp.eye(TINY.hidden_size)
    mtp.embed, mtp.head = model.embed, jnp.roll(model.head, ahead, axis=0)
    mtp.eh_proj = jnp.concatenate([eye, 0 * eye], axis=1)
    for layer in (*model.layers, mtp.layer):
        layer.attn.o *= influence
        layer.ffn.experts.down *= influence
        layer.ffn.shared.down *= influence
    return LanguageModel(model, TINY, tokenizer, EXACT)


@pytest.fixture(scope="module")
def lm():
    return guessing(0.003)


@pytest.fixture(scope="module")
def engine(lm):
    engine = Engine(lm, **SMALL, speculate=True)
    engine.warmup()
    return engine


@pytest.fixture(scope="module")
def plain(lm):
    return Engine(lm, **LARGE)


def step(engine: Engine):
    """Makes a step, after which no block is lost or counted twice."""
    events = engine.step()
    running = engine.scheduler.running
    assert sum(engine.pool._references) == sum(len(sequence.table.blocks) for sequence in running)
    assert all(s.in_flight == 0 and s.computed < len(s.tokens) for s in running)
    assert all(s.table.length - s.computed in (0, 1) for s in running)  # one for a draft that was wrong
    return events


def run(engine: Engine):
    while engine.busy:
        step(engine)


REQUEST = st.tuples(
    st.sampled_from([0, 1]),  # which text
    st.sampled_from([1, 30, 63, 129, 180]),  # tokens of the prompt
    st.sampled_from([1, 2, 40]),  # new ones
    st.sampled_from([0.0, 0.5]),  # temperature
    st.integers(0, 1),  # seed
    st.sampled_from([1, 1, 3]),  # continuations
    st.integers(0, 10),  # steps before it comes
    st.sampled_from([None, None, None, 2, 9]),  # steps until it is given up
    st.sampled_from([None, None, 5, 20]),  # a stop token: the one that comes here
)


@functools.cache
def without(plain, text, length, new, temperature, seed, n):
    params = SamplingParams(new, temperature, 0.9, seed, n, ignore_eos=True)
    (request,) = plain.generate([TEXTS[text][:length]], params)
    return [completion.tokens for completion in request.completions]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=st.lists(REQUEST, min_size=1, max_size=6))
def test_every_request_gets_the_tokens_that_it_gets_without(engine, plain, requests):
    added, events = [], []
    programs = engine_module.engine_step._cache_size()
    expected = [without(plain, *request[:6]) for request in requests]
    compiled = engine_module.engine_step._cache_size() - programs  # of the other engine
    for clock in range(2000):
        for (text, length, new, temperature, seed, n, comes, leaves, end), want in zip(requests, expected, strict=True):
            if clock == comes:
                stop = () if end is None or end >= new else (want[0][end],)
                params = SamplingParams(new, temperature, 0.9, seed, n, stop_token_ids=stop, ignore_eos=True)
                added.append((engine.add(TEXTS[text][:length], params), leaves and clock + leaves, want, stop))
        for request, leaves, *_ in added:
            if clock == leaves:
                engine.cancel(request)
        events += step(engine)
        if clock > 10 and not engine.busy:
            break
    assert len(added) == len(requests) and not engine.busy
    for request, _, want, stop in added:
        for n, (completion, tokens) in enumerate(zip(request.completions, want, strict=True)):
            whole = tokens[: min((tokens.index(token) + 1 for token in stop if token in tokens), default=len(tokens))]
            if completion.finish_reason == "cancelled":
                assert completion.tokens == whole[: len(completion.tokens)] and len(completion.tokens) < len(whole)
            else:
                assert completion.tokens == whole
                assert completion.finish_reason == ("stop" if whole[-1] in stop else "length")
            assert completion.tokens == [e.token for e in events if e.request is request and e.index == n]
    assert engine.pool.statistics().in_use == 0 and not engine._owner
    assert engine_module.engine_step._cache_size() == programs + compiled


def test_a_small_cache_preempts_and_drafts_are_right_and_wrong(engine, plain):
    """The test above relies on all of this happening in this engine, with this model."""
    before = engine.summary()
    params = SamplingParams(90, ignore_eos=True)
    requests = [engine.add(TEXTS[n][:150], params) for n in (0, 1, 1)]
    run(engine)
    summary = engine.summary()
    assert summary["preemptions"] > before["preemptions"]
    drafted, accepted = (summary[name] - before[name] for name in ("drafted_tokens", "accepted_tokens"))
    assert 0.2 * drafted < accepted < 0.9 * drafted and drafted > 100
    want = plain.generate([TEXTS[0][:150], TEXTS[1][:150]], params)
    chex.assert_trees_all_equal([request.tokens for request in requests], [want[n].tokens for n in (0, 1, 1)])


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_guess_that_is_always_right_or_always_wrong(ahead):
    """Right guesses save about half the steps; wrong ones, always of another token, save none. The tokens stay."""
    lm = guessing(0.0, ahead=ahead)
    want = Engine(lm, **LARGE).generate([TEXTS[0][:20]], SamplingParams(31, ignore_eos=True))[0]
    engine = Engine(lm, **SMALL, speculate=True)
    (request,) = engine.generate([TEXTS[0][:20]], SamplingParams(31, ignore_eos=True))
    np.testing.assert_array_equal(request.tokens, want.tokens)
    summary = engine.summary()
    assert summary["acceptance_rate"] == 1 - ahead and summary["accepted_tokens"] == (0 if ahead else 15)
    # 20 tokens of the prompt in two steps, which give the first token; then one or two a step. The last has no draft.
    assert (summary["steps"], summary["drafted_tokens"]) == ((2 + 30, 29) if ahead else (2 + 15, 15))


def test_drafts_are_those_of_the_layer_over_the_whole_text(lm, monkeypatch):
    """Its cache entries are right also after wrong drafts, prompts in pieces, and a preemption."""
    seen = []

    def record(planned, tokens, drafts, metrics):
        settled = accept_drafts(planned, tokens, drafts, metrics)
        received = {sequence: 0 for sequence in planned.receivers}
        for sequence, token, guess in zip(planned.receivers, settled, drafts[: len(settled)], strict=True):
            if token >= 0:
                received[sequence] += 1
                seen.append((engine._owner[sequence][0], len(sequence.tokens) + received[sequence], int(guess)))
        return settled

    accept_drafts = engine_module.accept_drafts
    monkeypatch.setattr(engine_module, "accept_drafts", record)
    engine = Engine(lm, **SMALL, speculate=True)
    prompts = [TEXTS[n][:length] for n, length in ((0, 150), (1, 130), (1, 41))]
    requests = engine.generate(prompts, SamplingParams(60, ignore_eos=True))
    assert engine.metrics.preemptions and 0 < engine.metrics.accepted_tokens < engine.metrics.drafted_tokens

    @jax.jit
    def whole(model, batch):
        cache = KVCache.create(TINY, batch.block_tables.size, EXACT, TINY.num_hidden_layers + 1)
        states, cache = model.states(batch, cache, EXACT)
        ctx = StepContext(TINY, EXACT, batch, EXACT.seams())
        logits, _ = model.mtp(states, jnp.roll(batch.ids, -1), cache, ctx)
        return jnp.argmax(logits, axis=-1)

    for request in requests:
        ids = np.zeros(4 * BLOCK_SIZE, np.int32)  # zeros behind the end change nothing before it
        known = [*request.prompt, *request.completions[0].tokens]
        ids[: len(known)] = known
        want = whole(lm.model, flat_batch([Piece(ids)], tables_of(1, 4)))
        guesses = [(length, guess) for owner, length, guess in seen if owner is request]
        assert len(guesses) == 60
        # With so many tokens known, the state before the last one and the last one itself were given.
        assert [guess for _, guess in guesses] == [want[length - 2] for length, _ in guesses]


def test_a_sibling_has_no_draft_behind_a_token_that_the_layer_has_not_seen(lm):
    engine = Engine(lm, **SMALL, speculate=True)
    request = engine.add(TEXTS[0][:10], SamplingParams(20, 1.5, seed=1, n=3, ignore_eos=True))
    step(engine)
    first, *others = [completion.tokens[0] for completion in request.completions]
    drafts = [sequence.draft for sequence in engine.scheduler.running]
    assert [draft >= 0 for draft in drafts] == [True, *(token == first for token in others)] and -1 in drafts
    run(engine)
    assert engine.metrics.finished == {"length": 3}


def test_log_probabilities_and_times(engine, plain):
    params = SamplingParams(20, 0.5, seed=2, ignore_eos=True, logprobs=3)
    ours, theirs = (each.generate([TEXTS[1][:40]], params)[0].completions[0] for each in (engine, plain))
    assert ours.tokens == theirs.tokens and len(ours.times) == 20 and ours.times == sorted(ours.times)
    first, second = ([dataclasses.asdict(token) for token in each.logprobs] for each in (ours, theirs))
    chex.assert_trees_all_close(first, second, atol=1e-4, rtol=0)


def test_text_ends_at_a_stop_string_in_the_first_or_second_token_of_a_step():
    lm = guessing(0.0, golden("tiny").tokenizer)
    engine = Engine(lm, **SMALL, speculate=True)
    whole = engine.generate(["The lighthouse"], SamplingParams(14, ignore_eos=True))[0].completions[0]
    assert engine.metrics.acceptance_rate == 1
    for end in range(1, 9):
        stop = lm.tokenizer.decode(whole.tokens[end : end + 1])
        params = SamplingParams(14, stop=(stop,), ignore_eos=True)
        completion = engine.generate(["The lighthouse"], params)[0].completions[0]
        assert completion.finish_reason == "stop" and completion.text == whole.text[: whole.text.index(stop)]
        assert completion.tokens == whole.tokens[: len(completion.tokens)] and len(completion.tokens) <= end + 1
    assert engine.pool.statistics().in_use == 0


def test_what_fits_without_fits_exactly(engine, plain):
    params, before = SamplingParams(6 * 64 + 1 - 220, ignore_eos=True), engine.metrics.preemptions
    request = engine.add(TEXTS[0], params)
    run(engine)
    np.testing.assert_array_equal(request.tokens, plain.generate([TEXTS[0]], params)[0].tokens)
    assert engine.metrics.preemptions == before


def test_a_step_that_fails_ends_its_requests_and_not_the_engine(lm, monkeypatch):
    engine = Engine(lm, **SMALL, speculate=True)
    before = engine.generate([TEXTS[0][:70]], SamplingParams(9, ignore_eos=True))[0]
    request = engine.add(TEXTS[1][:70], SamplingParams(50, ignore_eos=True))
    for _ in range(8):
        step(engine)
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "engine_step", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert request.completions[0].finish_reason == "error" and not engine.busy
    again = engine.generate([TEXTS[0][:70]], SamplingParams(9, ignore_eos=True))[0]
    np.testing.assert_array_equal(again.tokens, before.tokens)


def test_logits_that_are_not_finite_end_their_request_alone(lm, plain):
    """Also where the logits follow a draft that was right."""
    want = plain.generate([TEXTS[0][:20], TEXTS[1][:20]], SamplingParams(30, ignore_eos=True))
    last = next(n for n in range(5, 30) if want[0].tokens[0, n] not in {*want[0].tokens[0, :n], *want[1].tokens[0]})
    model = guessing(0.003).model
    model.embed = model.embed.at[want[0].tokens[0, last]].set(jnp.nan)
    engine = Engine(LanguageModel(model, TINY, None, EXACT), **SMALL, speculate=True)
    ended, other = engine.generate([TEXTS[0][:20], TEXTS[1][:20]], SamplingParams(30, ignore_eos=True))
    chex.assert_trees_all_equal((ended.tokens, other.tokens), (want[0].tokens[:, : last + 1], want[1].tokens))
    assert ended.completions[0].finish_reason == "error" and "not finite" in ended.completions[0].error


def test_the_step_updates_the_cache_in_place(engine):
    step, draft = engine.programs()[-1]()
    cache = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.cache))
    for program in (step, draft):
        assert program.memory_analysis().alias_size_in_bytes >= cache


def test_what_it_needs(lm, monkeypatch):
    config = ModelConfig.tiny(num_hidden_layers=1, quantization_config=None, num_nextn_predict_layers=0)
    with pytest.raises(UserError, match=r"speculate: the model has no MTP layer.*num_nextn_predict_layers"):
        Engine(LanguageModel(DeepseekV32(config, nnx.Rngs(0)), config, options=EXACT), speculate=True)
    # The layer's entries are one layer's more, of the same memory.
    a_block = KVCache.bytes_per_token(TINY, "float32", False) * BLOCK_SIZE
    monkeypatch.setattr(engine_module, "available_bytes", lambda: (20 * a_block, "a GPU"))
    blocks = [Engine(lm, memory_fraction=1.0, speculate=speculate).pool.num_blocks for speculate in (False, True)]
    assert blocks == [20, 10]


@pytest.mark.slow
def test_the_demo_model():
    """The demo model with its own MTP layer, on texts like those of its training.

    Without rounding of activations to FP8: the last bit of a float32 sum, which the shape of a step decides, would move
    some of them by a whole step, and other tokens would follow; without speculation too.
    """
    lm = load("demo")
    lm.options = EXACT
    prompts = ["To install a package on Debian, you", "The kernel is", "A user who wants to", "In the next chapter we"]
    params = [SamplingParams(40), SamplingParams(40, 0.7, 0.9, seed=1, n=2)]
    tokens = []
    for speculate in (False, True):
        engine = Engine(lm, cache_tokens=256, max_tokens=16, max_sequences=4, speculate=speculate)
        engine.warmup()
        programs = engine_module.engine_step._cache_size()
        requests = [engine.add(prompt, sampling) for prompt in prompts for sampling in params]
        while engine.busy:
            engine.step()
        assert engine_module.engine_step._cache_size() == programs
        tokens.append([request.tokens.tolist() for request in requests])
        print(engine.summary())
    assert tokens[0] == tokens[1]
    assert engine.metrics.acceptance_rate > 0.3
