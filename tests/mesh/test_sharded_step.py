"""The step over several devices gives one device's tokens, and sends nothing but tokens between them."""

from __future__ import annotations

import collections
import functools
import re

import jax
import numpy as np
import pytest

import dsv32_jax
from dsv32_jax.errors import UserError
from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.mesh import MeshShape
from dsv32_jax.model.model import Options, step, tapped_step
from dsv32_jax.model.sharding import place, with_shardings
from dsv32_jax.model.taps import Taps
from tests.harness import load_golden
from tests.mesh.harness import Placement, greedy_tokens, mesh_options

MODELS = {"tiny": Options("float32"), "tiny128_fp8": Options("float32", act_quant=True)}
NEW, TOKENS, ROWS = 4, 72, 3
QUICK = (("tiny", 8, "gather"), ("tiny", 4, "dispatch"))


@functools.cache
def prompts(name: str) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, load_golden(name).config.vocab_size, length).tolist() for length in (70, 3, 20, 33, 11)]


@functools.cache
def alone(name: str) -> list[list[int]]:
    """Tokens of one device."""
    return greedy_tokens(load_golden(name), MODELS[name], prompts(name), NEW, [0] * 5, tokens=137, rows=5)


CASES = [
    pytest.param(name, devices, exchange, marks=() if (name, devices, exchange) in QUICK else pytest.mark.slow)
    for name in MODELS
    for devices in (2, 4, 8)
    for exchange in ("gather", "dispatch")
]


@pytest.mark.parametrize(("name", "devices", "exchange"), CASES)
def test_tokens_are_those_of_one_device(name, devices, exchange):
    """With uneven loads (one device has three of five sequences, others none), and with one sequence alone."""
    options, model = mesh_options(MODELS[name], devices, exchange), load_golden(name)
    run = functools.partial(greedy_tokens, model, options, tokens=TOKENS, rows=ROWS)
    some, on = (prompts(name), [0, 1, 1, devices - 1, 1]) if devices > 2 else (prompts(name)[:4], [0, 1, 1, 1])
    assert run(some, NEW, on) == alone(name)[: len(some)]
    assert run(some[:1], NEW, [devices - 1]) == alone(name)[:1]


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["gather", "dispatch"])
def test_devices_of_two_hosts_are_one_mesh(exchange):
    options = mesh_options(MODELS["tiny"], 2, exchange, hosts=2)
    on = [0, 1, 1, 3, 1]
    tokens = greedy_tokens(load_golden("tiny"), options, prompts("tiny"), NEW, on, tokens=TOKENS, rows=ROWS)
    assert tokens == alone("tiny")


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["gather", "dispatch"])
def test_the_demo_model_over_eight_devices(exchange):
    lm = dsv32_jax.load("demo")
    texts = ["The lighthouse keeper", "To install a package on Debian, you", "Once upon a time there was a"]
    rows = lm.rows(texts)
    expected = lm.generate(texts, 12, temperature=0, ignore_eos=True).tokens
    options = mesh_options(lm.options, 8, exchange)
    tokens = greedy_tokens(lm.model, options, rows, 12, [0, 5, 5], tokens=64, rows=2)
    np.testing.assert_array_equal(tokens, expected)


# ---- what devices send to each other ----

COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute|collective-broadcast)(?:-start)?\("
    r'.*?op_name="([^"]*)"'
)


def abstract_step(name: str, mesh: MeshShape, tokens: int = TOKENS):
    """The arguments of a step over a mesh, abstract."""
    options, model = mesh_options(MODELS[name], mesh.ep, mesh.exchange), load_golden(name)
    placement = Placement(mesh.size, ROWS, [0], 74)
    cache = jax.eval_shape(lambda: KVCache.create(model.config, mesh.size * placement.tables.size, options))
    arguments = (model, placement.batch({}, tokens), cache)
    return (*(with_shardings(one, mesh) for one in arguments), options)


def as_one(shape: str) -> str:
    """The shape of a result without its layout; XLA has an all-to-all in pieces, a piece for each peer."""
    pieces = re.findall(r"(\w+)\[(\d+)([\d,]*)\]", shape)
    assert len({(dtype, others) for dtype, _, others in pieces}) == 1, shape
    return f"{pieces[0][0]}[{sum(int(first) for _, first, _ in pieces)}{pieces[0][2]}]"


def collectives(name: str, mesh: MeshShape) -> dict[str, list[tuple[str, str]]]:
    """The shape and the scope of each collective of the compiled step, by its kind."""
    text = step.lower(*abstract_step(name, mesh)).compile().as_text()
    by_kind = collections.defaultdict(list)
    for shape, kind, scope in COLLECTIVE.findall(text):
        by_kind[kind].append((as_one(shape), scope))
    names = "all-(?:gather|reduce|to-all)|reduce-scatter|collective-(?:permute|broadcast)"
    assert sum(map(len, by_kind.values())) == len(re.findall(rf" (?:{names})(?:-start)?\(", text))
    return by_kind


def test_a_gather_sends_tokens_and_their_sums():
    """At most one all-gather and one reduce-scatter a layer with experts, and positions once a step."""
    config, mesh = load_golden("tiny").config, MeshShape(8, exchange="gather")
    layers = config.num_hidden_layers - config.first_k_dense_replace
    sent = collectives("tiny", mesh)
    assert set(sent) == {"all-gather", "reduce-scatter"}
    shapes = collections.Counter(shape for shape, _ in sent["all-gather"])
    assert shapes == {f"f32[{8 * TOKENS},{config.hidden_size}]": layers, f"s32[{8 * TOKENS}]": 1}
    assert [shape for shape, _ in sent["reduce-scatter"]] == [f"f32[{TOKENS},{config.hidden_size}]"] * layers
    assert not [scope for kind in sent.values() for _, scope in kind if "attn" in scope]


def test_a_dispatch_sends_tokens_their_choices_and_their_sums():
    """At most four all-to-alls a layer with experts, of tokens, choices, sums and their numbers."""
    config, mesh = load_golden("tiny").config, MeshShape(8, exchange="dispatch")
    layers = config.num_hidden_layers - config.first_k_dense_replace
    sent = collectives("tiny", mesh)
    assert set(sent) == {"all-to-all"}
    assert len(sent["all-to-all"]) <= 4 * layers
    rows, choices = f"f32[8,{TOKENS},{config.hidden_size}]", f"s32[8,{TOKENS},{2 * config.num_experts_per_tok}]"
    shapes = collections.Counter(shape for shape, _ in sent["all-to-all"])
    assert shapes[rows] == 2 * layers and shapes[choices] == layers and shapes.keys() <= {rows, choices, "s32[8]"}
    assert all("ffn" in scope for _, scope in sent["all-to-all"])


def test_a_gpu_sends_the_used_rows_alone():
    """Which XLA has no collective for on a CPU; see `test_exchange` for what the rows are."""
    traced = step.trace(*abstract_step("tiny", MeshShape(8, exchange="dispatch"), tokens=8))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    config = load_golden("tiny").config
    layers = config.num_hidden_layers - config.first_k_dense_replace
    assert text.count("@ragged_all_to_all") == 3 * layers
    assert text.count("stablehlo.all_to_all") == layers


def test_a_call_for_one_device_refuses_a_mesh():
    model, batch, cache, options = abstract_step("tiny", MeshShape(2))
    with pytest.raises(UserError, match="mesh ep=2: this call runs on one device"):
        tapped_step.lower(model, batch, cache, options, Taps())


def test_each_device_holds_its_own_experts():
    model, mesh = load_golden("tiny128_fp8"), MeshShape(4)
    experts = place(model, mesh).layers[-1].ffn.experts.gate
    for stored, whole in ((experts.values, model.layers[-1].ffn.experts.gate.values), (experts.scales, None)):
        assert [shard.index[0] for shard in stored.addressable_shards] == [slice(2 * i, 2 * i + 2) for i in range(4)]
        if whole is not None:
            np.testing.assert_array_equal(stored.addressable_shards[3].data, whole[6:])
