"""Batches are a function of seed, stage and step; recall tasks ask for what the window states."""

import re

import numpy as np
import pytest

from dsv32_jax.errors import UserError
from dsv32_jax.experiments.train_demo import recall
from dsv32_jax.experiments.train_demo.batches import Batches
from dsv32_jax.experiments.train_demo.sizes import Stage
from dsv32_jax.generate.tokenizer import Tokenizer

STAGE = Stage("test", 10, 4, 200, "dense", "main", 1e-3, recall_share=0.0)


@pytest.fixture(scope="module")
def batches(data) -> Batches:
    return Batches(data, seed=1)


def test_a_batch_depends_on_its_step_alone(data, batches):
    again = Batches(data, seed=1)
    for step in (7, 2, 7):
        np.testing.assert_array_equal(batches(STAGE, 0, step).ids, again(STAGE, 0, step).ids)
    assert (batches(STAGE, 0, 0).ids != batches(STAGE, 0, 1).ids).any()
    assert (batches(STAGE, 0, 0).ids != Batches(data, seed=2)(STAGE, 0, 0).ids).any()


def test_stream_is_the_same_batches_from_any_step_on(batches):
    for step, batch in enumerate(batches.stream(STAGE, 3, 6), 6):
        np.testing.assert_array_equal(batch.ids, batches(STAGE, 3, step).ids)
    assert step == STAGE.steps - 1


def test_every_window_of_an_epoch_comes_once_and_begins_with_bos(batches):
    width = STAGE.length - 1
    windows = (len(batches.tokens) - 1) // width - 1
    batches_of_epoch = windows // STAGE.batch
    rows = np.concatenate([batches(STAGE, 0, step).ids for step in range(batches_of_epoch)])
    assert (rows[:, 0] == batches.bos).all()
    # The corpus repeats one document, so starts are told apart by their place in the stream.
    from dsv32_jax.experiments.train_demo.batches import epoch_order

    _, order = epoch_order(1, 0, 0, windows, width)
    assert sorted(order) == list(range(windows))


def test_corpus_too_small_for_the_sequences_is_refused(batches):
    with pytest.raises(UserError, match=r"train\.npz.*too few"):
        batches(Stage("test", 1, 1, 100_000, "dense", "main", 1e-3), 0, 0)


def test_missing_data_says_how_it_is_made(tmp_path):
    with pytest.raises(UserError, match=r"train\.npz does not exist.*train_demo data"):
        Batches(tmp_path)


def test_chat_counts_answers_alone(batches, data):
    stage = Stage("chat", 10, 2, 256, "indexer", "all", 1e-3, chat_every=2)
    batch = batches(stage, 0, 0)
    decode = Tokenizer(data).decode
    assert decode(batch.ids[0][batch.weights[0] > 0]).startswith(" He drinks his tea. He drinks his tea.")
    assert (batches(stage, 0, 1).weights == 1).any()


@pytest.mark.parametrize("seed", range(12))
def test_tasks_fill_a_window_of_the_same_length(batches, seed):
    text = batches.tokens[:900].astype(np.int32)
    tokens, weights, count = batches.recall.fill(np.random.default_rng(seed), text)
    assert len(tokens) == len(weights) == 900
    assert 0 <= count <= 450
    assert (weights >= 0).all()


def test_questions_come_behind_their_facts_and_have_their_answers(batches, data):
    decode = Tokenizer(data).decode
    count = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        placed = sorted(batches.recall.facts(rng, 5), key=lambda pair: pair[0])
        text = "".join(decode(insert.tokens) for _, insert in placed)
        for question in re.finditer(r"\? (The [a-z ]+ is \d+)\.", text):
            count += 1
            assert question.group(1) + ".\n" in text[: question.start()]
    assert count > 50


def test_stated_numbers_count_nothing_and_answers_most(batches, data):
    decode = Tokenizer(data).decode
    _, insert = batches.recall.facts(np.random.default_rng(0), 1)[0]
    assert re.fullmatch(r"\d{5}", decode(insert.tokens[insert.weights == 0]))
    _, insert = batches.recall.facts(np.random.default_rng(0), 1)[1]
    assert re.fullmatch(r"\d{5}", decode(insert.tokens[insert.weights == recall.ANSWER_WEIGHT]))


def test_look_ups_have_the_values_of_their_list(batches, data):
    decode = Tokenizer(data).decode
    placed = sorted(batches.recall.settings(np.random.default_rng(0), 2000), key=lambda pair: pair[0])
    listed = dict(re.findall(r"^(\w+) = (\d+)$", decode(placed[0][1].tokens), re.M))
    for _, insert in placed[1:]:
        name, value = re.search(r": (\w+) = (\d+)\n", decode(insert.tokens)).groups()
        assert listed[name] == value


def test_quotations_repeat_the_text(batches):
    text = batches.tokens[:500].astype(np.int32)
    for _, insert in batches.recall.quotations(np.random.default_rng(0), text, 5):
        opening, closing = batches.recall.encode('\nAs quoted above: "'), batches.recall.encode('"\n')
        passage = insert.tokens[len(opening) : len(insert.tokens) - len(closing)]
        assert any((text[n : n + len(passage)] == passage).all() for n in range(len(text) - len(passage) + 1))


def test_held_out_animals_are_in_no_training_fact():
    assert not set(recall.HELD_OUT_ANIMALS) & set(recall.ANIMALS)
