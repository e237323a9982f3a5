"""The whole model over eight GPUs, lowered for them with all kernels from abstract arrays: no GPU and no memory."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from dsv32_jax.config import ModelConfig
from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.mesh import MeshShape
from dsv32_jax.model.model import Batch, Options, abstract_model, step
from dsv32_jax.model.prepared import prepared
from dsv32_jax.model.sharding import bytes_per_device, with_shardings

MESH = MeshShape(8)
OPTIONS = Options("bfloat16", act_quant=True, backend="mosaic_gpu", cache_dtype="fp8", mesh=MESH)
COLLECTIVE = re.compile(
    r"stablehlo\.(all_gather|reduce_scatter|all_reduce|all_to_all|collective_permute)|@(ragged_all_to_all)"
)


def integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def lowered(layers: int, tokens: int, sequences: int, blocks: int) -> tuple[str, int]:
    """The text of a step of so many tokens and sequences on each device, and a device's bytes of parameters."""
    config = dataclasses.replace(ModelConfig.deepseek_v32(), num_hidden_layers=layers, num_nextn_predict_layers=0)
    model = jax.eval_shape(lambda model: prepared(model, OPTIONS), abstract_model(config))
    t, s = MESH.size * tokens, MESH.size * sequences
    batch = Batch(integers(t), integers(t), integers(t), integers(t), integers(s, blocks), integers(s))
    cache = KVCache.shapes(config, s * blocks, "fp8", fp8_index=True)
    traced = step.trace(*(with_shardings(one, MESH) for one in (model, batch, cache)), OPTIONS)
    return traced.lower(lowering_platforms=("cuda",)).as_text(), bytes_per_device(model, MESH)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "sequences", "blocks", "expected"),
    [
        (128, 128, 128, {"all_gather": 58 + 1, "reduce_scatter": 58}),
        (4096, 1, 512, {"ragged_all_to_all": 3 * 58, "all_to_all": 58}),
    ],
    ids=["decode", "prefill"],
)
def test_the_whole_model_lowers_for_eight_gpus(tokens, sequences, blocks, expected):
    text, parameters = lowered(61, tokens, sequences, blocks)
    found = [collective or ragged for collective, ragged in COLLECTIVE.findall(text)]
    assert {name: found.count(name) for name in set(found)} == expected
    assert parameters <= 103e9
    assert "mosaic_gpu" in text and "stablehlo.while" not in text
