"""Edited and replaced weights: every call sees them, or refuses; and models without quantised weights."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dsv32_jax
from dsv32_jax.config import ModelConfig
from dsv32_jax.engine.engine import Engine
from dsv32_jax.engine.request import SamplingParams
from dsv32_jax.errors import UserError
from dsv32_jax.generate import memory
from dsv32_jax.generate import weights as parts
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.model import DeepseekV32, Options
from pallas_kernels.matmul import QTensor, quantize_weight
from tests.harness import EXACT, Piece, flat_batch, golden_directory, one_shape, tables_of

IDS = [5, 6, 7, 8]
Q_A = "layers.1.attn.q_a"


@pytest.fixture(scope="module", autouse=True)
def programs_for_all_lengths():
    with one_shape(16, 1):
        yield


@functools.cache
def weights() -> DeepseekV32:
    """FP8 weights large enough that logits differ."""
    config = ModelConfig.tiny(initializer_range=0.3, num_hidden_layers=2, first_k_dense_replace=1)
    return jax.jit(lambda: DeepseekV32(config, nnx.Rngs(0)))()


@pytest.fixture
def m() -> LanguageModel:
    """A model of its own for each test, of the same arrays."""
    model = jax.tree.unflatten(jax.tree.structure(weights()), jax.tree.leaves(weights()))
    return LanguageModel(model, model.config, options=EXACT)


def edit_head(m):
    m.model.head = jnp.zeros_like(m.model.head)


def edit_norm(m):
    m.model.layers[1].attn_norm = m.model.layers[1].attn_norm * 2


def edit_linear(m):
    attn = m.model.layers[0].attn
    attn.q_a = nnx.data(QTensor(attn.q_a.values, attn.q_a.scales * 2, attn.q_a.scheme))


def edit_experts(m):
    experts = m.model.layers[1].ffn.experts
    experts.gate = nnx.data(experts.gate.dequantize() * 3)


def exchange_layers(m):
    m.model.layers[1] = m.model.mtp.layer


def replace_the_model(m):
    m.model = jax.tree.map(lambda x: x * 2 if x.dtype == jnp.float32 else x, m.model)


def edit_behind_its_back(m):
    vars(m.model)["embed"] = m.model.embed * 3


EDITS = [
    edit_head,
    edit_norm,
    edit_linear,
    edit_experts,
    exchange_layers,
    replace_the_model,
    edit_behind_its_back,
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_an_edit_is_noticed(m, edit):
    """What steps are given is then what a model that nothing was kept for would give them, and before it was kept."""
    leaves, _ = m.flat_model()
    assert m.flat_model()[0] is leaves
    edit(m)
    now, structure = m.flat_model()
    expected, its_structure = jax.tree.flatten(m.model)
    assert structure == its_structure
    assert all(x is y for x, y in zip(now, expected, strict=True))
    assert not all(x is y for x, y in zip(now, leaves, strict=False))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda model: setattr(model, "head", nnx.Param(model.head)),
            "model.head: Param; must be a jax.Array of floats",
        ),
        (lambda model: setattr(model, "head", np.asarray(model.head, np.float32)), "model.head: ndarray; must be"),
        (lambda model: setattr(model, "head", model.head[:100]), r"model.head: bfloat16 \[100, 128\]; must be"),
        (lambda model: setattr(model, "norm", jnp.float32(2)), r"model.norm: float32 \[\]; must be"),
        (lambda model: setattr(model, "head", model.head.astype(jnp.int32)), "model.head: int32"),
        (lambda model: setattr(model, "head", None), "model.head: NoneType; must be"),
        (lambda model: model.layers.pop(), r"model.layers.1.*: NoneType; must be"),
        (lambda model: model.layers.append(model.layers[0]), r"model.layers.2.*; must be absent"),
    ],
)
def test_an_edit_that_no_step_computes_with_is_refused(m, tmp_path, edit, message):
    """What could change unseen, too: each call, and saving, says so."""
    edit(m.model)
    for call in (m.flat_model, lambda: m.trace(IDS), lambda: m.save(tmp_path / "out")):
        with pytest.raises(UserError, match=message):
            call()
    assert not (tmp_path / "out").exists()


def test_every_call_sees_an_edit(m):
    head, before = m.model.head, m.score(IDS).perplexity
    tokens = m.generate(IDS, 4, ignore_eos=True).tokens
    m.model.head = jnp.zeros_like(head)
    assert m.score(IDS).perplexity == pytest.approx(m.config.vocab_size) != before
    assert not m.logits(IDS).any() and not m.trace(IDS).logits.any()
    assert m.generate(IDS, 4, ignore_eos=True).tokens.tolist() == [[0] * 4]
    m.model.head = head
    assert m.score(IDS).perplexity == before
    np.testing.assert_array_equal(m.generate(IDS, 4, ignore_eos=True).tokens, tokens)


def test_an_engine_made_before_an_edit_refuses_to_go_on(m):
    """Its cache has what the old weights computed. With the weight or the options put back it goes on as if nothing
    had been."""
    engine = Engine(m, cache_tokens=64, max_sequences=1, max_tokens=8)
    request, head, options = engine.add(IDS, SamplingParams(3, ignore_eos=True)), m.model.head, m.options
    engine.step()
    for edit in (edit_head, exchange_layers, replace_the_model, lambda m: setattr(m, "options", Options(check=True))):
        layer, model = m.model.layers[1], m.model
        edit(m)
        for call in (engine.step, lambda: engine.add(IDS), lambda: engine.generate([IDS])):
            with pytest.raises(UserError, match=r"edited after this Engine was made.*with_parts"):
                call()
        m.model, m.options = model, options
        m.model.head, m.model.layers[1] = head, layer
    config, m.config = m.config, m.config.replace(max_position_embeddings=9)
    with pytest.raises(UserError, match="edited after this Engine"):
        engine.step()
    m.config = config
    while not request.finished:
        engine.step()
    np.testing.assert_array_equal(request.tokens, m.generate(IDS, 3, ignore_eos=True).tokens)
    other = m.with_parts(weights={"head": jnp.zeros_like(head)})
    (request,) = Engine(other, cache_tokens=64, max_sequences=1, max_tokens=8).generate([IDS], request.params)
    assert request.tokens.tolist() == [[0, 0, 0]]


def test_with_parts_is_another_model_that_shares_the_rest(m):
    before = m.score(IDS).perplexity
    wide = m.weights[Q_A].dequantize() * 2
    other = m.with_parts(weights={Q_A: wide, "head": np.asarray(m.weights["head"], np.float32) / 2})
    assert other.model.embed is m.model.embed and other.options == m.options
    np.testing.assert_array_equal(other.weights[Q_A], wide)
    assert m.score(IDS).perplexity == before != other.score(IDS).perplexity
    edit = LanguageModel(other.model, m.config, options=EXACT)
    np.testing.assert_array_equal(other.logits(IDS), edit.logits(IDS))
    back = other.with_parts(weights={Q_A: m.weights[Q_A], "head": m.weights["head"]})
    assert back.score(IDS).perplexity == before


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"layers.1.atn.q_a": 0}, r"weights 'layers.1.atn.q_a': the model has no parameter.*mean layers.1.attn.q_a"),
        ({"nothing like it": 0}, "weights 'nothing like it': the model has no parameter of that path$"),
        ({f"{Q_A}.values": 0}, "the model has no parameter of that path; did you mean layers.1.attn.q_a"),
        ({"norm": 1.0}, r"weights 'norm': float; must be an array \[128\]"),
        ({"norm": [1.0] * 128}, "weights 'norm': list; must be an array"),
        ({"norm": jnp.ones(127)}, r"weights 'norm': \[127\]; must be \[128\]"),
        ({"norm": jnp.ones(128, jnp.int32)}, "weights 'norm': int32; must be one of float32, bfloat16, float16"),
        ({"norm": np.ones(128)}, "weights 'norm': float64"),
        ({Q_A: jnp.ones((32, 64), jnp.float8_e4m3fn)}, "float8_e4m3fn; must be one of"),
        ({"embed": quantize_weight(jnp.ones((512, 64)))}, "weights 'embed': a QTensor; only linears"),
        ({5: jnp.ones(128)}, "weights: 5; must be a path"),
        (
            {Q_A: QTensor(jnp.ones((64, 128)), jnp.ones((1, 1)))},
            r"values float32 \[64, 128\]; in fp8_block they must be",
        ),
        ({Q_A: QTensor(jnp.ones((64, 128), jnp.float8_e4m3fn), jnp.ones(1))}, r"scales float32 \[1\]; in fp8_block"),
        ({"layers.1.ffn.router_bias": jnp.full(8, jnp.nan)}, "router_bias': has a value that is NaN or infinite"),
        ({"layers.0.attn.indexer.k_norm_bias": jnp.full(128, jnp.inf)}, "k_norm_bias': has a value that is NaN"),
    ],
)
def test_refused_parts(m, replaced, message):
    with pytest.raises(UserError, match=message):
        m.with_parts(weights=replaced)


@pytest.mark.parametrize("dtype", parts.DEQUANTIZED)
def test_dequantized(m, dtype):
    """The same logits as FP8 weights with unquantised inputs, in either dtype: their scales are powers of two."""
    other = m.dequantized(dtype)
    assert not any(isinstance(leaf, QTensor) for leaf in other.weights.values())
    assert {str(other.weights[path].dtype) for path, leaf in m.weights.items() if isinstance(leaf, QTensor)} == {dtype}
    assert other.model.embed is m.model.embed and isinstance(m.weights[Q_A], QTensor)
    np.testing.assert_array_equal(other.weights[Q_A], m.weights[Q_A].dequantize())
    assert other.config.quantization_config is other.model.config.quantization_config is None
    if dtype == "float32":
        np.testing.assert_allclose(other.logits(IDS), m.logits(IDS), atol=1e-4)
    m.options = dataclasses.replace(EXACT, act_quant=True)
    assert m.dequantized(dtype).options == EXACT


def test_dequantized_refuses_what_does_not_fit(m, monkeypatch):
    quantized = sum(leaf.values.size for leaf in m.weights.values() if isinstance(leaf, QTensor))
    for free, dtype in ((4 * quantized - 1, "float32"), (2 * quantized - 1, "bfloat16")):
        monkeypatch.setattr(memory, "available_bytes", lambda free=free: (free, "here"))
        with pytest.raises(UserError, match=f"dequantize: the weights in {dtype} take .* here has .* free"):
            m.dequantized(dtype)
        m.dequantized(dtype, memory_check=False)
        monkeypatch.setattr(memory, "available_bytes", lambda free=free: (free + 1, "here"))
        m.dequantized(dtype)
    with pytest.raises(UserError, match="dequantize: 'int8' is unknown; it is one of float32, bfloat16"):
        m.dequantized("int8")


def test_load_dequantizes_as_it_reads(monkeypatch):
    directory = golden_directory("tiny128_fp8") / "model"
    quantised, loaded = dsv32_jax.load(directory), dsv32_jax.load(directory, dequantize="float32")
    assert quantised.options.act_quant and not loaded.options.act_quant and loaded.config.quantization_config is None
    for path, leaf in loaded.weights.items():
        present = quantised.weights[path]
        np.testing.assert_array_equal(leaf, present.dequantize() if isinstance(present, QTensor) else present)
    needed = sum(leaf.nbytes for leaf in loaded.weights.values())
    monkeypatch.setattr(memory, "available_bytes", lambda: (needed - 1, "here"))
    with pytest.raises(UserError, match="its weights in float32 take"):
        dsv32_jax.load(directory, dequantize="float32")
    narrower = dsv32_jax.load(directory, dequantize="bfloat16", act_quant=True)
    assert narrower.options.act_quant
    assert {str(leaf.dtype) for leaf in narrower.weights.values()} == {"bfloat16", "float32"}
    with pytest.raises(UserError, match="dequantize: 'fp8' is unknown"):
        dsv32_jax.load(directory, dequantize="fp8")


def loss_of(model: DeepseekV32, options: Options) -> jax.Array:
    cache = KVCache.create(model.config, 1, options)
    logits, _ = model(flat_batch([Piece(IDS)], tables_of(1, 1)), cache, options)
    return -jax.nn.log_softmax(logits[:-1])[jnp.arange(3), jnp.asarray(IDS[1:])].mean()


def test_gradients_that_would_be_zero_are_refused(m):
    """Of every parameter, of one, and of what comes before quantised activations; the others have one."""
    norm = "layers.0.attn_norm"

    def gradient(path, options):
        return jax.eval_shape(
            jax.grad(lambda leaf: loss_of(parts.with_weights(m.model, {path: leaf}), options)), m.weights[path]
        )

    quantising = dataclasses.replace(EXACT, act_quant=True)
    for options in (EXACT, quantising):
        with pytest.raises(NotImplementedError, match=r"quantised weight has no gradient.*dequantize='float32'"):
            gradient(Q_A, options)
    with pytest.raises(NotImplementedError, match="quantised weight has no gradient"):
        jax.eval_shape(lambda model: jax.grad(loss_of)(model, EXACT), m.model)
    with pytest.raises(NotImplementedError, match=r"rounding activations has no gradient.*act_quant=False"):
        gradient(norm, quantising)
    assert gradient(norm, EXACT).shape == m.weights[norm].shape
    every = jax.jit(lambda model: jax.grad(loss_of)(model, EXACT))(m.dequantized().model)
    assert np.abs(every.layers[1].attn.q_a).max() > 0 and np.abs(every.layers[0].attn_norm).max() > 0


def test_a_step_whose_logits_are_not_finite_says_so(m):
    for value in (jnp.nan, jnp.inf):
        spoilt = m.with_parts(weights={"norm": m.weights["norm"].at[3].set(value)})
        with pytest.raises(UserError, match="prompt 0, position 0: the logits are not finite"):
            spoilt.score(IDS)
        with pytest.raises(UserError, match="prompt 0, position 3: the logits are not finite"):
            spoilt.generate(IDS, 3)
    assert memory.describe(spoilt.model) == memory.describe(m.model)


def test_save_and_load_are_inverse(m, tmp_path):
    """With a plain linear among those in FP8, in two schemes, and without any."""
    int8 = m.with_parts(weights={Q_A: quantize_weight(m.weights[Q_A].dequantize(), "int8")})
    plain = m.with_parts(weights={Q_A: m.weights[Q_A].dequantize()})
    for name, one in {"fp8": plain, "int8": int8, "float32": m.dequantized()}.items():
        one.generation_config = {"do_sample": True, "temperature": 0.5}
        one.save(tmp_path / name)
        back = dsv32_jax.load(tmp_path / name)
        assert back.generation_config == one.generation_config
        chex.assert_trees_all_equal(dict(one.weights), dict(back.weights), custom_message=name)
    with pytest.raises(UserError, match="fp8"):
        m.save(tmp_path / "fp8")
