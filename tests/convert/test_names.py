"""Every tensor of the real checkpoint is exactly one part of exactly one parameter."""

import math
from collections import Counter

import ml_dtypes
import numpy as np

from dsv32_jax.config import ModelConfig
from dsv32_jax.convert.names import hf_name
from dsv32_jax.convert.stored import hf_tensors
from dsv32_jax.model.model import abstract_model
from dsv32_jax.model.params import named_parameters
from pallas_kernels.matmul import QTensor


def size_of(dtype: str) -> int:
    return np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize


def test_the_full_checkpoint_maps_one_to_one():
    """92,425 names and 689,471,107,200 bytes, the numbers of the released index."""
    config = ModelConfig.deepseek_v32()
    specs = hf_tensors(config)
    assert len(specs) == 92_425
    assert sum(math.prod(spec.shape) * size_of(spec.dtype) for spec in specs.values()) == 689_471_107_200
    places = {(spec.path, spec.part, spec.expert) for spec in specs.values()}
    assert len(places) == len(specs)
    for path, leaf in named_parameters(abstract_model(config)).items():
        parts = ("values", "scales") if isinstance(leaf, QTensor) else ("array",)
        experts = range(256) if "experts" in path.split(".") else (None,)
        for part in parts:
            array = leaf if part == "array" else getattr(leaf, part)
            for expert in experts:
                name = hf_name(path, config).format(expert=expert) + ("_scale_inv" if part == "scales" else "")
                spec = specs[name]
                assert (spec.path, spec.part, spec.expert) == (path, part, expert)
                assert spec.shape == array.shape[1 if expert is not None else 0 :] and spec.dtype == array.dtype.name
                places.remove((path, part, expert))
    assert not places


def test_names_of_the_released_checkpoint():
    """A sample of its names, shapes and types, by hand."""
    specs = hf_tensors(ModelConfig.deepseek_v32())
    expected = {
        "model.embed_tokens.weight": ((129280, 7168), "bfloat16"),
        "lm_head.weight": ((129280, 7168), "bfloat16"),
        "model.layers.0.mlp.gate_proj.weight": ((18432, 7168), "float8_e4m3fn"),
        "model.layers.0.mlp.down_proj.weight_scale_inv": ((56, 144), "float32"),
        "model.layers.60.self_attn.kv_a_proj_with_mqa.weight_scale_inv": ((5, 56), "float32"),
        "model.layers.3.self_attn.indexer.wq_b.weight": ((8192, 1536), "float8_e4m3fn"),
        "model.layers.3.self_attn.indexer.k_norm.bias": ((128,), "float32"),
        "model.layers.3.mlp.experts.255.up_proj.weight": ((2048, 7168), "float8_e4m3fn"),
        "model.layers.3.mlp.gate.e_score_correction_bias": ((256,), "float32"),
        "model.layers.61.eh_proj.weight": ((7168, 14336), "bfloat16"),
        "model.layers.61.shared_head.norm.weight": ((7168,), "float32"),
    }
    assert {name: (specs[name].shape, specs[name].dtype) for name in expected} == expected
    per_layer = Counter(name.split(".")[2] for name in specs if name.startswith("model.layers."))
    assert (per_layer["0"], per_layer["3"], per_layer["61"]) == (27, 1565, 1571)
