"""Patches: what a step goes on with instead of what it computed."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.errors import UserError
from dsv32_jax.model.model import Options
from dsv32_jax.model.sequence import Run
from dsv32_jax.model.variants import recent
from tests.harness import EXACT, one_shape, times_compiled
from tests.model.test_parts import IDS, lm  # noqa: F401  (a fixture)

FIRST, SECOND = (row[:16] for row in IDS)
LOGITS = {"logits": None}
VIEWS = ("layers.0.attn.attention", "layers.1.attn.attention", "logits")


def test_every_value_that_feeds_the_step_can_be_patched(lm):  # noqa: F811
    """By itself it changes nothing, however the step must be composed for it."""
    names = [name for name in lm.tap_names() if name not in VIEWS]
    seen = []

    def same(name):
        return lambda value: seen.append(name) or value

    patched = lm.with_patches({name: same(name) for name in names})
    expected = lm.probe(FIRST, LOGITS)["logits"]
    np.testing.assert_allclose(patched.probe(FIRST, LOGITS)["logits"], expected, atol=1e-5)
    assert set(seen) == set(names) and len(names) > 25
    back = patched.with_patches(dict.fromkeys(names))
    assert back.options == lm.options


def test_a_run_goes_on_with_the_stream_of_another(lm):  # noqa: F811
    """Activation patching: after it, nothing is left of the run's own tokens."""
    streams = {name: lm.probe(FIRST, {"*": None})[name] for name in ("layers.0.hidden", "logits")}
    stream = jnp.asarray(streams["layers.0.hidden"])
    patched = lm.with_patches({"layers.0.hidden": lambda value: stream})
    values = patched.probe(SECOND, LOGITS | {"*.hidden": None})
    np.testing.assert_allclose(values["logits"], streams["logits"], atol=1e-5)
    np.testing.assert_array_equal(values["layers.0.hidden"], stream)  # a tap shows what the step goes on with
    assert np.abs(lm.probe(SECOND, LOGITS)["logits"] - streams["logits"]).max() > 0.1


def test_operands_change_from_call_to_call_without_another_program(lm, caplog):  # noqa: F811
    """Which position brings the other run's logits back: one program for all."""
    clean = lm.probe(FIRST, {"layers.0.hidden": None} | LOGITS)

    def put(value, positions, stream, position):
        return jnp.where(positions[:, None] == position, stream, value)

    def last(logits, token):
        return logits[-1, token]

    patched, values = lm.with_patches({"layers.0.hidden": put}), {}
    stream = clean["layers.0.hidden"]

    def sweep():
        for position in (3, 15, 16):
            operands = {"stream": stream, "position": position, "token": 7}
            values[position] = patched.probe(SECOND, {"logits": last, "states": None}, operands)

    assert times_compiled("flat_tapped_step", sweep, caplog) == 1
    np.testing.assert_allclose(values[16]["logits"], lm.probe(SECOND, LOGITS)["logits"][-1, 7], atol=1e-5)  # no token
    changed = {position: np.abs(values[position]["states"] - values[16]["states"]).max(axis=1) for position in (3, 15)}
    assert not changed[3][:3].any() and changed[3][3] > 0.1 and not changed[15][:15].any() and changed[15][15] > 0.1
    for operands, message in (
        ({"positions": 3}, "operand 'positions': has the name of what belongs to a value"),
        ({"strem": stream}, "operand 'strem': no function of a tap or patch has a parameter of that name"),
        ({"stream": "x", "position": 3}, "operand 'stream': str; must be an array or a number"),
        ({"stream": stream}, "wants position, which does not belong to this value and is no operand"),
    ):
        with pytest.raises(UserError, match=message):
            patched.probe(SECOND, {"states": None}, operands)
    with pytest.raises(UserError, match="wants stream, which does not belong"):
        patched.score(SECOND)


@pytest.mark.slow
def test_a_patch_of_one_position_is_the_same_in_every_call(lm):  # noqa: F811
    """Whole, in pieces, token by token: `positions` says where a step's tokens are."""

    def steer(value, positions):
        return value + jnp.where(positions[:, None] == 20, 3.0, 0.0).astype(value.dtype)

    patched = lm.with_patches({"layers.0.hidden": steer})
    ids = IDS[0]
    plain, whole = lm.probe(ids, LOGITS)["logits"], patched.probe(ids, LOGITS)["logits"]
    np.testing.assert_allclose(whole[:20], plain[:20], atol=1e-5)
    assert np.abs(whole - plain)[20].max() > 0.1
    with one_shape(16, 1):
        np.testing.assert_allclose(patched.logits(ids)[0], whole, atol=1e-4)
        tokens = patched.generate(ids[:18], 6, ignore_eos=True).tokens[0]
        again = patched.logits([*ids[:18].tolist(), *tokens.tolist()])[0]
    np.testing.assert_array_equal(again[17:-1].argmax(-1), tokens)


def test_selections_and_scores_can_be_patched(lm):  # noqa: F811
    """What part functions do, patches of their results do."""

    def last(value, positions):
        chosen = positions[:, None] - jnp.arange(value.shape[1])
        return jnp.where(chosen >= 0, chosen, -1)

    expected = lm.with_parts(index_select=recent).probe(IDS[0], LOGITS)["logits"]
    by_topk = lm.with_patches({"layers.*.attn.topk": last}).probe(IDS[0], LOGITS)["logits"]
    by_scores = lm.with_patches({"*.index_scores": lambda value: 0 * value + jnp.arange(value.shape[1])})
    np.testing.assert_allclose(by_topk, expected, atol=1e-5)
    np.testing.assert_allclose(by_scores.probe(IDS[0], LOGITS)["logits"], expected, atol=1e-5)


def test_what_feeds_nothing_or_has_another_shape_is_refused(lm):  # noqa: F811
    dense = lm.with_patches({})
    dense.options = dataclasses.replace(EXACT, attention="dense")
    own = lm.with_parts(index_select=recent)
    for model, patches, message in (
        (lm, {"layers.0.attn.attention": jnp.abs}, r"patch 'layers.0.attn.attention': .* looks at this value alone"),
        (lm, {"*": lambda value: value}, "looks at this value alone"),
        (dense, {"layers.0.attn.topk": lambda value: value}, r"topk': with these options the step looks at"),
        (own, {"layers.0.attn.index_scores": lambda value: value}, r"index_scores': with these options"),
        (lm, {"layers.0.hiden": lambda value: value}, r"patch 'layers.0.hiden': no value that a step goes on with has"),
        (lm, {"logits": lambda value: value}, "patch 'logits': no value that a step goes on with has such a name"),
        (lm, {"states": lambda value: value[:3]}, r"patch 'states': gave float32 \[3, 128\]; must be float32 \[16, 12"),
        (lm, {"states": lambda value: 3}, r"patch 'states': .* gave 3; must be arrays"),
        (lm, {"states": lambda value, tile_expert: value}, "wants tile_expert, which does not belong to this value"),
        (lm, {"states": jnp.abs, "sta*": jnp.exp}, "have different functions of it"),
    ):
        with pytest.raises(UserError, match=message):
            model.with_patches(patches).probe(FIRST, LOGITS)
    for patches, message in (({"states": 3}, r"patch 'states': 3 is no function"), ({3: jnp.abs}, "must be a text")):
        with pytest.raises(UserError, match=message):
            lm.with_patches(patches)
    with pytest.raises(UserError, match="patches: the form for whole sequences has none"):
        Run.of(lm.with_patches({"states": jnp.abs}).options)
    with pytest.raises(UserError, match=r"patches: .* must be a Patches"):
        Options(patches={"states": jnp.abs})
