"""The generation in one program: its tokens are those of `generate`, on the device alone, with the cache in place."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv32_jax.config import ModelConfig
from dsv32_jax.errors import UserError
from dsv32_jax.experiments import generate_jitted
from dsv32_jax.experiments.generate_jitted import arguments_of, generate
from dsv32_jax.generate import batching
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.tokenizer import Tokenizer
from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.model import DeepseekV32, abstract_model
from dsv32_jax.model.variants import recent
from pallas_kernels import backend
from tests.harness import EXACT, golden_directory, times_compiled
from tests.model.test_kernels_in_model import FP8, WIDTHS

ROWS = [[(7 * n + i * i) % 97 + 2 for i in range(length)] for n, length in enumerate((3, 41, 1, 24))]
NEW = 12
GREEDY = {"temperature": 0.0, "top_p": 1.0, "seed": 0}
NUCLEUS = {"temperature": 0.8, "top_p": 0.9, "seed": 3}


@pytest.fixture(scope="module")
def lm():
    """Two layers, one with experts; 8 keys are chosen. No token of theirs ends a row."""
    config = ModelConfig.tiny(
        num_hidden_layers=2, initializer_range=0.3, quantization_config=None, num_nextn_predict_layers=0, index_topk=8
    )
    model = jax.jit(lambda: DeepseekV32(config, nnx.Rngs(0)))()
    tokenizer = Tokenizer(golden_directory("tiny") / "model")
    return LanguageModel(model, config, tokenizer, EXACT, {"eos_token_id": [500, 501, 502, 503]})


def ended(m: LanguageModel, *ends: int) -> LanguageModel:
    """The same, whose rows end after these tokens."""
    ids = [*ends, 500, 501, 502, 503][:4]  # always four, so that all share a program
    return LanguageModel(m.model, m.config, m.tokenizer, m.options, {"eos_token_id": ids})


@pytest.fixture(autouse=True)
def pieces_of_32(monkeypatch):
    """The 69 tokens of the prompts are three pieces; one prompt is in three of them."""
    monkeypatch.setattr(batching, "SMALLEST_CHUNK", 32)
    monkeypatch.setattr(batching, "LARGEST_CHUNK", 32)


@pytest.mark.parametrize("sampling", [GREEDY, NUCLEUS], ids=["greedy", "drawn"])
def test_tokens_are_those_of_generate(lm, sampling):
    free = lm.generate(ROWS, NEW, **sampling).tokens
    assert (free >= 0).all()
    m = ended(lm, int(free[1, 4]), int(free[3, 7]))
    expected = m.generate(ROWS, NEW, **sampling)
    assert expected.finish_reasons[1] == expected.finish_reasons[3] == "stop" and "length" in expected.finish_reasons
    arguments = arguments_of(m, ROWS, NEW, **sampling)
    assert arguments["pieces"].ids.shape == (3, 32)
    for _ in range(2):  # what the first call left in the cache changes nothing
        before = arguments["cache"]
        tokens, arguments["cache"] = generate(**arguments)
        np.testing.assert_array_equal(tokens, expected.tokens)
        assert before.kv.is_deleted() and before.index.is_deleted()


def test_it_ends_where_all_rows_have(lm):
    tokens = lm.generate(ROWS, NEW).tokens
    m = ended(lm, *map(int, tokens[:, 2]))
    tokens, _ = generate(**arguments_of(m, ROWS, NEW, **GREEDY))
    np.testing.assert_array_equal(tokens, m.generate(ROWS, NEW).tokens)
    assert (np.asarray(tokens)[:, 3:] == -1).all()


def test_a_part_of_ones_own_runs_in_it(lm):
    m = lm.with_parts(index_select=recent)
    tokens, _ = generate(**arguments_of(m, ROWS, NEW, **GREEDY))
    np.testing.assert_array_equal(tokens, m.generate(ROWS, NEW).tokens)
    assert (np.asarray(tokens) != lm.generate(ROWS, NEW).tokens).any()


def test_it_is_one_program_that_writes_the_cache_in_place(lm, caplog):
    arguments = arguments_of(lm, ROWS, NEW, **(NUCLEUS | {"temperature": 0.5, "top_p": 0.7}))
    lowered = generate.lower(**arguments)
    assert "callback" not in lowered.as_text()
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(arguments["cache"]))
    assert lowered.compile().memory_analysis().alias_size_in_bytes == cache_bytes

    def twice():
        for seed, temperature in enumerate((0.5, 0.9)):
            changed = arguments | {"seed": seed, "temperature": temperature}
            _, arguments["cache"] = generate(**changed)

    jax.clear_caches()
    assert times_compiled("generate", twice, caplog) == 1


@pytest.mark.slow
def test_on_a_gpu_it_runs_kernels(monkeypatch, caplog):
    monkeypatch.setattr(backend, "on_hopper", lambda: True)
    backend.tell_of_reference.cache_clear()
    config = ModelConfig.tiny(num_hidden_layers=2, **WIDTHS)
    tables = batching.block_tables(2, 300, 1024)
    pieces = batching.prompt_pieces([[1] * 280, [2] * 9], tables, FP8)
    assert pieces.ids.shape == (1, 512)
    arguments = {
        "model": abstract_model(config),
        "cache": jax.eval_shape(lambda: KVCache.create(config, tables.size, FP8)),
        "pieces": pieces,
        "tables": tables,
        "lengths": np.array([280, 9], np.int32),
        "end_ids": np.array([1], np.int32),
        **{"seed": 0, "temperature": 0.7, "top_p": 0.9, "options": FP8, "new": 8, "greedy": False, "nucleus": True},
    }
    text = generate.trace(**arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") > 6 and "callback" not in text
    assert not [record for record in caplog.records if record.name == "pallas_kernels"]


def test_batches_are_the_same_on_the_host_and_in_a_jitted_function():
    tables = batching.block_tables(3, 200, 1024)
    positions = np.array([70, -1, 3, 199], np.int32)
    arguments = (np.array([5, 0, 6, 7]), positions, np.array([2, 1, 0, 1]), tables, np.array([0, -1]))
    host = batching.batch_of(*arguments)
    traced = jax.jit(lambda *arrays: batching.batch_of(*arrays))(*arguments)
    some = jax.jit(lambda positions: batching.batch_of(*arguments[:1], positions, *arguments[2:]))(positions)
    for field in dataclasses.fields(host):
        array = getattr(host, field.name)
        assert isinstance(array, np.ndarray) and array.dtype == np.int32
        for other in (traced, some):
            np.testing.assert_array_equal(getattr(other, field.name), array)
            assert getattr(other, field.name).dtype == jnp.int32
    assert host.slots.tolist() == [(2 * 4 + 1) * 64 + 6, -1, 3, (4 + 3) * 64 + 7]


PROMPTS = [
    "The lighthouse keeper counts the ships",
    "Some carry grain, some salt",
    "The gulls walk along the wall",
    "He drinks his tea and waits",
]


@pytest.fixture
def command(lm, monkeypatch, capsys):
    """Runs the command with a model, and returns the lines that it prints."""

    def run(m: LanguageModel) -> list[str]:
        assert 64 < sum(map(len, lm.rows(PROMPTS))) <= 96  # the shapes of the other tests
        words = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
        monkeypatch.setattr(generate_jitted, "load", lambda name: m)
        monkeypatch.setattr(sys, "argv", ["generate_jitted", *words, "--max-new-tokens", str(NEW)])
        generate_jitted.main()
        return capsys.readouterr().out.splitlines()

    return run


def test_the_command_prints_text_and_both_speeds(command, lm):
    lines = command(lm)
    assert [line.partition(":")[0] for line in lines[-3:]] == ["one program", "m.generate", "tokens that differ"]
    assert lines[-1] == f"tokens that differ: 0 of {len(PROMPTS) * NEW}"


def test_logits_that_are_not_finite_are_refused(command, lm):
    norm = jnp.full(lm.config.hidden_size, jnp.nan)
    with pytest.raises(UserError, match="prompt 0, position 14: the logits are not finite"):
        command(lm.with_parts(weights={"norm": norm}))
