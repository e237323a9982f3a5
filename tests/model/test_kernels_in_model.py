"""The model's step, lowered for a GPU with the kernels in it."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dsv32_jax
from dsv32_jax.config import ModelConfig
from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.model import Batch, Options, abstract_model, step
from dsv32_jax.model.moe import MoE
from dsv32_jax.model.numerics import Numerics
from dsv32_jax.model.params import Init
from pallas_kernels import backend
from pallas_kernels.matmul import is_qtensor, quantize_weight

WIDTHS = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128}
"""What the kernels take."""
FP8 = Options("bfloat16", act_quant=True, cache_dtype="fp8")


def traced(config: ModelConfig, tokens: int, sequences: int, options: Options = FP8):
    """A step."""
    model = abstract_model(config)
    cache = jax.eval_shape(lambda: KVCache.create(config, 8, options))
    of_tokens = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    tables = jax.ShapeDtypeStruct((sequences, 4), jnp.int32)
    batch = Batch(*[of_tokens] * 4, tables, jax.ShapeDtypeStruct((sequences,), jnp.int32))
    return step.trace(model, batch, cache, options)


def kernels(layers: int, tokens: int, sequences: int) -> list[str]:
    """The hash of every kernel in the text of a step of so many layers."""
    program = traced(ModelConfig.tiny(num_hidden_layers=layers, **WIDTHS), tokens, sequences)
    text = program.lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r'@mosaic_gpu\w*\(.*?kernel_hash = "([^"]*)"', text)


@pytest.mark.parametrize(("tokens", "sequences"), [(70, 1), (3, 3)])
def test_all_layers_share_each_kernel(tokens, sequences, monkeypatch):
    """A kernel takes seconds to compile: a model of 61 layers must not hold 61 of each."""
    monkeypatch.setattr(backend, "on_hopper", lambda: True)
    few, many = kernels(2, tokens, sequences), kernels(3, tokens, sequences)
    assert len(few) >= 3  # cache_write, the selection's two, sparse_mla
    assert len(many) == len(few)


@pytest.mark.parametrize(("tokens", "sequences"), [(1, 1), (32, 32), (512, 32)])
@pytest.mark.parametrize("model", ["full width", "demo"])
def test_no_operator_runs_without_its_kernel(model, tokens, sequences, monkeypatch, caplog):
    """The choice is silent in results: a loop of XLA's in one operator makes a step several times as long."""
    demo = Path(dsv32_jax.__file__).parent / "demo" / "config.json"
    config = ModelConfig.from_hf(demo) if model == "demo" else ModelConfig.full_width(4)
    monkeypatch.setattr(backend, "on_hopper", lambda: True)
    backend.tell_of_reference.cache_clear()
    assert "mpmd_map" in str(traced(config, tokens, sequences).jaxpr)
    assert not [record for record in caplog.records if record.name == "pallas_kernels"]
    traced(config, tokens, sequences, Options("float32", act_quant=True, cache_dtype="fp8"))
    assert "sparse_mla runs without its kernel, which does not take queries of float32" in caplog.text


@pytest.mark.parametrize("tokens", [3, 600])
@pytest.mark.parametrize(
    ("hidden", "width", "schemes"),
    [
        (512, 512, (None, None, None)),
        (256, 128, ("fp8_block",) * 3),
        (256, 128, ("int8",) * 3),
        (512, 512, ("fp8_block", "int4", None)),
    ],
    ids=["plain", "narrow FP8", "narrow INT8", "mixed"],
)
def test_experts_of_every_width_have_kernels(hidden, width, schemes, tokens):
    """A named backend refuses what its kernels do not take: for these, tiles of fewer than 64 rows."""
    config = ModelConfig.tiny(hidden_size=hidden, moe_intermediate_size=width, quantization_config=None)

    def layer():
        moe = MoE(config, Init(config, nnx.Rngs(0)))
        for name, scheme in zip(("gate", "up", "down"), schemes, strict=True):
            if scheme:
                setattr(moe.experts, name, nnx.data(quantize_weight(getattr(moe.experts, name), scheme)))
        return moe

    moe = jax.eval_shape(layer)
    rows = jax.ShapeDtypeStruct((tokens, hidden), jnp.bfloat16)
    positions = jax.ShapeDtypeStruct((tokens,), jnp.int32)

    def experts(moe, x, positions):
        numerics = Numerics(act_quant=True, scale_fmt="ue8m0", backend="mosaic_gpu")
        return moe(x, positions, config, numerics)

    text = jax.jit(experts).trace(moe, rows, positions).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text and "stablehlo.while" not in text


@pytest.mark.interpret
def test_experts_by_kernels_equal_the_reference(capfd):
    """The whole layer: routing, plan, gather, the products of all experts and of the shared one, and the sum."""
    config = ModelConfig.tiny(hidden_size=512, moe_intermediate_size=512)
    moe = jax.jit(lambda: MoE(config, Init(config, nnx.Rngs(0))))()
    assert is_qtensor(moe.experts.gate)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, config.hidden_size)), jnp.bfloat16)
    positions = jnp.array([0, 1, -1])
    by = {}
    for name in ("interpret", "reference"):
        numerics = Numerics(act_quant=True, scale_fmt="ue8m0", backend=name)
        layer = jax.jit(lambda moe, x, numerics=numerics: moe(x, positions, config, numerics))
        by[name] = np.asarray(layer(moe, x), np.float32)
    assert np.isfinite(by["reference"]).all() and by["reference"][2].any()  # the shared expert alone
    error = by["interpret"] - by["reference"]
    assert np.sqrt((error**2).mean()) <= 1e-2 * np.sqrt((by["reference"] ** 2).mean())
    assert "RACE DETECTED" not in capfd.readouterr().out
