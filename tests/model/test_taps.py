"""Taps: what a step shows, and that one without them is the plain step."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.errors import UserError
from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.model import step, tapped_step
from dsv32_jax.model.seams import Seams
from dsv32_jax.model.taps import DETAILS, Taps
from tests.harness import EXACT, Piece, flat_batch, load_golden, tables_of
from tests.model.test_parts import IDS, lm  # noqa: F401  (a fixture)


def largest(x):
    return jnp.abs(x).max()


def rows_of_experts(x, row_token, tile_expert, num_experts):
    assert x.shape[0] == row_token.shape[0] and num_experts == 8
    return jnp.zeros(num_experts, jnp.int32).at[jnp.repeat(tile_expert, len(x) // len(tile_expert))].add(row_token >= 0)


def test_values_and_reductions_are_those_of_a_trace(lm):  # noqa: F811
    ids = IDS[0]
    trace = lm.trace(ids)
    values = lm.probe(ids, {"layers.*.hidden": None, "layers.*.attn.topk": None, "embedded": largest})
    assert set(values) == {"embedded", *(f"layers.{n}.{name}" for n in (0, 1) for name in ("hidden", "attn.topk"))}
    for layer in (0, 1):
        np.testing.assert_allclose(values[f"layers.{layer}.hidden"], trace.hidden[layer + 1], rtol=1e-4, atol=1e-4)
        chosen = values[f"layers.{layer}.attn.topk"]
        assert [set(row) - {-1} for row in chosen.tolist()] == [set(row) - {-1} for row in trace.topk[layer].tolist()]
    assert values["embedded"] == np.abs(trace.hidden[0]).max()


def test_inputs_of_experts_come_with_the_plan(lm):  # noqa: F811
    (count,) = lm.probe(IDS[0], {"layers.1.ffn.experts.down.input": rows_of_experts}).values()
    experts = lm.probe(IDS[0], {"layers.1.ffn.experts": None})["layers.1.ffn.experts"]
    np.testing.assert_array_equal(count, np.bincount(experts.reshape(-1), minlength=8))
    assert {"positions", "row_token", "tile_expert", "num_experts"} == set(DETAILS)


def test_every_name_can_be_asked_for(lm):  # noqa: F811
    names = lm.tap_names()
    rank, width = lm.config.q_lora_rank, lm.config.hidden_size
    assert (
        names["layers.1.attn.indexer.q_b.input"] == f"float32 [8, {rank}]"
        and names["states"] == f"float32 [8, {width}]"
    )
    linears = [path for path in lm.weights if path.startswith("layers.") and path.endswith((".o", ".down", ".q_a"))]
    assert linears and {f"{path}.input" for path in linears} <= set(names)
    values = lm.probe(IDS[0][:8], dict.fromkeys(names))
    assert {name: f"{value.dtype} {list(value.shape)}" for name, value in values.items()} == names


def test_what_no_value_is_called_or_two_ask_for_is_refused(lm):  # noqa: F811
    for taps, message in (
        ({"layers.0.attn.topc": None}, r"tap 'layers.0.attn.topc': no value of a step has such a name; did you mean"),
        ({"layers.9.*": None}, r"tap 'layers.9.\*': no value"),
        ({"*.hidden": None, "layers.0.hidden": largest}, "have different functions of it"),
        ({"*.hidden": 3}, "3 is no function"),
        ({3: None}, "tap 3: must be a text"),
        ({"layers.0.ffn.input": rows_of_experts}, "wants row_token, which does not belong to this value"),
        ({"states": lambda x: 3}, r"tap 'states': .* gave 3; must be arrays"),
        ({"states": lambda x: None}, r"gave None; must be arrays"),
    ):
        with pytest.raises(UserError, match=message):
            lm.probe(IDS[0], taps)
    with pytest.raises(UserError, match="probe: 2 sequences; give one"):
        lm.probe(IDS, {"states": None})


def lowered(function, *taps) -> str:
    """The text of a step of one sequence, as it is lowered."""
    model = load_golden("tiny128_fp8")
    batch = flat_batch([Piece(np.arange(2, 18))], tables_of(1, 1))
    cache = KVCache.create(model.config, 1, EXACT)
    return function.lower(model, batch, cache, EXACT, *taps).as_text()


def test_without_taps_nothing_is_computed(monkeypatch):
    """The lowered step is that of a model without the mechanism, and that of a tapped step nobody asks anything of."""
    plain = lowered(step)
    asked = lowered(tapped_step, Taps())
    assert plain.replace("@jit_step", "@jit_tapped_step") == asked
    assert lowered(tapped_step, Taps.of({"layers.0.attn.attention": largest})) != asked

    @contextlib.contextmanager
    def nothing(self, name):
        yield

    jax.clear_caches()
    monkeypatch.setattr(Seams, "tap", lambda *args, **details: None)
    monkeypatch.setattr(Seams, "value", lambda self, name, value, **details: value)
    monkeypatch.setattr(Seams, "scope", nothing)
    assert lowered(step) == plain
    jax.clear_caches()


def test_scopes_of_a_profile_are_the_names_of_taps():
    model = load_golden("tiny128_fp8")
    batch = flat_batch([Piece(np.arange(2, 18))], tables_of(1, 1))
    cache = KVCache.create(model.config, 1, EXACT)
    text = step.lower(model, batch, cache, EXACT).as_text(debug_info=True)
    for name in ("layers.0/attn/q_a", "layers.0/attn/index_select", "layers.1/ffn/route", "layers.1/ffn/experts"):
        assert name in text, name
