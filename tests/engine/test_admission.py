"""Arguments of requests: their types and ranges are checked when a request is made or added."""

import numpy as np
import pytest
from flax import nnx

from dsv32_jax.config import ModelConfig
from dsv32_jax.engine.engine import Engine
from dsv32_jax.engine.request import SamplingParams
from dsv32_jax.errors import UserError
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.tokenizer import Tokenizer
from dsv32_jax.model.model import DeepseekV32
from tests.engine.test_engine import TEXTS
from tests.engine.test_transactions import SMALL
from tests.harness import EXACT, golden_directory


@pytest.fixture(scope="module")
def lm():
    config = ModelConfig.tiny(
        num_hidden_layers=1, initializer_range=0.3, quantization_config=None, num_nextn_predict_layers=0
    )
    tokenizer = Tokenizer(golden_directory("tiny") / "model")
    return LanguageModel(DeepseekV32(config, nnx.Rngs(0)), config, tokenizer, EXACT)


@pytest.fixture(scope="module")
def shared(lm):
    return Engine(lm, **SMALL)


@pytest.fixture
def engine(shared):
    """A refused request leaves nothing in the engine."""
    yield shared
    assert not shared._owner and not shared.scheduler.waiting and shared.pool.statistics().in_use == 0
    while shared.busy:  # a step that was planned ahead
        shared.step()


WRONG = {
    "max_new_tokens": (2.5, 2.0, "2", True, 0, -1, [2], float("nan")),
    "temperature": ("1", True, -0.1, float("nan"), float("inf"), 1e39, 10**400, [1.0], 1j),
    "top_p": ("1", False, 0, 0.0, -0.1, 1.1, float("nan"), (1,)),
    "seed": (1.5, 1.0, "1", True, None, -1, 2**31),
    "n": (1.5, 1.0, "1", True, None, 0, 17),
    "stop": ((1,), ["a", None], 5, b"x", [b"x"], {"a": 1}, "", ("",), ("a",) * 17, True),
    "stop_token_ids": (5, "5", (1.0,), ("5",), (True,), (-1,), [[1]], np.array([1.0]), {1: 2}, b"1"),
    "ignore_eos": ("no", 1, None, 0.0),
    "logprobs": (2.0, "2", True, -1, 21, (2,)),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_wrong_parameters_are_refused_when_they_are_made(field, value):
    with pytest.raises(UserError, match=f"^{field}: ") as raised:
        SamplingParams(**{field: value})
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 200


def test_numbers_of_numpy_and_lists_are_taken():
    params = SamplingParams(
        np.int64(5),
        np.float32(0.5),
        np.float64(0.9),
        np.uint8(3),
        np.int32(2),
        ["a", "b"],
        np.array([1, 2]),
        np.True_,
        np.int16(1),
    )
    assert params == SamplingParams(5, 0.5, 0.9, 3, 2, ("a", "b"), (1, 2), True, 1)
    assert hash(params) and type(params.max_new_tokens) is type(params.stop_token_ids[0]) is int
    assert type(params.temperature) is float and params.ignore_eos is True
    assert SamplingParams(temperature=1).temperature == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None}, "prompt: of type NoneType"),
        ({"prompt": 5}, "prompt: of type int"),
        ({"prompt": {"a": 1}}, "prompt: of type dict"),
        ({"prompt": [1.5]}, "prompt 0: must be"),
        ({"prompt": ""}, "prompt 0: empty"),
        ({"prompt": [2, 10**9]}, "prompt 0, position 1"),
        ({"params": {"n": 2}}, "params: {'n': 2}"),
        ({"params": 5}, "params: 5"),
        ({"params": SamplingParams(stop_token_ids=(10**6,))}, "stop_token_ids: 1000000; must be in 0.."),
        ({"salt": "x"}, "salt: 'x'; must be bytes"),
        ({"salt": None}, "salt: None"),
        ({"salt": bytearray(b"x")}, "salt: "),
    ],
)
def test_wrong_arguments_of_add(engine, arguments, message):
    with pytest.raises(UserError, match=message):
        engine.add(**({"prompt": TEXTS[0][:70]} | arguments))


ENGINE = {
    "lm": ("demo", None),
    "cache_tokens": (0, -64, 64.0, "64", True, 2**40),
    "memory_fraction": (0, 1.5, "0.5", True, float("nan")),
    "max_tokens": (0, 8.0, "8", True),
    "max_prompt_tokens": (0, -1, 7, 16.0, False),
    "max_sequences": (0, 4.0, None, True, 9),
    "sharing": (1, None, "yes"),
    "speculate": (1, None, "yes"),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in ENGINE.items() for value in values])
def test_wrong_arguments_of_an_engine(lm, name, value):
    with pytest.raises(UserError, match=f"^{name}: "):
        Engine(**({"lm": lm, "max_tokens": 8, "max_sequences": 4} | {name: value}))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "^prompt 2: empty"),
        ([10**9], "^prompt 2, position 0: token"),
        ([2] * 321, "^prompt 2: "),  # more than the cache
        ("", "^prompt 2: empty"),
        (5.5, "^prompt 2: must be"),
        (None, "^prompt 2: must be"),
    ],
)
@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_one_bad_prompt_of_several_is_named_and_none_is_queued(engine, bad, message, kind):
    with pytest.raises(UserError, match=message):
        engine.generate(kind([[5, 6], "text", bad, [7]]), SamplingParams(4))
    assert not engine.busy


def test_prompts_that_raise_queue_nothing(engine):
    def prompts():
        yield [5, 6]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts())
    for wrong in (5, None):
        with pytest.raises(UserError, match="prompts: "):
            engine.generate(wrong)
    with pytest.raises(UserError, match="max_new_tokens"):
        engine.generate([[5]], SamplingParams(10**6))
    assert engine.generate([]) == []


def test_one_text_or_list_of_ids_is_one_prompt(engine, lm):
    params = SamplingParams(1)
    for prompts, count in (("The keeper", 1), ([5, 6, 7], 1), (np.array([5, 6]), 1), (np.array([[5, 6], [7, 8]]), 2)):
        assert len(engine.generate(prompts, params)) == count


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_whatever_ends_generate_cancels_its_requests(engine, monkeypatch, error):
    other, step, steps = engine.add(TEXTS[1][:9], SamplingParams(9, ignore_eos=True)), engine.step, iter(range(99))

    def interrupted():
        if next(steps) == 4:
            raise error
        return step()

    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(error):
        engine.generate([TEXTS[0][:40], TEXTS[1][:40]], SamplingParams(30, ignore_eos=True))
    assert {request for request, _ in engine._owner.values()} == {other}
    assert len(list(engine.stream(other))) == 9 and not engine.busy


def test_a_string_alone_is_one_stop_string(engine):
    assert SamplingParams(stop="the end").stop == ("the end",)
    plain = engine.generate(["The lighthouse"], SamplingParams(20, ignore_eos=True))[0].completions[0]
    stop = plain.text[4:7]
    completions = engine.generate(["The lighthouse"], SamplingParams(20, stop=stop, ignore_eos=True))[0].completions[0]
    assert completions.finish_reason == "stop" and completions.text == plain.text[: plain.text.index(stop)]


def test_the_text_of_a_special_token_stops_where_the_token_comes(engine, lm, monkeypatch):
    plain = engine.generate([TEXTS[0][:9]], SamplingParams(12, ignore_eos=True))[0].completions[0]
    token = plain.tokens[5]
    assert token not in plain.tokens[:5]
    special = lm.tokenizer.special_tokens["eos_token"]
    # As if the model had said it: the token that comes sixth is the special one.
    monkeypatch.setattr(type(lm.tokenizer), "encode", lambda _, text, bos=False: [token] if text == special else [8, 9])
    monkeypatch.setattr(lm.tokenizer, "special_ids", frozenset({token}))
    request = engine.generate([TEXTS[0][:9]], SamplingParams(12, stop=(special, "x"), ignore_eos=True))[0]
    assert request.params.stop_token_ids == (token,)
    assert request.completions[0].finish_reason == "stop" and request.completions[0].tokens == plain.tokens[:6]


def test_special_tokens_in_stop_strings(engine, lm):
    special = lm.tokenizer.special_tokens["eos_token"]
    request = engine.add([5], SamplingParams(1, stop=(special, "plain"), stop_token_ids=(3,)))
    assert request.params.stop_token_ids == (3, lm.tokenizer.eos_id) and request.params.stop == (special, "plain")
    engine.cancel(request)
    with pytest.raises(UserError, match=r"stop: .* beside other text"):
        engine.add([5], SamplingParams(1, stop=f"so{special}"))


@pytest.mark.parametrize(
    ("config", "want"),
    [
        ({}, (0.0, 1.0)),
        ({"temperature": 0.7, "top_p": 0.9}, (0.0, 1.0)),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, (0.7, 0.9)),
        ({"do_sample": True}, (1.0, 1.0)),
        ({"do_sample": True, "temperature": None, "top_p": None}, (1.0, 1.0)),
    ],
)
def test_sampling_is_the_checkpoints_where_nobody_says(engine, lm, monkeypatch, config, want):
    monkeypatch.setattr(lm, "generation_config", config)
    request = engine.add([5], SamplingParams(1))
    assert (request.params.temperature, request.params.top_p) == want
    other = engine.add([5], SamplingParams(1, temperature=0.3))
    assert (other.params.temperature, other.params.top_p) == (0.3, want[1])
    for each in (request, other, *engine.generate([[5]])):
        engine.cancel(each)


def test_without_a_number_there_are_as_many_tokens_as_generate_makes_or_as_fit(lm):
    for generation_config, expected in (({}, 128 - 3 + 1), ({"max_new_tokens": 7}, 7)):
        other = LanguageModel(lm.model, lm.config, lm.tokenizer, lm.options, generation_config)
        request = Engine(other, cache_tokens=128).add([5, 6, 7], SamplingParams(seed=1))
        assert request.params.max_new_tokens == expected <= other.new_tokens([[5, 6, 7]], None)
