"""An engine whose model has a replaced part or a patch: every request gets the tokens that it gets alone."""

import jax.numpy as jnp
import pytest

from dsv32_jax.engine.engine import Engine
from dsv32_jax.engine.request import SamplingParams
from dsv32_jax.errors import UserError
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.model.variants import random, recent
from tests.engine.test_engine import SMALL, TEXTS, lm  # noqa: F401  (a fixture)
from tests.harness import one_shape

PROMPTS = [TEXTS[0][:130], TEXTS[0][:180], TEXTS[1][:180], TEXTS[1][:140]]
"""Pairs share two blocks; together they need more than the six that there are."""


def reversed_stream(hidden, positions):
    """Every seventh token of a sequence goes on with its features in reverse."""
    return jnp.where(positions[:, None] % 7 == 3, hidden[:, ::-1], hidden)


@pytest.mark.parametrize("changed", ["part", "patch"])
def test_sharing_and_preemption_change_no_token(lm: LanguageModel, changed):  # noqa: F811
    m = (
        lm.with_parts(index_select=random)
        if changed == "part"
        else lm.with_patches({"layers.0.hidden": reversed_stream})
    )
    params = SamplingParams(60, temperature=0.0, ignore_eos=True)
    with one_shape():
        alone = [m.generate(prompt, 60, ignore_eos=True).tokens[0].tolist() for prompt in PROMPTS]
        plain = [lm.generate(prompt, 60, ignore_eos=True).tokens[0].tolist() for prompt in PROMPTS]
    assert alone != plain
    engine = Engine(m, **SMALL)
    first = engine.generate(PROMPTS[:1], params)  # its blocks stay, for those that begin alike
    together = engine.generate(PROMPTS[1:], params)
    assert [request.completions[0].tokens for request in (*first, *together)] == alone
    summary = engine.summary()
    assert summary["preemptions"] > 0 and any(request.cached_tokens for request in together)


def test_a_part_of_the_wrong_shape_fails_when_the_step_is_compiled(lm):  # noqa: F811
    engine = Engine(lm.with_parts(index_select=lambda *arrays: jnp.zeros((1, 2), jnp.int32)), **SMALL)
    with pytest.raises(UserError, match=r"part index_select .* must be int32"):
        engine.generate(PROMPTS[:1], SamplingParams(2))


def test_a_broken_contract_ends_a_checked_engines_request_in_one_line(lm):  # noqa: F811
    def future(*arrays, k):
        return arrays[6][:, None] + 1

    engine = Engine(lm.with_parts(index_select=future, check=True), **SMALL)
    with pytest.raises(UserError, match=r"^part index_select .*comes after the token's own position$"):
        engine.generate(PROMPTS[:1], SamplingParams(2))


def test_an_engine_refuses_to_go_on_with_other_parts(lm):  # noqa: F811
    m = lm.with_parts(index_select=recent)
    engine = Engine(m, **SMALL)
    m.options = lm.options
    with pytest.raises(UserError, match="options"):
        engine.generate(PROMPTS[:1], SamplingParams(2))
