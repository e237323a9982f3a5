"""Weights, scales and statistics that are no numbers are named, by whatever computes with them."""

import dataclasses
import os
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv32_jax import convert
from dsv32_jax.convert import calibration, conversion
from dsv32_jax.convert.calibration import calibrate
from dsv32_jax.convert.finite import CHUNK, first_not_finite
from dsv32_jax.convert.migration import migrate
from dsv32_jax.convert.quantization import quantize_checkpoint, quantize_model, uniform
from dsv32_jax.convert.rounding import round_int4, round_int8
from dsv32_jax.convert.statistics import Statistics
from dsv32_jax.errors import UserError
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.model.params import named_parameters, replace_parameters
from tests.convert.test_conversion import spoil
from tests.harness import golden_directory, load_golden

NAN = float("nan")
EMBED = "model.embed_tokens.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
OUT = "model.layers.0.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def model():
    return load_golden("tiny128_fp8")


@pytest.fixture(scope="module")
def integers(model, tmp_path_factory):
    """A checkpoint with a linear in INT8 and one in INT4."""
    target = tmp_path_factory.mktemp("integers") / "in"
    source = golden_directory("tiny128_fp8") / "model"
    quantize_checkpoint(source, target, {"layers.0.attn.o": "int8", "layers.1.ffn.experts.up": "int4"})
    return target


def put(name, value):
    """A change of one value of a tensor, by `spoil`; an integer is the bits of it."""

    def change(by_name):
        if name not in by_name:
            return False
        array = np.array(by_name[name])
        array.view(np.uint8 if isinstance(value, int) else array.dtype).reshape(-1)[-1] = value
        by_name[name] = array

    return change


def spoilt(model, path, at, value):
    """The model with one value of a plain parameter replaced."""
    parameters = named_parameters(model)
    parameters[path] = jnp.asarray(parameters[path]).at[at].set(value)
    return replace_parameters(model, parameters)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (EMBED, NAN),
        (EMBED, -np.inf),
        ("model.layers.2.input_layernorm.weight", np.inf),
        ("model.layers.1.mlp.gate.e_score_correction_bias", NAN),
        (OUT, 0x7F),
        (EXPERT, 0xFF),
        (EXPERT + "_scale_inv", NAN),
        (OUT + "_scale_inv", np.inf),
        (OUT + "_scale_inv", 0.0),
        (OUT + "_scale_inv", -1.0),
    ],
)
def test_a_conversion_names_the_tensor(golden, tmp_path, name, value):
    """Whether it computes with the values or only copies them; nothing is left."""
    source = shutil.copytree(golden("tiny128_fp8/model"), tmp_path / "in")
    spoil(source, put(name, value))
    for write in (
        lambda target: convert.convert(source, target, dtype="bf16"),
        lambda target: convert.convert(source, target, to="hf"),
        lambda target: quantize_checkpoint(source, target, {"layers.0.attn.o": "int4", "layers.0.attn.q_a": "int8"}),
    ):
        with pytest.raises(UserError, match=rf"^{name} \("):
            write(tmp_path / "out")
        assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("value", [NAN, np.inf, 0.0, -1.0])
@pytest.mark.parametrize("name", [OUT + "_scale", EXPERT + "_scale"])
def test_scales_of_integers_are_looked_at(integers, tmp_path, name, value):
    source = shutil.copytree(integers, tmp_path / "in")
    spoil(source, put(name, value))
    with pytest.raises(UserError, match=rf"^{name} \("):
        convert.convert(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.2.self_attn.indexer.wq_b.weight_scale_inv", NAN),
        ("model.layers.2.self_attn.indexer.wk.weight", 0x7F),
        ("model.layers.1.self_attn.indexer.k_norm.bias", np.inf),
        ("model.layers.1.mlp.gate.weight", NAN),
        ("model.layers.1.mlp.gate.e_score_correction_bias", NAN),
        (OUT + "_scale_inv", -1.0),
        (EXPERT + "_scale_inv", NAN),
    ],
)
def test_what_would_not_show_in_the_logits_is_not_loaded(golden, tmp_path, name, value):
    """What only chooses keys or experts chooses others then; a scale below 0 is another model."""
    source = shutil.copytree(golden("tiny128_fp8/model"), tmp_path / "in")
    spoil(source, put(name, value))
    with pytest.raises(UserError, match=rf"^{name} \("):
        convert.load_hf(source)


def test_an_orbax_checkpoint_is_looked_at(model, golden, tmp_path, monkeypatch):
    source = shutil.copytree(golden("tiny128_fp8/model"), tmp_path / "in")
    spoil(source, put(EXPERT + "_scale_inv", NAN))
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "check_finite", lambda *_: None)
        convert.convert(source, tmp_path / "orbax")
    with pytest.raises(UserError, match=rf"^{EXPERT}_scale_inv \(layers.1.ffn.experts.up\) is nan at \[0, 1\]"):
        convert.convert(tmp_path / "orbax", tmp_path / "out")
    with pytest.raises(UserError, match=EXPERT):
        convert.export_model(convert.load_orbax(tmp_path / "orbax"), tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["in", "orbax"]


def test_what_overflows_on_the_way_is_named(golden, tmp_path):
    """448 times a finite scale."""
    source = shutil.copytree(golden("tiny128_fp8/model"), tmp_path / "in")
    spoil(source, put(OUT + "_scale_inv", 3e38))
    spoil(source, put(OUT, 0x7E))
    with pytest.raises(UserError, match=rf"^{OUT} \(layers.0.attn.o\) is inf"):
        convert.convert(source, tmp_path / "out", dtype="bf16")
    convert.convert(source, tmp_path / "out", to="hf")


@pytest.mark.parametrize("value", [NAN, np.inf])
@pytest.mark.parametrize("path", ["embed", "layers.1.ffn_norm"])
def test_a_model_in_memory_is_looked_at(model, path, value):
    bad = spoilt(model, path, -1, value)
    name = {"embed": EMBED, "layers.1.ffn_norm": "model.layers.1.post_attention_layernorm.weight"}[path]
    for call in (
        lambda: quantize_model(bad, uniform(bad, "int8")),
        lambda: calibrate(LanguageModel(bad, bad.config), [[1, 2, 3]]),
        lambda: migrate(bad, {}),
    ):
        with pytest.raises(UserError, match=rf"^{name} \({path}\) is {value}"):
            call()


@pytest.mark.parametrize("field", ["rows", "largest", "moments"])
def test_statistics_are_looked_at(model, golden, tmp_path, field):
    path = "layers.0.attn.o"
    width = model.layers[0].attn.o.shape[1]
    good = Statistics(jnp.float32(9), jnp.ones(width), jnp.eye(width), jnp.zeros(65))
    bad = {path: dataclasses.replace(good, **{field: getattr(good, field).at[...].set(NAN)})}
    for call in (
        lambda: quantize_model(model, {path: "int4"}, bad),
        lambda: quantize_checkpoint(golden("tiny128_fp8/model"), tmp_path / "out", {path: "int4"}, statistics=bad),
        lambda: migrate(model, bad),
    ):
        with pytest.raises(UserError, match=rf"^{path}: .*{field}"):
            call()
    assert not os.listdir(tmp_path)


def test_inputs_that_overflow_are_named(model, monkeypatch):
    """Finite weights whose products are not."""
    overflown = Statistics(jnp.float32(3), jnp.ones(4), jnp.eye(4) / 0, jnp.zeros(65))
    monkeypatch.setattr(calibration, "_summed", lambda *_: {"layers.1.attn.q_a": overflown})
    with pytest.raises(UserError, match=r"^layers\.1\.attn\.q_a: the statistics of its inputs"):
        calibrate(LanguageModel(model, model.config), [[1, 2, 3]])


@pytest.mark.parametrize("rounded", [round_int4, round_int8])
@pytest.mark.parametrize("ranges", ["mse", "percentile"])
@pytest.mark.parametrize("value", [NAN, np.inf])
def test_rounding_makes_no_number_of_it(rounded, ranges, value):
    weight, moments = np.ones((2, 128), np.float32), np.eye(128, dtype=np.float32)
    for name in ("weight", "moments"):
        bad = {"weight": weight.copy(), "moments": moments.copy()}
        bad[name][1, 1] = value
        with pytest.raises(UserError, match=rf"^{name}: "):
            rounded(**{key: jnp.asarray(array) for key, array in bad.items()}, ranges=ranges)


def test_moments_that_are_none_are_refused():
    with pytest.raises(UserError, match="positive semidefinite"):
        round_int4(jnp.ones((2, 128)), jnp.eye(128).at[0, 1].set(-90).at[1, 0].set(-90))


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16, np.float16, np.float32])
def test_every_bit_pattern(dtype):
    """Against NumPy's own answer; in the second piece of a long array too."""
    size = np.dtype(dtype).itemsize
    bits = np.arange(2 ** (8 * min(size, 2)), dtype=np.uint8 if size == 1 else np.uint16)
    values = bits.view(dtype) if size < 4 else (bits.astype(np.uint32) << 16).view(dtype)
    finite = np.isfinite(values.astype(np.float32))
    for value, expected in zip(values[:: 1 if size == 1 else 37], finite[:: 1 if size == 1 else 37], strict=True):
        assert (first_not_finite(value.reshape(1)) is None) == expected
    long = np.zeros(2 * CHUNK, dtype)
    long[-2] = NAN
    assert first_not_finite(long) == 2 * CHUNK - 2 and first_not_finite(long[:-2]) is None
