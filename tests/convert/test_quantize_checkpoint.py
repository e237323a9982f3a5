"""Checkpoints in other schemes: what is written is what is read, and under another config nothing is."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv32_jax import cli, convert
from dsv32_jax.config import ModelConfig
from dsv32_jax.convert import conversion, quantization
from dsv32_jax.convert.calibration import calibrate, windows_of
from dsv32_jax.convert.migration import migrate
from dsv32_jax.convert.quantization import PROVENANCE, UNQUANTISED, mixed, quantize_checkpoint, quantize_model, uniform
from dsv32_jax.convert.statistics import Statistics
from dsv32_jax.convert.stored import from_words, hf_tensors, in_words
from dsv32_jax.errors import UserError
from dsv32_jax.generate import loading
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.memory import parameter_counts
from dsv32_jax.model.model import DeepseekV32
from dsv32_jax.model.params import named_parameters
from pallas_kernels.matmul import QTensor, scheme_name
from tests.convert.test_conversion import arrays, equal_models, tensors
from tests.harness import EXACT, golden_directory


@pytest.fixture(scope="module")
def source():
    return golden_directory("tiny128_fp8") / "model"


@pytest.fixture(scope="module")
def model(source):
    return convert.load_hf(source)


def some_of_each(model) -> dict[str, str]:
    """Every scheme within one family, plain ones too."""
    names = ("int8", "int4", "fp8_block", UNQUANTISED)
    return {path: names[number % 4] for number, path in enumerate(sorted(uniform(model, "int8")))}


SCHEMES = {
    "int8": lambda model: uniform(model, "int8"),
    "int4": lambda model: uniform(model, "int4"),
    "mixed": mixed,
    "some of each": some_of_each,
    "one": lambda model: {"layers.1.attn.o": "int4"},
}


@pytest.fixture(scope="module")
def written(source, model, tmp_path_factory):
    """Directories of both layouts by scheme, written once."""
    directories = {}

    def directory(name, to="hf"):
        if (name, to) not in directories:
            directories[name, to] = tmp_path_factory.mktemp("quantised") / to
            quantize_checkpoint(source, directories[name, to], SCHEMES[name](model), to=to)
        return directories[name, to]

    return directory


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_written_is_what_is_read(name, model, written, tmp_path):
    """Both layouts, and from one to the other and back."""
    expected = quantize_model(model, SCHEMES[name](model))
    directory = written(name)
    loaded = convert.load_hf(directory)
    assert equal_models(loaded, expected)
    schemes = {path: scheme_name(leaf) for path, leaf in named_parameters(loaded).items()}
    assert schemes == {path: scheme_name(leaf) for path, leaf in named_parameters(expected).items()}
    convert.convert(directory, tmp_path / "orbax")
    assert equal_models(convert.load_orbax(tmp_path / "orbax"), expected)
    convert.convert(tmp_path / "orbax", tmp_path / "back", to="hf")
    assert tensors(tmp_path / "back") == tensors(directory)
    specs = hf_tensors(ModelConfig.from_hf(directory))
    assert {name: spec.shape for name, spec in specs.items()} == {
        name: shape for name, (_, _, shape, _) in tensors(directory).items()
    }


def test_straight_to_orbax(model, written):
    expected = quantize_model(model, some_of_each(model))
    assert equal_models(convert.load_orbax(written("some of each", "orbax")), expected)


def test_logits_are_the_same_bit_for_bit(model, written):
    ids = [[5, 9, 300, 41, 7, 8]]
    logits = [
        LanguageModel(each, each.config, options=EXACT).logits(ids)
        for each in (quantize_model(model, mixed(model)), convert.load_hf(written("mixed")))
    ]
    np.testing.assert_array_equal(*logits)


def test_all_in_fp8_is_the_released_form(model, written, source, tmp_path):
    """From FP8 to FP8 nothing changes; from INT8 it is quantised anew."""
    quantize_checkpoint(source, tmp_path / "same", uniform(model, "fp8_block"))
    assert tensors(tmp_path / "same") == tensors(source)
    quantize_checkpoint(written("int8"), tmp_path / "anew", uniform(model, "fp8_block"))
    config = ModelConfig.from_hf(tmp_path / "anew")
    assert config.quantization_config == ModelConfig.from_hf(source).quantization_config
    expected = quantize_model(quantize_model(model, uniform(model, "int8")), uniform(model, "fp8_block"))
    assert equal_models(convert.load_hf(tmp_path / "anew"), expected)


def test_back_to_bfloat16(model, written, tmp_path):
    convert.convert(written("some of each"), tmp_path / "plain", to="hf", dtype="bf16")
    loaded = named_parameters(convert.load_hf(tmp_path / "plain"))
    for path, leaf in named_parameters(quantize_model(model, some_of_each(model))).items():
        if isinstance(leaf, QTensor):
            np.testing.assert_array_equal(
                *(np.asarray(x, np.float32) for x in (leaf.dequantize("bfloat16"), loaded[path]))
            )


def test_a_model_in_memory_is_exported_as_it_is(model, tmp_path):
    quantised = quantize_model(model, some_of_each(model))
    convert.export_model(quantised, tmp_path / "out")
    assert equal_models(convert.load_hf(tmp_path / "out"), quantised)


def test_statistics_decide_the_rounding(model, source, tmp_path):
    """The same as in memory, for a weight and for each of stacked ones."""
    rng, moments = np.random.default_rng(0), {}
    paths = ("layers.0.attn.o", "layers.1.ffn.experts.down")
    for path in paths:
        *lead, _, depth = named_parameters(model)[path].shape
        x = rng.standard_normal((*lead, 2 * depth, depth)).astype(np.float32) * rng.uniform(0.1, 9, depth)
        moments[path] = jnp.asarray(x.swapaxes(-1, -2) @ x, jnp.float32)
    statistics = {
        path: Statistics(*(jnp.zeros(m.shape[:-2]),) * 2, m, jnp.zeros(m.shape[:-2])) for path, m in moments.items()
    }
    schemes = dict(zip(paths, ("int8", "int4"), strict=True))
    quantize_checkpoint(source, tmp_path / "out", schemes, statistics=statistics)
    assert equal_models(convert.load_hf(tmp_path / "out"), quantize_model(model, schemes, statistics))
    assert not equal_models(convert.load_hf(tmp_path / "out"), quantize_model(model, schemes))


def test_four_bits_lie_as_compressed_tensors_has_them():
    """Element i of a row in bits 4 i and up of the row's int32s, zero as 8 below the middle of the unsigned range."""
    numbers = np.random.default_rng(0).integers(0, 16, (3, 128)).astype(np.uint8)
    words = in_words(numbers)
    assert words.dtype == np.int32 and words.shape == (3, 16)
    for row, row_words in zip(numbers, words, strict=True):
        whole = sum(int(word) % 2**32 << (32 * at) for at, word in enumerate(row_words.tolist()))
        assert [(whole >> (4 * i)) & 15 for i in range(128)] == row.tolist()
    np.testing.assert_array_equal(from_words(words), numbers)


def test_a_four_bit_weight_from_its_files_alone(model, written):
    """Scale times (value - zero), as the format says, is the weight that the model computes with."""
    name = "model.layers.1.self_attn.o_proj.weight"
    by_name = {key: array for path in written("one").glob("*.safetensors") for key, array in arrays(path).items()}
    rows, depth = by_name[f"{name}_shape"].tolist()
    values = from_words(by_name[f"{name}_packed"]).astype(np.int32) - 8
    zeros = from_words(np.ascontiguousarray(by_name[f"{name}_zero_point"].T)).T[:rows].astype(np.int32) - 8
    steps = by_name[f"{name}_scale"].astype(np.float32)
    weight = ((values.reshape(rows, -1, 128) - zeros[..., None]) * steps[..., None]).reshape(rows, depth)
    expected = quantize_model(model, {"layers.1.attn.o": "int4"}).layers[1].attn.o
    np.testing.assert_array_equal(weight, np.asarray(expected.dequantize()))


def test_another_config_is_refused(model, written, source, tmp_path):
    """Of the source, of another scheme, and the quantised one for the source's weights: in both layouts."""
    source_config, int4_config = (json.loads((path / "config.json").read_text()) for path in (source, written("int4")))
    plain = {name: value for name, value in source_config.items() if name != "quantization_config"}
    for to, load in (("hf", convert.load_hf), ("orbax", convert.load_orbax)):
        for number, config in enumerate((source_config, int4_config, plain)):
            spoilt = shutil.copytree(written("int8", to), tmp_path / f"{to}{number}")
            (spoilt / "config.json").write_text(json.dumps(config))
            with pytest.raises(UserError, match=r"does not fit its config\.json") as caught:
                load(spoilt)
            assert "int8" in str(caught.value) or "weight" in str(caught.value)
    spoilt = shutil.copytree(source, tmp_path / "source")
    (spoilt / "config.json").write_text(json.dumps(int4_config))
    with pytest.raises(UserError, match=r"missing .*weight_packed"):
        convert.load_hf(spoilt)


def test_an_interrupted_run_leaves_nothing_that_loads_and_goes_on(model, source, tmp_path, monkeypatch):
    original, quantised_paths = quantization._in_scheme, []

    def interrupted(path, *rest):
        quantised_paths.append(path)
        if path.startswith("layers.2.ffn"):
            raise KeyboardInterrupt
        return original(path, *rest)

    target = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(quantization, "_in_scheme", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(source, target, mixed(model))
    assert not target.exists()
    with pytest.raises(UserError, match="unfinished conversion"):
        convert.load_hf(tmp_path / "out.partial")
    first = set(quantised_paths)
    quantised_paths.clear()
    monkeypatch.setattr(
        quantization, "_in_scheme", lambda path, *rest: quantised_paths.append(path) or original(path, *rest)
    )
    quantize_checkpoint(source, target, mixed(model))
    assert "layers.0.attn.q_a" in first - set(quantised_paths) and "layers.2.ffn.experts.gate" in quantised_paths
    assert equal_models(convert.load_hf(target), quantize_model(model, mixed(model)))


def test_what_asks_for_something_else_starts_anew(model, source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "copy_files", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize_checkpoint(source, tmp_path / "out", uniform(model, "int8"))
    quantize_checkpoint(source, tmp_path / "out", uniform(model, "int4"))
    assert equal_models(convert.load_hf(tmp_path / "out"), quantize_model(model, uniform(model, "int4")))


def test_bytes_of_a_quantised_config(model, written):
    """`dsv32 info` counts what the files hold."""
    count, by_dtype = parameter_counts(convert.stored_parameters(ModelConfig.from_hf(written("mixed"))))
    assert count == parameter_counts(named_parameters(model))[0]
    assert sum(by_dtype.values()) == conversion.nbytes(convert.load_hf(written("mixed")))


@pytest.mark.parametrize(
    ("schemes", "message"),
    [
        ({"layers.0.ffn.router": "int8"}, "layers.0.ffn.router: no linear"),
        ({"layers.0.attn.q": "int8"}, "layers.0.attn.q: no linear"),
        ({"layers.0.attn.q_a": "int3"}, "scheme 'int3'"),
    ],
)
def test_bad_schemes(source, tmp_path, schemes, message):
    with pytest.raises(UserError, match=message):
        quantize_checkpoint(source, tmp_path / "out", schemes)
    assert not list(tmp_path.iterdir())


def test_the_command(source, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"schemes": {"layers.0.attn.o": "int4", "layers.1.ffn.experts.up": "int8"}}))
    arguments = ["quantize", "--model", str(source), "--scheme", "mixed", "--plan", str(plan), "--json"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--out", str(tmp_path / "out"), "--to", "orbax"])
    assert ended.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["scheme"] == "mixed" and printed["to"] == "orbax"
    loaded = named_parameters(convert.load_orbax(tmp_path / "out"))
    assert scheme_name(loaded["layers.0.attn.o"]) == "int4" and scheme_name(loaded["layers.0.attn.q_a"]) == "fp8_block"
    note = json.loads((tmp_path / "out" / "config.json").read_text())[PROVENANCE]
    assert note["linears"]["int4"] == 1 and note["scheme"] == "mixed" and note["version"]


def test_the_command_with_a_text(tmp_path, capsys):
    """Calibrated, migrated and in ranges of a kind: the same as in Python, and the checkpoint says all of it."""
    tokenizer_files = loading.find("demo")
    vocabulary = ModelConfig.from_hf(tokenizer_files).vocab_size
    model = DeepseekV32(ModelConfig.tiny(num_hidden_layers=2, vocab_size=vocabulary), nnx.Rngs(0))
    convert.export_model(model, tmp_path / "source", tokenizer_files=tokenizer_files)
    text = tmp_path / "text.txt"
    text.write_text("Use pip to install the package, and then some more of it.")
    arguments = ["--calibration", str(text), "--window-tokens", "8", "--migrate", "0.5", "--ranges", "percentile"]
    source, target = str(tmp_path / "source"), str(tmp_path / "out")
    with pytest.raises(SystemExit) as ended:
        cli.main(["quantize", "--model", source, "--out", target, "--scheme", "int8", "--json", *arguments])
    assert ended.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["ranges"] == "percentile" and printed["migration"] == 0.5 and printed["calibration"]["tokens"] == 8
    note = json.loads((tmp_path / "out" / "config.json").read_text())[PROVENANCE]
    assert note["calibration"] == printed["calibration"] and note["migration"] == 0.5 and note["ranges"] == "percentile"
    lm = loading.load(source)
    migrated, statistics = migrate(lm.model, calibrate(lm, windows_of(lm, text.read_text(), 8)), 0.5)
    expected = quantize_model(migrated, uniform(migrated, "int8"), statistics, "percentile")
    assert equal_models(convert.load_hf(tmp_path / "out"), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scheme", "int3"], "--scheme int3"),
        (["--scheme", "int8", "--plan", "x.json"], "--plan: goes with"),
        (["--scheme", "int8", "--to", "gguf"], "--to gguf"),
        (["--scheme", "int4", "--calibration", "none.txt"], "none.txt"),
        (["--scheme", "int8", "--migrate", "0.5"], "--migrate: needs a text"),
        (["--scheme", "int8", "--migrate", "2"], "--migrate"),
        (["--scheme", "int8", "--ranges", "max"], "ranges: 'max'"),
    ],
)
def test_bad_flags(source, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        cli.main(["quantize", "--model", str(source), "--out", str(tmp_path / "out"), *arguments])
    assert message in capsys.readouterr().err
