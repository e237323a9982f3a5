"""The files beside a checkpoint's tensors: its config, texts, tokenizer and code."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsv32_jax.common.reading import present
from dsv32_jax.config import ModelConfig
from pallas_kernels.matmul import QTensor

COPIED = (
    "config.json",
    "generation_config.json",
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", "*.jinja", "additional_chat_templates/**/*"),
    *("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*", "*.md"),
    *("*.py", "encoding/**/*"),
)
"""The files that every conversion copies, to either layout, so that nothing is lost on the way back: settings, the
tokenizer in any of its forms, chat templates, licences and cards, and code (of `auto_map`, and DeepSeek's own encoding
of chats), which is never run here. Tensors in other formats are not copied, nor are folders such as `inference`, which
describe the source's files."""


def companions(directory: Path) -> Iterator[Path]:
    """Yields the files of `COPIED` that a checkpoint has, each once; the case of their names does not matter."""
    yielded = set()
    for pattern in COPIED:
        for path in sorted(directory.glob(pattern, case_sensitive=False)):
            if path not in yielded and present(path) and path.is_file() and "__pycache__" not in path.parts:
                yielded.add(path)
                yield path


def copy_files(source: Path, target: Path, config: ModelConfig | None) -> None:
    """Copies the companions of a checkpoint byte for byte; a `config` is written instead of the source's."""
    for path in companions(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    if config is not None:
        write_config(target, config)


def write_config(directory: Path, config: ModelConfig) -> None:
    """Writes config.json."""
    write_json(directory / "config.json", config.to_hf())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a file of settings."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def plain_dtype(parameters: Mapping[str, Any]) -> str | None:
    """The dtype in which most of the matrices lie that have no scheme; None where there are none.

    That is what config.json calls `torch_dtype` or `dtype`: released FP8 checkpoints say bfloat16 there.
    """
    plain = (leaf for leaf in parameters.values() if not isinstance(leaf, QTensor) and len(leaf.shape) > 1)
    return most_of((np.dtype(leaf.dtype).name, math.prod(leaf.shape)) for leaf in plain)


def most_of(sizes: Iterable[tuple[str, int]]) -> str | None:
    """The name whose sizes have the largest sum."""
    sums: Counter[str] = Counter()
    for name, size in sizes:
        sums[name] += size
    return max(sums, key=lambda name: sums[name], default=None)


def config_dtypes(config: ModelConfig) -> dict[str, Any]:
    """The dtype in a config, by field: transformers has renamed `torch_dtype` to `dtype`."""
    fields = {"torch_dtype": config.torch_dtype} | {name: json.loads(text) for name, text in config.unknown}
    return {name: fields[name] for name in ("torch_dtype", "dtype") if fields.get(name) is not None}


def with_dtype(config: ModelConfig, parameters: Mapping[str, Any]) -> ModelConfig:
    """The config with the dtype of the parameters that are written with it, see `plain_dtype`."""
    dtype = plain_dtype(parameters)
    if dtype is None:
        return config
    unknown = tuple((name, json.dumps(dtype) if name == "dtype" else text) for name, text in config.unknown)
    return config.replace(torch_dtype=dtype, unknown=unknown)
