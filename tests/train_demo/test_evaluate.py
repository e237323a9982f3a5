"""The figures of the model card: what they count, on models small enough to know the answer."""

import functools
import json
import lzma

import jax
import numpy as np
import pytest
from flax import nnx

from dsv32_jax.config import ModelConfig
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.studies import held_out
from dsv32_jax.experiments.train_demo import evaluate
from dsv32_jax.experiments.train_demo.recall import HELD_OUT_ANIMALS
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.loading import load
from dsv32_jax.generate.tokenizer import Tokenizer
from dsv32_jax.model.model import DeepseekV32, Options
from tests.harness import TEXT


@pytest.fixture(scope="module")
def model() -> DeepseekV32:
    config = ModelConfig.tiny(quantization_config=None, initializer_range=0.15)
    return jax.jit(lambda: DeepseekV32(config, nnx.Rngs(3)))()


@pytest.fixture(scope="module")
def scored(model):
    """`scored(mode)`: random ids, and what the scorer says of them."""
    ids = np.random.default_rng(0).integers(2, 512, (3, 60)).astype(np.int32)
    return functools.cache(
        lambda mode: (ids, *evaluate.scorer(model, mode, model.config.index_topk, "float32", False)(ids))
    )


@pytest.fixture(scope="module")
def texts(data) -> np.ndarray:
    ids = Tokenizer(data).encode(TEXT * 10, bos=True)
    return np.array([ids[:512], ids[:1] + ids[40:551]], np.int32)


def test_score_is_that_of_the_language_model(model, scored):
    for mode, attention in (("indexer", "sparse"), ("dense", "dense")):
        ids, likelihood, right = scored(mode)
        lm = LanguageModel(model, model.config, None, Options(attention=attention))
        expected = lm.score(ids).log_likelihoods
        np.testing.assert_allclose(likelihood, expected, atol=1e-3)
        np.testing.assert_array_equal(right, lm.logits(ids)[:, :-1].argmax(-1) == ids[:, 1:])


def test_planted_rope_changes_the_choice_and_is_gone_afterwards(model, scored):
    k = model.config.index_topk
    likelihoods = {mode: scored(mode)[1][0] for mode in ("indexer", "interleaved rope", "dense")}
    np.testing.assert_allclose(likelihoods["interleaved rope"][: k - 1], likelihoods["dense"][: k - 1], atol=1e-4)
    assert np.abs(likelihoods["interleaved rope"][k:] - likelihoods["indexer"][k:]).max() > 1e-3
    again = evaluate.scorer(model, "indexer", k, "float32", False)(scored("indexer")[0])[0][0]
    np.testing.assert_array_equal(again, likelihoods["indexer"])


def test_perplexity_and_bits_per_byte_of_a_uniform_guess():
    ids = np.zeros((2, 1025), np.int32)
    uniform = np.full((2, 1024), -np.log(8), np.float32)
    summary = evaluate.summarise(uniform, ids, np.array([2]))
    assert summary["perplexity"] == pytest.approx(8)
    assert summary["bits_per_byte"] == pytest.approx(3 / 2)
    assert list(summary["by_position"]) == ["1-256", "256-1024", "1024-2048"]


def test_positions_are_those_of_the_predicted_tokens():
    likelihood = np.zeros((1, 511), np.float32)
    likelihood[0, 255:] = -np.log(4)  # tokens at positions 256 and later
    by_position = evaluate.summarise(likelihood, np.zeros((1, 512), np.int32), np.array([1]))["by_position"]
    assert by_position["1-256"]["perplexity"] == pytest.approx(1)
    assert by_position["256-1024"]["perplexity"] == pytest.approx(4)


def test_needles_state_what_they_ask(data, texts):
    tokenizer = Tokenizer(data)
    needles = evaluate.needles(tokenizer, texts, (400, 512), 4)
    assert [needle.context for needle in needles] == [400] * 4 + [512] * 4
    for needle in needles:
        text = tokenizer.decode(needle.ids[: needle.length])
        question, _, answer = text.rpartition("? ")[2].rpartition(" is ")
        assert text.count(f"{question} is {answer}") == 2, text
        assert any(animal in question for animal in HELD_OUT_ANIMALS)
        assert tokenizer.decode(needle.ids[needle.answer : needle.length]) == answer
        assert not needle.ids[needle.length :].any()
        stated = tokenizer.encode(f"{question} is {answer}.\n")
        place = next(n for n in range(needle.length) if (needle.ids[n : n + len(stated)] == stated).all())
        assert needle.distance == needle.answer - (place + len(stated))
    distances = [needle.distance for needle in needles[:4]]
    # From near the start of the text to near its end; the question itself is between.
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < needles[0].answer / 2 < 0.8 * needles[0].answer < distances[0]


def test_found_needles_need_every_digit(data, texts):
    needles = evaluate.needles(Tokenizer(data), texts, (256,), 3)

    def score(ids):
        right = np.zeros((len(ids), ids.shape[1] - 1), bool)
        right[:, :] = True
        right[1, needles[1].answer - 1] = False  # the first digit of the second
        right[2, needles[2].answer - 2] = False  # the token before the third's
        return right.astype(np.float32), right

    assert evaluate.found_needles(score, needles).tolist() == [True, False, True]
    assert evaluate.by_distance(np.array([True, False, True]), needles) == {"0-256": pytest.approx(2 / 3)}


def test_selection_fidelity_orders_the_choices(model):
    lm = LanguageModel(model, model.config)
    ids = np.random.default_rng(2).integers(2, 512, (1, 80)).astype(np.int32)
    for row in evaluate.selection_fidelity(lm, ids, 16):
        assert 0 < row["recall"] < 1
        assert row["mass_oracle"] > max(row["mass"], row["mass_recent"], row["mass_random"]) > 0
        assert row["mass_random"] == pytest.approx(16 / 48, abs=0.2)


@pytest.fixture
def held_out_file(tmp_path, monkeypatch):
    rows = [
        ("a", "held-out", "First paragraph " + "word " * 40 + "\n\n" + "x " * 3000),
        ("a", "train", "first PARAGRAPH, " + "word " * 40),
        ("b", "held-out", "too short"),
    ]
    documents = [{"package": p, "path": "x", "split": s, "text": t} for p, s, t in rows]
    with lzma.open(tmp_path / "documents.jsonl.xz", "wt") as file:
        file.writelines(json.dumps(document) + "\n" for document in documents)
    packages = [{"name": name, "version": "1", "license": "MIT"} for name in "ab"]
    (tmp_path / "manifest.json").write_text(json.dumps({"packages": packages}))
    monkeypatch.setattr(held_out, "SHORTEST", 100)
    held_out.choose(tmp_path, tmp_path / "chosen.xz")
    return tmp_path / "chosen.xz"


def test_chosen_text_is_long_held_out_and_in_no_training_document(held_out_file):
    (document,) = held_out.documents(held_out_file)
    assert document["package"] == "a" and document["license"] == "MIT"
    assert document["text"].startswith("x x") or "First paragraph" not in document["text"]


def test_windows_of_the_shipped_text():
    from dsv32_jax.generate.loading import DEMO

    tokenizer = Tokenizer(DEMO)
    rows = held_out.windows(tokenizer, 4096, 3)
    assert rows.shape == (3, 4096) and (rows[:, 0] == tokenizer.bos_id).all()
    assert len(held_out.windows(tokenizer, 4096)) >= 32
    with pytest.raises(UserError, match="length 1000000"):
        held_out.windows(tokenizer, 1_000_000)


def test_token_bytes_add_up_to_the_text(data):
    tokenizer = Tokenizer(data)
    sizes = held_out.token_bytes(tokenizer, 512)
    for text in (TEXT, "naïve 灯台"):
        assert sizes[tokenizer.encode(text)].sum() == len(text.encode())
    assert sizes[tokenizer.bos_id] == 0


def last_k(queries, head_weights, index, layer, block_tables, sequence, positions, *, k):
    """The last k positions, by the docstring of `pallas_kernels.index_select`: present ones first, then -1."""
    chosen = positions[:, None] - np.arange(k)
    return jax.numpy.where(chosen >= 0, chosen, -1).astype("int32")


@pytest.mark.parametrize("length", [320, pytest.param(4096, marks=pytest.mark.slow)])
def test_a_users_own_selection_scores_as_the_evaluation_of_the_training(length):
    lm = load("demo")
    ids = held_out.windows(lm.tokenizer, length, 2)
    k = lm.config.index_topk
    evaluated = evaluate.scorer(lm.model, "recent", k, lm.options.compute_dtype, lm.options.act_quant)(ids)[0]
    scored = lm.with_parts(index_select=last_k).score(ids)
    assert scored.perplexity == pytest.approx(float(np.exp(-evaluated.mean(dtype=np.float64))), rel=1e-3)
    assert scored.perplexity != pytest.approx(lm.score(ids).perplexity, rel=1e-3)
