"""Random weights in any scheme, and what a step is said to read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.config import ModelConfig
from dsv32_jax.convert.calibration import is_linear
from dsv32_jax.convert.quantization import uniform
from dsv32_jax.experiments.studies.quantization_speed import (
    FORMS,
    Run,
    experts_used,
    full_sizes,
    layer_call,
    layer_in,
    layers_for,
    model_in,
    step_bytes,
    weight_bytes,
)
from dsv32_jax.experiments.workbench.random_model import random_model, random_parameters, random_weight, stored
from dsv32_jax.model.model import abstract_model
from dsv32_jax.model.numerics import Numerics
from dsv32_jax.model.params import named_parameters
from pallas_kernels.matmul import dense, scheme_name

CONFIG = ModelConfig.tiny(num_nextn_predict_layers=0)


@pytest.mark.parametrize("scheme", ["bf16", "fp8_block", "int8", "int4"])
def test_random_weights_are_as_quantised_ones_and_of_their_size(scheme):
    shape, size = (3, 192, 256), 0.02
    abstract = stored(shape, scheme)
    weight = random_weight(jax.random.key(0), abstract, size)
    assert scheme_name(weight) == (None if scheme == "bf16" else scheme)
    forms, expected = (jax.tree.map(lambda x: (x.shape, x.dtype), leaf) for leaf in (weight, abstract))
    assert forms == expected
    values = np.asarray(jax.jit(lambda weight: dense(weight, jnp.float32))(weight))
    assert values.shape == shape and np.isfinite(values).all()
    assert abs(values.std() / size - 1) < 0.05 and abs(values.mean()) < 0.2 * size
    assert not np.array_equal(values[0], values[1])


def test_a_model_whose_linears_all_have_their_scheme():
    abstract = abstract_model(CONFIG)
    lm = random_model(CONFIG, schemes={path: FORMS["mixed"].scheme(path) for path in uniform(abstract, "int8")})
    for path, leaf in named_parameters(lm.model).items():
        assert leaf.shape == named_parameters(abstract)[path].shape
        expected = ("int4" if "experts." in path else "int8") if is_linear(path) else None
        assert scheme_name(leaf) == expected, path
    logits = lm.logits([[1, 2, 3]])
    assert np.isfinite(logits).all() and logits.std() > 0


def test_a_path_that_is_none():
    with pytest.raises(KeyError, match=r"layers\.9"):
        random_model(CONFIG, schemes={"layers.9.attn.q_a": "int8"})


def test_all_linears_of_a_layer_alone():
    quantised = {path for path, leaf in named_parameters(layer_in(CONFIG, FORMS["int8"])).items() if scheme_name(leaf)}
    assert quantised == {f"{part}.{side}" for part in ("experts", "shared") for side in ("gate", "up", "down")}


def test_bytes_of_a_step_by_hand():
    """Two layers, one of them with experts, of which 5 are in use; 3 sequences of 128 tokens."""
    sizes = step_bytes(model_in(CONFIG, FORMS["mixed"]), [5], sequences=3, context=128)
    expert = 3 * (128 * 128 // 2 + 4 * 128)  # gate, up, down: packed values, and a word for each row
    assert sizes["experts"] == 5 * expert

    def int8(rows, columns):
        return rows * columns + 4 * rows

    indexer = int8(2 * 128, 128) + int8(128, 128) + 2 * 4 * 128 + 2 * 2 * 128  # with its norm and head weights
    attention = int8(128, 128) + int8(2 * 128, 128) + int8(192, 128) + int8(2 * 128, 128) + int8(128, 2 * 64)
    layer = attention + 2 * 4 * 128 + indexer + 2 * 4 * 128  # with norms: of queries and keys, and both of the layer
    mlp = 2 * int8(256, 128) + int8(128, 256)
    shared = 3 * int8(128, 128)
    router = 2 * 8 * 128 + 4 * 8
    ends = 3 * 2 * 128 + 4 * 128 + 2 * 512 * 128  # rows of the embedding, norm, head
    assert sizes["others"] == 2 * layer + mlp + shared + router + ends
    assert sizes["latents"] == 2 * 3 * 16 * (128 + 4 + 2 * 64)
    assert sizes["index"] == 2 * 3 * 128 * (128 + 4)


def test_each_layer_counts_its_own_experts():
    config = ModelConfig.tiny(num_hidden_layers=12, first_k_dense_replace=1, num_nextn_predict_layers=0)
    model, used = model_in(config, FORMS["bf16"]), [1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2]
    assert weight_bytes(model, used)["experts"] == sum(used) * 3 * 2 * 128 * 128
    with pytest.raises(ValueError):
        weight_bytes(model, used[1:])


def test_experts_that_some_token_chose():
    assert experts_used(jnp.array([[[1, 2], [2, 3]], [[7, 0], [7, 0]]])) == [3, 2]


def test_a_layer_call_also_gives_its_choices():
    layer = random_parameters(layer_in(CONFIG, FORMS["bf16"]), 0.1)
    leaves, structure = jax.tree.flatten(layer)
    x = jax.random.normal(jax.random.key(1), (5, CONFIG.hidden_size), jnp.bfloat16)
    out, chosen = jax.jit(layer_call(structure, CONFIG, "reference"))(leaves, x)
    numerics = Numerics(act_quant=True, scale_fmt="ue8m0", backend="reference")
    positions = jnp.arange(5)
    expected = jax.jit(lambda moe, x: moe(x, positions, CONFIG, numerics))(layer, x)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(chosen, layer.route(x, positions, CONFIG, numerics)[0][None])


def test_fewer_layers_where_bfloat16_does_not_fit():
    assert [layers_for(free) for free in (40e9, 62e9, 80e9)] == [4, 5, 5]
    assert full_sizes(5).config.first_k_dense_replace == 3


def test_a_failure_is_recorded_and_the_next_row_compared(tmp_path):
    run = Run(None, "auto", tmp_path / "x.json", {"rows": []}, None, {}, 0.0, 0.0)  # type: ignore[arg-type]
    for form, seconds in (("bf16", 4.0), ("int8", None), ("int4", 1.0)):
        with run.row("layer", form, {"tokens": 1}) as row:
            if seconds is None:
                raise MemoryError("too much")
            row |= {"seconds": {"median": seconds}, "backend": "reference"}
    assert [row.get("times_bf16") for row in run.content["rows"]] == [1, None, 4]
    assert run.content["rows"][1]["error"] == "MemoryError: too much" and run.out.exists()
