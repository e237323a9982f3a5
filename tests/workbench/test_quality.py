"""Quality beside a reference: nothing is lost against oneself, and each figure is what its name says."""

import numpy as np
import pytest

from dsv32_jax import fidelity
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.workbench.quality import Reference, Texts, default_length
from dsv32_jax.experiments.workbench.settings import Setting
from dsv32_jax.generate.language_model import LanguageModel
from tests.harness import TEXT


@pytest.fixture(scope="module")
def texts(small):
    return Texts.of(small, text=TEXT, length=32, windows=2, needle_windows=0, source="harness")


@pytest.fixture(scope="module")
def reference(small, texts):
    return Reference(small, texts)


def test_windows_are_of_the_text(small, texts):
    assert texts.ids.shape == (2, 32) and texts.describe()["source"] == "harness"
    assert small.tokenizer.decode(texts.ids[0]).startswith("The lighthouse keeper")
    assert default_length(small) == 16
    held_out = Texts.of(small, length=256, windows=3, needle_windows=2)
    assert held_out.ids.shape == (3, 256) and len(held_out.needles) == 2


def test_a_model_beside_itself_loses_nothing(small, texts, reference):
    quality = reference.measure(small)
    assert (quality["kl"], quality["top1_agreement"], quality["recall"], quality["needles"]) == (0, 1, 1, None)
    assert quality["perplexity"] == pytest.approx(small.score(texts.ids).perplexity, rel=1e-4)
    again = LanguageModel(small.model, small.config, small.tokenizer, small.options)
    assert reference.measure(again) == quality  # measured anew, by the program of any other model


def test_figures_are_those_of_traces(small, texts, reference):
    recent = Setting.of("recent", parts=["index_select=recent"]).apply(small)
    quality = reference.measure(recent)
    traces = [(small.trace(row), recent.trace(row)) for row in texts.ids]
    k = small.config.index_topk
    pairs = [(a.topk[layer, k:], b.topk[layer, k:], a.attention[layer, k:]) for a, b in traces for layer in range(2)]
    assert quality["recall"] == pytest.approx(np.mean([fidelity.recall(a, b, 32).mean() for a, b, _ in pairs]))
    masses = [fidelity.mass(attention, b) for _, b, attention in pairs]
    kls = [fidelity.kl_divergence(a.logits[:-1], b.logits[:-1]).mean() for a, b in traces]
    assert quality["kl"] == pytest.approx(np.mean(kls), rel=1e-3)
    assert quality["kl"] > 0 and quality["recall"] < 0.9
    assert quality["attention_mass"] == pytest.approx(np.mean(masses), rel=1e-4)


def test_dense_attention_recalls_everything(small, reference):
    dense = Setting.of("dense", ["attention=dense"]).apply(small)
    quality = reference.measure(dense)
    assert (quality["recall"], quality["attention_mass"]) == (1, 1) and quality["kl"] > 0
    beside_dense = Reference(dense, reference.texts).measure(small)
    assert beside_dense["recall"] < 1 and beside_dense["kl"] > 0


def test_windows_that_leave_no_choice_have_no_recall(small):
    texts = Texts.of(small, text=TEXT, length=8, windows=1, needle_windows=4)
    assert texts.needles == []
    assert Reference(small, texts).measure(small)["recall"] is None


def test_what_cannot_be_measured_is_refused(small):
    with pytest.raises(UserError, match="no tokenizer"):
        Texts.of(LanguageModel(small.model, small.config))
    with pytest.raises(UserError, match="window 300: must be from 2 to max_position_embeddings = 256"):
        Texts.of(small, length=300)
    with pytest.raises(UserError, match="1 token"):
        Texts.of(small, text="", length=16)
