"""The facade: golden tokens, batches of different lengths, chunked prompts, scores, and what it refuses."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv32_jax import fidelity
from dsv32_jax.config import ModelConfig
from dsv32_jax.errors import UserError
from dsv32_jax.generate import batching
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.tokenizer import Tokenizer
from dsv32_jax.model.model import DeepseekV32, Options
from dsv32_jax.model.params import named_parameters
from tests.harness import EXACT, golden_directory, load_golden, load_oracle, one_shape, times_compiled


def golden(name):
    directory = golden_directory(name) / "model"
    model = load_golden(name)
    tokenizer = Tokenizer(directory) if (directory / "tokenizer.json").exists() else None
    return LanguageModel(model, model.config, tokenizer, EXACT)


def prompts(oracle):
    return [row[:length].tolist() for row, length in zip(oracle.ids, oracle.lengths, strict=True)]


@pytest.fixture(scope="module", autouse=True)
def programs_for_all_lengths():
    """Prompts of all lengths here are one piece and share programs, those of one row and those of three."""
    with one_shape(128):
        yield


@pytest.fixture(scope="module")
def random():
    """Random weights large enough that tokens differ."""
    config = ModelConfig.tiny(initializer_range=0.3, quantization_config=None, num_nextn_predict_layers=0)
    return LanguageModel(jax.jit(lambda: DeepseekV32(config, nnx.Rngs(0)))(), config, options=EXACT)


@pytest.fixture(scope="module")
def spoken(random):
    """The same with a tokenizer, that of the golden tiny checkpoint."""
    tokenizer = Tokenizer(golden_directory("tiny") / "model")
    assert tokenizer.vocab_size <= random.config.vocab_size
    return LanguageModel(random.model, random.config, tokenizer, EXACT)


def test_golden_logits():
    """Of one checkpoint; test_golden has its tokens, and the others'."""
    m, oracle = golden("tiny128_fp8"), load_oracle("tiny128_fp8")
    ids = np.full(oracle.ids.shape, -1, np.int32)
    for row, prompt in zip(ids, prompts(oracle), strict=True):
        row[: len(prompt)] = prompt
    logits = m.logits(ids)
    present = ids >= 0
    worst = np.abs(logits - oracle.logits)[present].max()
    assert worst <= 1e-3 * oracle.logits[present].std()
    assert (logits[~present] == 0).all() and logits.dtype == np.float32


def test_rows_of_a_batch_are_as_alone(random):
    rows = [[1, 2, 3], list(range(10, 26)), [7] * 9]
    settings = {"max_new_tokens": 6, "temperature": 0.8, "top_p": 0.9, "seed": 3, "ignore_eos": True}
    together = random.generate(rows, **settings).tokens
    assert together.shape == (3, 6)
    np.testing.assert_array_equal(random.generate(rows[:1], **settings).tokens, together[:1])
    greedy = random.generate(rows, 6, ignore_eos=True).tokens
    for row, tokens in zip(rows, greedy, strict=True):  # greedy does not depend on the row's number either
        np.testing.assert_array_equal(random.generate([row], 6, ignore_eos=True).tokens[0], tokens)
    padded = np.full((3, 16), -1, np.int32)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    np.testing.assert_array_equal(random.generate(jnp.asarray(padded), **settings).tokens, together)


def test_seed_and_temperature(random):
    def tokens(**settings):
        return random.generate([1, 2, 3], 12, ignore_eos=True, **settings).tokens.tolist()

    assert tokens(temperature=1.0, seed=5) == tokens(temperature=1.0, seed=5)
    assert tokens(temperature=1.0, seed=5) != tokens(temperature=1.0, seed=6)
    assert tokens(seed=5) == tokens(seed=6)
    assert tokens(temperature=1.0, top_p=1e-6) == tokens()  # a nucleus of one token is greedy


def test_a_row_ends_at_eos_and_the_others_go_on(random):
    rows = [[1, 2, 3], [9, 8, 7, 6], [5]]
    free = random.generate(rows, 10, ignore_eos=True).tokens
    eos = next(int(token) for token in free[0][1:] if token not in free[1:])
    m = LanguageModel(random.model, dataclasses.replace(random.config, eos_token_id=eos), options=EXACT)
    stopped = m.generate(rows, 10)
    end = free[0].tolist().index(eos) + 1
    assert stopped.tokens[0].tolist() == free[0][:end].tolist() + [-1] * (10 - end)
    np.testing.assert_array_equal(stopped.tokens[1:], free[1:])
    assert stopped.finish_reasons == ["stop", "length", "length"]
    np.testing.assert_array_equal(m.generate(rows, 10, ignore_eos=True).tokens, free)
    several = LanguageModel(random.model, random.config, options=EXACT, generation_config={"eos_token_id": [500, eos]})
    np.testing.assert_array_equal(several.generate(rows, 10).tokens, stopped.tokens)


def test_stream_gives_what_generate_gives(spoken):
    rows = ["The keeper", "灯塔 and the sea", "a"]
    whole = spoken.generate(rows, 8, ignore_eos=True)
    tokens, texts = [[], [], []], ["", "", ""]
    for piece in spoken.stream(rows, 8, ignore_eos=True):
        tokens[piece.row].append(piece.token)
        texts[piece.row] += piece.text
    assert tokens == whole.tokens.tolist()
    assert texts == whole.texts


def test_generation_continues_what_a_full_forward_says(random):
    prompt = list(range(3, 43))
    tokens = random.generate(prompt, 30, ignore_eos=True).tokens[0].tolist()  # crosses the first block's end
    logits = random.logits(prompt + tokens)[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens


def test_chunks_of_a_prompt_do_not_show(random, monkeypatch):
    ids = np.random.default_rng(0).integers(0, 512, (3, 90)).astype(np.int32)
    ids[1, 85:] = -1
    ids[2, 64:] = -1
    whole, tokens = random.logits(ids), random.generate(ids, 5, ignore_eos=True).tokens
    monkeypatch.setattr(batching, "LARGEST_CHUNK", 32)
    np.testing.assert_allclose(random.logits(ids), whole, atol=2e-4 * whole.std())
    np.testing.assert_array_equal(random.generate(ids, 5, ignore_eos=True).tokens, tokens)


def test_with_kernels_pieces_are_longer_unless_all_logits_are_wanted(random, monkeypatch):
    def sizes(all_logits=False):
        return [size for *_, size in batching.chunks(2600, random.options, all_logits=all_logits)]

    monkeypatch.setattr(batching, "SMALLEST_CHUNK", 16)
    monkeypatch.setattr(batching, "LARGEST_CHUNK", 512)
    assert sizes() == sizes(all_logits=True) == 5 * [512] + [64]
    monkeypatch.setattr(Options, "runs_kernels", True)
    assert sizes() == [2048, 1024]
    assert sizes(all_logits=True) == 5 * [512] + [128]


def test_with_kernels_steps_take_a_prepared_model(monkeypatch):
    ids, expected = [5, 6, 7, 8], golden("tiny128_fp8").logits([5, 6, 7, 8])
    monkeypatch.setattr(Options, "runs_kernels", True)
    lm = golden("tiny128_fp8")
    np.testing.assert_array_equal(lm.logits(ids), expected)
    leaves, structure = lm.flat_model()
    names, prepared = named_parameters(lm.model), named_parameters(jax.tree.unflatten(structure, leaves))
    layers = {path.removesuffix("attn.kv_b") for path in names if path.endswith("attn.kv_b")}
    removed, added = ("q_a", "kv_a", "kv_b"), ("projections.0", "maps.to_latent", "maps.to_value")
    assert set(names) - set(prepared) == {f"{layer}attn.{name}" for layer in layers for name in removed}
    assert set(prepared) - set(names) == {f"{layer}attn.{name}" for layer in layers for name in added}
    lm.options = dataclasses.replace(EXACT, absorb=False)  # that is how the official code quantises its input
    assert lm.flat_model()[1] == jax.tree.structure(lm.model)


def test_warmup_compiles_all_that_generate_runs(random, caplog, monkeypatch):
    monkeypatch.setattr(batching, "SMALLEST_CHUNK", 4)
    monkeypatch.setattr(batching, "LARGEST_CHUNK", 8)
    rows = [list(range(1, 1 + length)) for length in (3, 13)]

    compiled = functools.partial(times_compiled, "flat_step", caplog=caplog)
    assert compiled(lambda: random.warmup([3, 13], 5)) == 3  # pieces of 4 and of 8 tokens, and two rows
    assert compiled(lambda: random.generate(rows, 5)) == 0


def test_an_earlier_row_leaves_nothing_behind(random):
    rows = np.random.default_rng(1).integers(0, 512, (2, 30)).astype(np.int32)
    rows[1, 17:] = -1
    np.testing.assert_array_equal(random.logits(rows)[1, :17], random.logits(rows[1, :17])[0])


def test_score_is_the_log_softmax(random):
    ids = np.random.default_rng(2).integers(0, 512, (2, 25)).astype(np.int32)
    ids[1, 20:] = -1
    out = np.full((2, 25, 512), np.nan, np.float32)
    result = random.score(ids, out=out)
    logits = random.logits(ids)
    np.testing.assert_array_equal(out, logits)
    wide = logits.astype(np.float64)
    log_softmax = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    expected = np.take_along_axis(log_softmax[:, :-1], np.maximum(ids[:, 1:], 0)[..., None], -1)[..., 0]
    expected[1, 19:] = 0
    np.testing.assert_allclose(result.log_likelihoods, expected, atol=1e-4)
    assert result.tokens == 24 + 19
    assert result.log_likelihood == pytest.approx(expected.sum(), abs=1e-2)
    assert result.perplexity == pytest.approx(np.exp(-expected.sum() / 43), rel=1e-3)


def test_trace_is_of_the_same_forward(random):
    ids = np.arange(5, 35, dtype=np.int32)
    trace = random.trace(ids)
    np.testing.assert_allclose(trace.logits, random.logits(ids)[0], atol=1e-4)
    assert trace.topk.shape[:2] == (random.config.num_hidden_layers, 30)
    assert json.dumps(fidelity.compare(trace, trace)["kl"]) == "0.0"
    traces = random.trace([ids, ids[:20]])  # of several a list, each without what was padded
    np.testing.assert_allclose(traces[0].logits, trace.logits, atol=1e-4)
    assert traces[1].attention.shape == (random.config.num_hidden_layers, 20, 20)
    np.testing.assert_allclose(traces[1].hidden, trace.hidden[:, :20], atol=1e-4)
    assert isinstance(random.trace(ids[None]), list)


def test_forms_of_a_prompt(spoken):
    ids = spoken.tokenizer.encode("The keeper", bos=True)
    assert ids[0] == spoken.tokenizer.bos_id
    expected = spoken.generate(ids, 3).tokens.tolist()
    for form in ("The keeper", ["The keeper"], [ids], np.array(ids), np.array([ids], np.int32)):
        assert spoken.generate(form, 3).tokens.tolist() == expected


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1, 512], r"prompt 0, position 1: token 512 is not in 0\.\.511 \(vocab_size 512\)"),
        ([[1], [2, -5]], "prompt 1, position 1: token -5"),
        (np.array([[1, -1, 2]]), "prompt 0, position 1: -1 in the middle"),
        (np.array([[1, 2], [-1, -1]]), "prompt 1: empty"),
        ([], "none given"),
        ([[]], "prompt 0: empty"),
        (np.ones((1, 2), np.float32), r"float32 \[1, 2\]; must be int32"),
        (np.ones((1, 2, 3), np.int32), r"int32 \[1, 2, 3\]"),
        ("text", "no tokenizer.json"),
        ([[1.5]], "prompt 0: must be a text or a flat list"),
        ([1, "a"], "prompt 0: must be a text or a flat list"),
        ([1, [2, 3]], "prompt 0: must be a text or a flat list"),
        ([[1], [[2, 3], 4]], "prompt 1: must be a text or a flat list"),
        ([1, 2**70], "prompt 0: must be a text or a flat list"),
        ([-1, -1], "prompt 0: empty"),
        (b"text", "prompt: bytes; must be a text"),
        ([bytearray(b"text")], "prompt 0: bytearray; must be a text"),
        ([[1] * 100000], "longer than the cache.*max_position_embeddings"),
    ],
)
def test_refused_prompts(random, prompt, message):
    for call in (random.logits, random.score, random.generate):
        with pytest.raises(UserError, match=message):
            call(prompt)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens: 2\.5; must be a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens: True"),
        ({"temperature": "0.5"}, "temperature: '0.5'; must be a number"),
        ({"temperature": True}, "temperature: True"),
        ({"top_p": [1.0]}, r"top_p: \[1\.0\]"),
        ({"seed": 1.5}, r"seed: 1\.5; must be a whole number"),
        ({"ignore_eos": "no"}, "ignore_eos: 'no'; must be True or False"),
        ({"max_new_tokens": 10**6}, "max_position_embeddings"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": -1}, "seed"),
    ],
)
def test_refused_settings(random, settings, message):
    with pytest.raises(UserError, match=message):
        random.generate([1, 2], **settings)


@pytest.mark.parametrize(
    ("generation_config", "expected"),
    [
        ({}, (0.0, 1.0)),
        ({"temperature": 0.6, "top_p": 0.9}, (0.0, 1.0)),  # without do_sample, greedy, as the file's own library has it
        ({"do_sample": False, "temperature": 0.6}, (0.0, 1.0)),
        ({"do_sample": True}, (1.0, 1.0)),
        ({"do_sample": True, "temperature": None, "top_p": None}, (1.0, 1.0)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.95}, (0.6, 0.95)),
    ],
)
def test_a_call_that_says_nothing_samples_as_the_checkpoint_does(random, generation_config, expected):
    m = LanguageModel(random.model, random.config, options=EXACT, generation_config=generation_config)
    assert m.sampling_defaults() == expected == m.sampling(None, None, 0)
    assert m.sampling(0.0, 0.5, 0) == (0.0, 0.5)
    spelled = random.generate([1, 2, 3], 6, temperature=expected[0], top_p=expected[1], ignore_eos=True)
    np.testing.assert_array_equal(m.generate([1, 2, 3], 6, ignore_eos=True).tokens, spelled.tokens)
    pieces = m.stream([1, 2, 3], 6, ignore_eos=True)
    assert [piece.token for piece in pieces] == spelled.tokens[0].tolist()


def test_the_end_of_a_sentence_is_where_the_files_say_now(random):
    m = LanguageModel(random.model, random.config, options=EXACT, generation_config={"eos_token_id": None})
    assert m.eos_ids == (random.config.eos_token_id,)
    m.generation_config = {"eos_token_id": [7, 8]}
    assert m.eos_ids == (7, 8)
    with pytest.raises(TypeError):
        m.generation_config["eos_token_id"] = 3
    for wrong in ({"eos_token_id": "3"}, {"eos_token_id": 512}, {"do_sample": "no"}, {"temperature": True}, 5):
        with pytest.raises(UserError, match="generation_config"):
            m.generation_config = wrong
    assert m.eos_ids == (7, 8)
    m.generation_config = {}
    m.config = random.config.replace(eos_token_id=9)
    assert m.eos_ids == (9,)


def test_a_config_that_the_model_does_not_compute_by_is_refused(random):
    m = LanguageModel(random.model, random.config.replace(index_topk=3), options=EXACT)
    for call in (m.logits, m.score, m.generate, m.trace):
        with pytest.raises(UserError, match="config: index_topk is 3, and the model's own config says"):
            call([1, 2, 3])


def test_chat_continues_and_keeps_reasoning_apart(spoken, monkeypatch):
    tokenizer = spoken.tokenizer
    end, words = tokenizer.encode("</think>"), tokenizer.encode("It is raining.")
    drawn = [*words, *end, *words[:2], spoken.eos_ids[0]]
    monkeypatch.setattr(
        LanguageModel, "_decode", lambda self, rows, *_: prompts.append(rows[0]) or iter(np.array(drawn)[:, None])
    )
    for thinking in (False, True):
        prompts = []
        answer = spoken.chat("Rain?", len(drawn), thinking=thinking)
        messages = [{"role": "user", "content": "Rain?"}]
        assert prompts == [tokenizer.encode_chat(messages, thinking=thinking)]
        assert answer.reasoning == ("It is raining." if thinking else None)
        assert str(answer) == answer.text and answer.text.endswith(tokenizer.decode(words[:2]))
        assert answer.finish_reason == "stop" and answer.tokens.tolist() == drawn
        assert answer.messages == [*messages, {"role": "assistant", "content": answer.text}]
        spoken.chat([*answer.messages, {"role": "user", "content": "Still?"}], len(drawn))
        assert "Rain?" in tokenizer.decode(prompts[1]) and "Still?" in tokenizer.decode(prompts[1])


@pytest.mark.parametrize("messages", [None, [], {}, 5, [{"role": "user"}], ["Rain?"], [{"role": "user", "content": 5}]])
def test_refused_messages(spoken, messages):
    with pytest.raises(UserError, match="messages"):
        spoken.chat(messages)


def test_a_model_shows_what_it_is(random):
    shown = repr(random)
    for part in (random.config.model_type, f"{random.config.num_hidden_layers} layers", "bfloat16", "cpu", "EXACT"):
        assert part in shown.replace(repr(EXACT), "EXACT"), part
    assert f"{sum(x.size for x in jax.tree.leaves(random.model)):,} parameters" in shown


def test_refused_text_and_single_tokens(spoken, random):
    with pytest.raises(UserError, match="prompt 0: empty"):
        spoken.generate("")
    with pytest.raises(UserError, match="row 0: 1 token"):
        random.score([3])
    with pytest.raises(UserError, match=r"out: float32 \[1, 2, 3\]; must be float32 \[1, 2, 512\]"):
        random.logits([1, 2], out=np.zeros((1, 2, 3), np.float32))
