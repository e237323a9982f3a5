"""Configs of the compressed-tensors format: those that are read, and those that are refused."""

import copy

import pytest

from dsv32_jax.config import ModelConfig
from dsv32_jax.config.quantization_config import CompressedTensors, QuantizationConfig, read_quantization_config
from dsv32_jax.convert.quantization import mixed, uniform
from dsv32_jax.convert.stored import quantization_config, stored_parameters
from dsv32_jax.errors import UserError
from dsv32_jax.model.model import abstract_model
from pallas_kernels.matmul import scheme_name

W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "global_compression_ratio": None,
    "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*weights_proj$", "re:.*eh_proj$", "re:.*shared_head.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "channel",
                "group_size": None,
                "block_structure": None,
                "dynamic": False,
                "actorder": None,
                "observer": "minmax",
                "observer_kwargs": {},
            },
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
                "observer": None,
            },
            "output_activations": None,
        }
    },
}
"""A config as other tools write it, for all linears but a few."""


def changed(*path_and_value):
    *path, last, value = path_and_value
    config = copy.deepcopy(W8A8)
    at = config
    for key in path:
        at = at[key]
    at[last] = value
    return config


@pytest.mark.parametrize(
    "more",
    [
        {"sparsity_config": {"format": "dense", "targets": []}, "transform_config": {}, "version": "0.20.1"},
        {"dequantize": False, "run_compressed": True, "use_optimized_inference": False, "ignore": None},
    ],
)
def test_what_other_tools_add_changes_nothing(more):
    read = read_quantization_config(W8A8 | more)
    assert read == read_quantization_config(W8A8 | {"ignore": list(read.ignore)})


def test_all_linears_as_other_tools_say_it():
    model = ModelConfig.tiny(quantization_config=read_quantization_config(W8A8))
    stored = {path: scheme_name(leaf) for path, leaf in stored_parameters(model).items()}
    expected = dict.fromkeys(uniform(abstract_model(model), "int8"), "int8")
    assert {path: scheme for path, scheme in stored.items() if scheme} == expected


WEIGHTS = ("config_groups", "group_0", "weights")
INPUTS = ("config_groups", "group_0", "input_activations")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (changed(*WEIGHTS, "num_bits", 6), ["config_groups.group_0.weights", "int4"]),
        (changed(*WEIGHTS, "strategy", "tensor"), ["config_groups.group_0.weights", "channel"]),
        (changed(*INPUTS, "dynamic", False), ["config_groups.group_0.input_activations", "token"]),
        (changed("config_groups", "group_0", "input_activations", None), ["input_activations"]),
        (changed("config_groups", "group_0", "format", "dense"), ["format", "int-quantized"]),
        (changed("config_groups", "group_0", "targets", "Linear"), ["targets", "list"]),
        (changed("config_groups", "group_0", "targets", ["re:("]), ["targets", "regular expression"]),
        (changed("config_groups", {}), ["config_groups"]),
        (changed(*WEIGHTS, "actorder", "group"), ["config_groups.group_0.weights.actorder", "static"]),
        (changed("dequantize", True), ["quantization_config.dequantize", "false"]),
        (changed("run_compressed", False), ["quantization_config.run_compressed", "true"]),
        (changed("sparsity_config", {"format": "sparse-24-bitmask"}), ["sparsity_config", "absent"]),
        (changed("quantization_status", "frozen"), ["quantization_status", "compressed"]),
        (changed("kv_cache_scheme", {"num_bits": 8}), ["kv_cache_scheme"]),
        (changed("ignored", []), ["ignored", "ignore"]),
        ({"quant_method": "gptq"}, ["quant_method", "fp8", "compressed-tensors"]),
    ],
)
def test_what_is_refused(raw, words):
    with pytest.raises(UserError) as caught:
        read_quantization_config(raw)
    assert all(word in str(caught.value) for word in words)


def test_a_scheme_for_what_is_no_linear_is_refused():
    raw = changed("config_groups", "group_0", "targets", [r"re:model\.layers\.\d+\.mlp\.gate$"])
    config = ModelConfig.tiny(quantization_config=read_quantization_config({**raw, "ignore": []}))
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.gate, which is never quantised"):
        stored_parameters(config)


@pytest.mark.parametrize("name", ["uniform", "mixed", "by layer"])
def test_schemes_come_back_from_what_is_written(name):
    config = ModelConfig.tiny(num_hidden_layers=12)
    model = abstract_model(config)
    schemes = {
        "uniform": uniform(model, "int4"),
        "mixed": mixed(model),
        "by layer": {
            p: ("int4" if "layers.1." in p else "int8") for p in uniform(model, "int8") if "layers.3." not in p
        },
    }[name]
    written = quantization_config(schemes, config)
    assert isinstance(written, CompressedTensors)
    new = ModelConfig.from_hf(config.replace(quantization_config=written).to_hf())
    assert new.quantization_config == written
    read_schemes = {path: scheme_name(leaf) for path, leaf in stored_parameters(new).items()}
    assert {path: scheme for path, scheme in read_schemes.items() if scheme} == schemes


def test_all_in_fp8_is_the_released_form_and_nothing_quantised_is_none():
    config = ModelConfig.tiny()
    assert quantization_config(uniform(abstract_model(config), "fp8_block"), config) == QuantizationConfig()
    assert quantization_config({}, config) is None
    without_scale_fmt = config.replace(quantization_config=QuantizationConfig(scale_fmt=None))
    assert (
        quantization_config(uniform(abstract_model(without_scale_fmt), "fp8_block"), without_scale_fmt)
        == without_scale_fmt.quantization_config
    )
